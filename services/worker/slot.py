"""What a worker knows of one version that it should serve."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from headrace.v1.control_pb2 import LoadedVersion, ServingTotals

from services.common.clock import Clock
from services.worker.best_batch import UNMEASURED, BestBatch
from services.worker.desired import Desired, VersionKey
from services.worker.loaded_model import LoadedModel
from services.worker.loading import Loaded
from services.worker.parked import Parked
from services.worker.stats import ModelStats


@dataclass(slots=True, eq=False)
class Slot:
    """One version from the moment it is wanted to the moment it is gone."""

    desired: Desired
    state: LoadedVersion.State = LoadedVersion.STATE_LOADING
    error: str = ""
    attempts: int = 0
    loaded: Loaded | None = None
    # Set while it is not loaded and may be asked for.
    parked: Parked | None = None
    # On its first way up, for which the worker's readiness waits.
    first: bool = True
    # Kept while it is not loaded.
    known_bytes: int = 0
    stats: ModelStats | None = None
    unwanted: bool = False
    # Others serve it from now on, as long as it is deployed.
    left: bool = False
    # On its way back though nobody asked for it.
    returning: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    @property
    def key(self) -> VersionKey:
        return self.desired.key

    @property
    def name(self) -> tuple[str, str]:
        return self.key.model, self.key.version

    @property
    def best(self) -> BestBatch:
        """The batch that jobs are cut for."""
        return self.loaded.model.best if self.loaded is not None else UNMEASURED

    def totals(self, clock: Clock) -> ServingTotals | None:
        """What was counted of it so far; None: nothing."""
        if self.loaded is not None:
            model = self.loaded.model
            return model.stats.totals(clock, refused=model.refused.total())
        return None if self.stats is None else self.stats.totals(clock)

    def keep_counts(self, model: LoadedModel) -> None:
        """`model` is closed: what it counted stays, also of whom it refused."""
        self.stats = model.stats
        self.stats.failed.update(model.refused)

    @property
    def demanded(self) -> bool:
        """Whether requests wait for it."""
        return self.parked is not None and self.parked.queued_rows > 0

    async def until(self, reached: Callable[[], bool]) -> None:
        """Return once `reached()`; asked again after every `changed`."""
        while not reached():
            self.changed.clear()
            await self.changed.wait()
