"""Keeps what is loaded equal to what is deployed."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import inf

import structlog
from headrace.v1.control_pb2 import LoadedVersion

from services.common.clock import Clock
from services.common.errors import HeadraceError, Unavailable
from services.worker.artifacts import ArtifactCache
from services.worker.backends.port import LeftToOthers
from services.worker.desired import Deployments, Desired, VersionKey
from services.worker.eviction import NoRoom, Resident, victims
from services.worker.input_layout import InputLayout
from services.worker.loaded_model import LoadedModel
from services.worker.loading import Loaded, VersionLoader
from services.worker.parked import Parked
from services.worker.slot import Slot
from services.worker.stats import ModelStats

log = structlog.get_logger(__name__)

_BACKOFF_FIRST_S = 1.0
_BACKOFF_MAX_S = 60.0
# After a version found no room, nobody asks again for this long.
_NO_ROOM_S = 1.0


@dataclass(frozen=True, slots=True)
class HostOptions:
    """When versions come and go. Times are seconds."""

    #: How long a version that is no longer deployed serves on: routers learn of it at their own pace.
    linger: float = 2.0
    #: How long it may take at most to finish what it has then.
    drain: float = 30.0
    #: A version unused for this long makes room as if it had no share of the traffic.
    long_idle: float = 300.0
    #: One of which a batch kept the event loop for longer, by the processor's time, is left to others.
    slow: float = inf
    #: An evicted version that carries traffic comes back when another leaves and there is room. For hosts
    #: that are not asked for what they do not have, because others have it.
    returns: bool = False


class ModelHost:
    """The versions of one worker. `on_change` is called after every change of a version's state.

    A version that cannot be loaded is tried again, ever more rarely, and stands in nobody's way.

    Where memory is short, `eviction.py` says who makes room. An evicted version is parked: requests for it
    wait, bounded like the version's own queue, and make it load again."""

    def __init__(
        self,
        deployments: Deployments,
        loader: VersionLoader,
        artifacts: ArtifactCache,
        on_change: Callable[[], None],
        clock: Clock,
        options: HostOptions = HostOptions(),
    ) -> None:
        self._deployments = deployments
        self._loader = loader
        self._artifacts = artifacts
        self._on_change = on_change
        self._clock = clock
        self._options = options
        self._slots: list[Slot] = []
        self._serving: dict[tuple[str, str], LoadedModel | Parked] = {}
        self._stopping = False
        #: Evictions by model and version.
        self.evictions: Counter[tuple[str, str]] = Counter()

    def apply(self, key: bytes, value: bytes | None) -> bool:
        """Take in one record of control.deployments.v1; False where a newer one is known."""
        taken = self._deployments.apply(key, value)
        if taken:
            self.reconcile(key.decode(errors="replace"))
        return taken

    def find(self, model: str, version: str) -> LoadedModel | Parked | None:
        """The version, if it can answer now or when it has been loaded again."""
        return self._serving.get((model, version))

    def desired(self, model: str, version: str) -> Desired | None:
        """What the deployments say of the version; None where none of this pool names it (yet)."""
        named = [slot.desired for slot in self._slots if slot.name == (model, version) and not slot.unwanted]
        return named[0] if named else None

    def serving(self) -> Iterator[tuple[VersionKey, LoadedModel]]:
        """Every version that can answer now."""
        for slot in self._slots:
            if slot.loaded is not None:
                yield slot.key, slot.loaded.model

    def failed(self) -> Iterator[tuple[VersionKey, Counter[str]]]:
        """Requests that failed, by the name of the code, of every version, loaded or not."""
        for slot in self._slots:
            if slot.loaded is not None:
                model = slot.loaded.model
                yield slot.key, model.stats.failed + model.refused
            elif slot.stats is not None:
                yield slot.key, slot.stats.failed

    def states(self) -> list[LoadedVersion]:
        """Every version for the heartbeat; of two with one name only the one that is wanted."""
        slots = {slot.name: slot for slot in self._slots if slot.unwanted}
        slots |= {slot.name: slot for slot in self._slots if not slot.unwanted}
        best = {name: slot.best for name, slot in slots.items()}
        return [
            LoadedVersion(
                model=slot.key.model,
                version=slot.key.version,
                state=slot.state,
                artifact_digest=slot.key.artifact_digest,
                error=slot.error,
                memory_bytes=slot.loaded.memory_bytes if slot.loaded else 0,
                best_rows=best[name].rows,
                best_rows_per_s=best[name].rows_per_s,
                totals=slot.totals(self._clock),
            )
            for name, slot in slots.items()
        ]

    def unready(self) -> str | None:
        """Why the worker should not be counted on yet: a version still on its first way up, or none that
        could be loaded. A failed version beside working ones does not hold the worker back."""
        wanted = [slot for slot in self._slots if not slot.unwanted]
        coming = [slot for slot in wanted if slot.first]
        if coming:
            return "loading " + ", ".join(f"{slot.key.model}/{slot.key.version}" for slot in coming)
        if wanted and all(slot.loaded is None and slot.error for slot in wanted):
            return "; ".join(f"{slot.key.model}/{slot.key.version}: {slot.error}" for slot in wanted)
        return None

    def reconcile(self, model: str) -> None:
        """Begin to load what is missing of `model` and to unload what is served of it no more. Of one model
        only, since a start takes in all of them one by one."""
        if self._stopping:
            return
        desired = self._deployments.desired_of(model)
        present: set[VersionKey] = set()
        for slot in self._slots:
            if slot.unwanted or slot.desired.key.model != model:
                continue
            wanted = desired.get(slot.key)
            if wanted is None:
                slot.unwanted = True
                slot.changed.set()
                continue
            present.add(slot.key)
            slot.desired = wanted
            if slot.loaded is not None:
                slot.loaded.model.configure(wanted.policy)
            elif slot.parked is not None:
                slot.parked.configure(wanted.policy)
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
            while not slot.unwanted:
                await self._bring_up(slot)
                await slot.until(lambda: slot.unwanted or slot.left or slot.loaded is None)
                if slot.left:
                    await self._retire(slot)
                await slot.until(lambda: slot.unwanted or slot.demanded or slot.returning)
            if slot.loaded is not None:
                self._enter(slot, LoadedVersion.STATE_UNLOADING)
                await self._retire(slot)
                log.info("unloaded", model=slot.key.model, version=slot.key.version)
        finally:
            self._unpark(slot, Unavailable("the version is not loaded here any more"))
            if not self._stopping:
                self._slots.remove(slot)
                if all(other.name != slot.name for other in self._slots):
                    self.evictions.pop(slot.name, None)
                self._on_change()
        await self._forget_artifacts()

    async def _bring_up(self, slot: Slot) -> None:
        """Load until it works, there is no room for it or it is no longer wanted."""
        while not slot.unwanted:
            if slot.state == LoadedVersion.STATE_EVICTED:
                self._enter(slot, LoadedVersion.STATE_LOADING)
            try:
                loaded = await self._loader.load(
                    slot.desired,
                    lambda state: self._enter(slot, state),
                    lambda missing: self._free(slot, missing),
                    slot.known_bytes,
                )
            except NoRoom as error:
                await self._found_no_room(slot, error)
                return
            except LeftToOthers as error:
                self._leave(slot, error.message)
                return
            except HeadraceError as error:
                self._failed(slot, error.message)
            except Exception:
                log.exception("load_crashed", model=slot.key.model, version=slot.key.version)
                self._failed(slot, "the version could not be loaded; the worker's log says why")
            else:
                self._serve(slot, loaded)
                return
            wait = min(_BACKOFF_FIRST_S * 2**slot.attempts, _BACKOFF_MAX_S)
            slot.attempts += 1
            await self._pause(slot, wait)

    def _serve(self, slot: Slot, loaded: Loaded) -> None:
        slot.loaded, slot.error, slot.attempts = loaded, "", 0
        slot.first = slot.returning = False
        model = loaded.model
        model.watch(self._options.slow, lambda: self._found_slow(slot))
        if slot.stats is not None:
            model.stats = slot.stats
        model.configure(slot.desired.policy)
        parked, slot.parked = slot.parked, None
        # One that was taken away meanwhile does not stand in for who was deployed after it, and was sooner.
        if not slot.unwanted or self._serving.get(slot.name) is parked:
            self._serving[slot.name] = model
        if parked is not None:
            parked.hand_over(model)
        self._enter(slot, LoadedVersion.STATE_READY)

    def _found_slow(self, slot: Slot) -> None:
        if slot.unwanted or slot.left:
            return
        slow = self._options.slow
        self._leave(slot, f"a batch took the processor for more than {slow} s, and everybody waited for it")

    def _leave(self, slot: Slot, reason: str) -> None:
        """Serve the version no more, as long as it is deployed: routers are told, and what they have sent
        until they know is answered."""
        tell = log.info if slot.loaded is None else log.warning
        tell("left_to_others", model=slot.key.model, version=slot.key.version, reason=reason)
        slot.error, slot.first, slot.left = reason, False, True
        self._unpark(slot, Unavailable(f"the version is left to others: {reason}"))
        self._enter(slot, LoadedVersion.STATE_FAILED)
        slot.changed.set()

    async def _found_no_room(self, slot: Slot, error: NoRoom) -> None:
        """Refuse who waits, so that routers can ask another worker, and be open to demand a little later."""
        log.warning("no_room", model=slot.key.model, version=slot.key.version, reason=error.message)
        slot.error, slot.first, slot.returning = error.message, False, False
        demanded = slot.demanded
        self._unpark(slot, error)
        self._enter(slot, LoadedVersion.STATE_EVICTED)
        if demanded:
            await self._pause(slot, _NO_ROOM_S)
        if not slot.unwanted:
            self._park(slot, InputLayout(slot.desired.served.signature, backend=slot.desired.served.backend))

    async def _pause(self, slot: Slot, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await slot.until(lambda: slot.unwanted)

    def _free(self, slot: Slot, missing: int) -> bool:
        """Evict others so that `missing` bytes become free for `slot`; False where they cannot."""
        if slot.returning and not slot.demanded:
            return False  # else idle versions would take turns for nobody
        loaded = [
            (other, other.loaded)
            for other in self._slots
            if other.loaded is not None and not other.unwanted and not other.left
        ]
        residents = [
            Resident(
                other.key,
                held.memory_bytes,
                other.desired.carries,
                held.model.unused,
                busy=not held.model.idle,
            )
            for other, held in loaded
        ]
        chosen = victims(residents, missing, demanded=slot.demanded, long_idle=self._options.long_idle)
        for key in chosen:
            self._evict(next(other for other, _ in loaded if other.key == key))
        return bool(chosen)

    def _evict(self, slot: Slot) -> None:
        loaded, slot.loaded = slot.loaded, None
        if loaded is None:
            return
        slot.known_bytes, slot.stats = loaded.memory_bytes, loaded.model.stats
        self._park(slot, loaded.model.layout)
        loaded.model.close()
        slot.keep_counts(loaded.model)
        self.evictions[slot.name] += 1
        self._enter(slot, LoadedVersion.STATE_EVICTED)
        slot.changed.set()
        log.info("evicted", model=slot.key.model, version=slot.key.version, bytes=loaded.memory_bytes)

    def _park(self, slot: Slot, layout: InputLayout) -> None:
        # What it refuses counts for the version, whether or not that is ever loaded again.
        slot.stats = stats = slot.stats or ModelStats()
        parked = Parked(layout, slot.desired.policy, self._clock, slot.changed.set, stats.failed)
        slot.parked = self._serving[slot.name] = parked

    def _unpark(self, slot: Slot, reason: HeadraceError) -> None:
        parked, slot.parked = slot.parked, None
        if parked is not None:
            if self._serving.get(slot.name) is parked:
                del self._serving[slot.name]
            parked.close(reason)

    async def _retire(self, slot: Slot) -> None:
        """Answer what routers send until they know, and give the memory back."""
        if slot.loaded is not None:
            model = slot.loaded.model
            try:
                await asyncio.sleep(self._options.linger)
                if self._serving.get(slot.name) is model:
                    del self._serving[slot.name]
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._options.drain):
                        await model.drain()
            finally:
                model.close()
                slot.keep_counts(model)
                slot.loaded = None
        if self._options.returns:
            for other in self._slots:
                if other.state == LoadedVersion.STATE_EVICTED and other.desired.carries:
                    other.returning = True
                    other.changed.set()

    def _failed(self, slot: Slot, reason: str) -> None:
        log.error("load_failed", model=slot.key.model, version=slot.key.version, reason=reason)
        slot.error, slot.first = reason, False
        self._unpark(slot, Unavailable(f"the version could not be loaded: {reason}"))
        self._enter(slot, LoadedVersion.STATE_FAILED)

    def _enter(self, slot: Slot, state: LoadedVersion.State) -> None:
        slot.state = state
        self._on_change()

    async def _forget_artifacts(self) -> None:
        if not self._stopping:
            await self._artifacts.keep_only({slot.key.artifact_digest for slot in self._slots})
