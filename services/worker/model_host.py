"""Keeps what is loaded equal to what is deployed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import structlog
from headrace.v1.control_pb2 import LoadedVersion

from services.common.errors import HeadraceError
from services.worker.artifacts import ArtifactCache
from services.worker.desired import Deployments, Desired, VersionKey
from services.worker.loaded_model import LoadedModel
from services.worker.loading import Loaded, VersionLoader

log = structlog.get_logger(__name__)

_BACKOFF_FIRST_S = 1.0
_BACKOFF_MAX_S = 60.0


@dataclass(slots=True, eq=False)
class Slot:
    """One version from the moment it is wanted to the moment it is gone."""

    desired: Desired
    state: LoadedVersion.State = LoadedVersion.STATE_LOADING
    error: str = ""
    attempts: int = 0
    loaded: Loaded | None = None
    unwanted: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    @property
    def key(self) -> VersionKey:
        return self.desired.key


class ModelHost:
    """The versions of one worker. `on_change` is called after every change of a version's state.

    A version that is no longer deployed serves for `linger` seconds more (routers learn of it at their own
    pace), then finishes what it has, for `drain` seconds at most. A version that cannot be loaded is tried
    again, ever more rarely, and stands in nobody's way."""

    def __init__(
        self,
        deployments: Deployments,
        loader: VersionLoader,
        artifacts: ArtifactCache,
        on_change: Callable[[], None],
        *,
        linger: float = 2.0,
        drain: float = 30.0,
    ) -> None:
        self._deployments = deployments
        self._loader = loader
        self._artifacts = artifacts
        self._on_change = on_change
        self._linger = linger
        self._drain = drain
        self._slots: list[Slot] = []
        self._serving: dict[tuple[str, str], LoadedModel] = {}
        self._stopping = False

    def apply(self, key: bytes, value: bytes | None) -> None:
        """Take in one record of control.deployments.v1."""
        self._deployments.apply(key, value)
        self.reconcile()

    def find(self, model: str, version: str) -> LoadedModel | None:
        """The version, if it can answer now."""
        return self._serving.get((model, version))

    def serving(self) -> Iterator[tuple[VersionKey, LoadedModel]]:
        """Every version that can answer now."""
        for slot in self._slots:
            if slot.loaded is not None:
                yield slot.key, slot.loaded.model

    def states(self) -> list[LoadedVersion]:
        """Every version for the heartbeat; of two with one name only the one that is wanted."""
        slots = {(slot.key.model, slot.key.version): slot for slot in self._slots if slot.unwanted.is_set()}
        slots |= {
            (slot.key.model, slot.key.version): slot for slot in self._slots if not slot.unwanted.is_set()
        }
        return [
            LoadedVersion(
                model=slot.key.model,
                version=slot.key.version,
                state=slot.state,
                artifact_digest=slot.key.artifact_digest,
                error=slot.error,
                memory_bytes=slot.loaded.memory_bytes if slot.loaded else 0,
            )
            for slot in slots.values()
        ]

    def unready(self) -> str | None:
        """Why the worker should not be counted on yet: a version still on its first way up, or none that
        could be loaded. A failed version beside working ones does not hold the worker back."""
        wanted = [slot for slot in self._slots if not slot.unwanted.is_set()]
        coming = [slot for slot in wanted if slot.loaded is None and slot.state != LoadedVersion.STATE_FAILED]
        coming = [slot for slot in coming if not slot.attempts]
        if coming:
            return "loading " + ", ".join(f"{slot.key.model}/{slot.key.version}" for slot in coming)
        if wanted and all(slot.loaded is None for slot in wanted):
            return "; ".join(f"{slot.key.model}/{slot.key.version}: {slot.error}" for slot in wanted)
        return None

    def reconcile(self) -> None:
        """Begin to load what is missing and to unload what is served no more."""
        if self._stopping:
            return
        desired = self._deployments.desired()
        present: set[VersionKey] = set()
        for slot in self._slots:
            wanted = desired.get(slot.key)
            if slot.unwanted.is_set():
                continue
            if wanted is None:
                slot.unwanted.set()
                continue
            present.add(slot.key)
            slot.desired = wanted
            if slot.loaded is not None:
                slot.loaded.model.configure(wanted.policy)
        for key, wanted in desired.items():
            if key not in present:
                slot = Slot(wanted)
                slot.task = asyncio.create_task(self._live(slot), name=f"{key.model}/{key.version}")
                self._slots.append(slot)
        self._on_change()

    async def drain(self) -> None:
        """Load nothing more and return once everything queued has been answered."""
        self._stopping = True
        for slot in self._slots:
            if slot.loaded is None and slot.task is not None:
                slot.task.cancel()
        await asyncio.gather(*(model.drain() for _, model in self.serving()))

    async def close(self) -> None:
        """Refuse what is left, and end every task."""
        self._stopping = True
        tasks = [slot.task for slot in self._slots if slot.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for _, model in self.serving():
            model.close()
        self._serving.clear()
        self._slots.clear()

    async def _live(self, slot: Slot) -> None:
        try:
            loaded = await self._bring_up(slot)
            if loaded is not None:
                await slot.unwanted.wait()
                await self._take_down(slot, loaded.model)
        finally:
            if not self._stopping:
                self._slots.remove(slot)
                self._on_change()
        await self._forget_artifacts()

    async def _bring_up(self, slot: Slot) -> Loaded | None:
        """Load until it works or is no longer wanted."""
        while not slot.unwanted.is_set():
            try:
                loaded = await self._loader.load(slot.desired, lambda state: self._enter(slot, state))
            except HeadraceError as error:
                self._failed(slot, error.message)
            except Exception:
                log.exception("load_crashed", model=slot.key.model, version=slot.key.version)
                self._failed(slot, "the version could not be loaded; the worker's log says why")
            else:
                slot.loaded, slot.error = loaded, ""
                loaded.model.configure(slot.desired.policy)
                self._serving[slot.key.model, slot.key.version] = loaded.model
                self._enter(slot, LoadedVersion.STATE_READY)
                return loaded
            wait = min(_BACKOFF_FIRST_S * 2**slot.attempts, _BACKOFF_MAX_S)
            slot.attempts += 1
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await slot.unwanted.wait()
        return None

    async def _take_down(self, slot: Slot, model: LoadedModel) -> None:
        self._enter(slot, LoadedVersion.STATE_UNLOADING)
        await asyncio.sleep(self._linger)
        name = (slot.key.model, slot.key.version)
        if self._serving.get(name) is model:
            del self._serving[name]
        with suppress(TimeoutError):
            async with asyncio.timeout(self._drain):
                await model.drain()
        model.close()
        log.info("unloaded", model=slot.key.model, version=slot.key.version)

    def _failed(self, slot: Slot, reason: str) -> None:
        log.error("load_failed", model=slot.key.model, version=slot.key.version, reason=reason)
        slot.error = reason
        self._enter(slot, LoadedVersion.STATE_FAILED)

    def _enter(self, slot: Slot, state: LoadedVersion.State) -> None:
        slot.state = state
        self._on_change()

    async def _forget_artifacts(self) -> None:
        if not self._stopping:
            await self._artifacts.keep_only({slot.key.artifact_digest for slot in self._slots})
