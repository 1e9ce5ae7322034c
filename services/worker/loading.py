"""From an artifact's digest to a version that is loaded and warm."""

from __future__ import annotations

import asyncio
import ctypes
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import structlog
from headrace.v1.control_pb2 import LoadedVersion

from services.worker.artifacts import ArtifactCache
from services.worker.backends.port import Backend, BackendOptions, LeftToOthers, LoadFailed
from services.worker.backends.registry import loader
from services.worker.desired import Desired
from services.worker.eviction import NoRoom
from services.worker.execution import Runner
from services.worker.input_layout import InputLayout
from services.worker.load_mark import LoadMark
from services.worker.loaded_model import LoadedModel
from services.worker.prediction_log import PredictionRecords
from services.worker.run_time import RunTime
from services.worker.serving import Serving
from services.worker.steadiness import unsteady
from services.worker.warm_up import WarmUp, warm_up

log = structlog.get_logger(__name__)

_NO_ROOM_MS = 1000

OnState = Callable[[LoadedVersion.State], None]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """`source` names this process in the prediction log. `memory_limit` is bytes, 0: none. `slots` is how
    many batches of a version may run at once."""

    source: str
    backend: BackendOptions
    memory_limit: int = 0
    slots: int = 1
    #: A version of which one row takes longer than so many seconds is left to others; 0: none is.
    slowest_row: float = 0.0


@dataclass(frozen=True, slots=True)
class Loaded:
    """A version that serves, and the bytes that the process grew by."""

    model: LoadedModel
    memory_bytes: int


class VersionLoader:
    """Downloads concurrently, loads and measures one version at a time: two at once would measure each
    other."""

    def __init__(
        self,
        artifacts: ArtifactCache,
        serving: Serving,
        options: LoadOptions,
        mark: LoadMark | None = None,
    ) -> None:
        """With `mark`, what ended a process before this one is left to others."""
        self._artifacts = artifacts
        self._mark = mark
        self._serving = serving
        self._options = options
        self._one_at_a_time = asyncio.Lock()

    async def load(
        self, desired: Desired, on_state: OnState, free: Callable[[int], bool], known_bytes: int = 0
    ) -> Loaded:
        """Bring `desired` up; `known_bytes` is what it took the last time. `free` is asked to give up so many
        bytes of other versions where memory is short; False: it has none to give.

        Raises LoadFailed with the reason, LeftToOthers, NoRoom, Unavailable when the artifact store is
        away."""
        key, served = desired.key, desired.served
        if self._mark is not None:
            self._mark.check(served.artifact_digest)
        try:
            layout = InputLayout(served.signature, backend=served.backend)
        except ValueError as error:
            raise LoadFailed(f"the signature cannot be served: {error}") from error
        directory = await self._artifacts.fetch(served.artifact_digest)
        async with self._one_at_a_time:
            await self._make_room(max(served.artifact_bytes, known_bytes), free)
            before = resident_bytes()
            run_time = RunTime()
            max_rows = desired.policy.batching.max_rows
            with nullcontext() if self._mark is None else self._mark.on(served.artifact_digest):
                backend = await asyncio.to_thread(self._open, desired, directory)
                layout = InputLayout(served.signature, backend.padding, served.backend)
                on_state(LoadedVersion.STATE_WARMING)
                runner = Runner(backend, served.signature, layout)
                try:
                    warm = await asyncio.to_thread(warm_up, runner, layout, max_rows, run_time)
                    await asyncio.to_thread(self._check_quick, directory, runner, warm, run_time)
                except BaseException:
                    backend.close()
                    raise
            grown = max(resident_bytes() - before, served.artifact_bytes)
        self._tell(desired, warm, run_time, max_rows)
        records = PredictionRecords(
            self._options.source, key.model, key.version, served.artifact_digest, layout
        )
        model = LoadedModel(
            runner, run_time, records, desired.policy, self._serving,
            version=key.version, slots=self._options.slots, best=warm.best,
        )  # fmt: skip
        return Loaded(model, grown)

    def _check_quick(self, directory: Path, runner: Runner, warm: WarmUp, run_time: RunTime) -> None:
        """Where only quick versions are taken, raise LeftToOthers for all others. Blocks."""
        slowest = self._options.slowest_row
        if not slowest:
            return
        if runner.backend.device != "cpu" or not runner.layout.fixed or not warm.ran:
            raise LeftToOthers("only what runs on a processor, with rows of one shape, is known to be quick")
        # The fastest: what else the machine did meanwhile is no fault of the version's.
        row = run_time.floor(time.monotonic())
        if row > slowest:
            raise LeftToOthers(f"a row takes {row * 1e6:.0f} µs, more than {slowest * 1e6:.0f}")
        if operator := unsteady(directory):
            raise LeftToOthers(f"how long {operator} takes depends on what it is given")

    def _open(self, desired: Desired, directory: Path) -> Backend:
        served = desired.served
        return loader(served.backend)(directory, served.signature, self._options.backend)

    async def _make_room(self, needed: int, free: Callable[[int], bool]) -> None:
        limit = self._options.memory_limit
        if not limit or resident_bytes() + needed <= limit:
            return
        while True:
            await asyncio.to_thread(return_freed_memory)
            used = resident_bytes()
            if used + needed <= limit:
                return
            if not free(used + needed - limit):
                raise NoRoom(
                    f"no memory for {needed >> 20} MiB: {used >> 20} of {limit >> 20} MiB are in use",
                    retry_after_ms=_NO_ROOM_MS,
                )

    def _tell(self, desired: Desired, warm: WarmUp, run_time: RunTime, max_rows: int) -> None:
        key = desired.key
        if not warm.ran:
            log.warning("not_warmed_up", model=key.model, version=key.version, reason=warm.reason)
            return
        log.info(
            "loaded",
            model=key.model,
            version=key.version,
            one_row_us=round(run_time.estimate(1) * 1e6),
            full_batch_us=round(run_time.estimate(max_rows) * 1e6),
            max_rows=max_rows,
            best_rows=warm.best.rows,
            best_rows_per_s=round(warm.best.rows_per_s),
            apart=warm.best.apart,
        )


def return_freed_memory() -> None:
    """Give the system what the C library keeps for later, so that the next measurement is of what is in use.
    Does nothing where the library cannot."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident_bytes() -> int:
    """Memory that the process holds, without what clients share with it; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        held, shared = (int(fields.get(name, "0 kB").split()[0]) for name in ("VmRSS", "RssShmem"))
    except (OSError, ValueError, IndexError):
        return 0
    return (held - shared) << 10
