"""What acts by itself: one loop that looks at every trial twice a second, once where none has anything to do,
every five seconds where none is open, and whenever a verdict came or a trial was changed here.

It keeps nothing: what is to be done follows from the database alone, so one that was killed goes on where it
was, and several replicas do no harm, since whoever has a trial's model locked acts and the others pass on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from datetime import datetime
from types import TracebackType
from typing import Final, Protocol, Self

import structlog
from sqlalchemy.exc import SQLAlchemyError

from services.common.errors import HeadraceError
from services.registry.edge import Edge
from services.registry.repository import Repository

log = structlog.get_logger(__name__)

INTERVAL_S: Final = 0.5
#: How many times as long it waits while no trial has anything to do.
_IDLE: Final = 2.0
#: The same while none is open: then a look only finds what was begun at another registry.
_NOTHING_OPEN: Final = 10.0
_ACT_S: Final = 30.0
_FIRST_BACKOFF_S: Final = 0.5
_MAX_BACKOFF_S: Final = 30.0
_CLOSE_S: Final = 5.0
_FAILED: Final = "failed"


class Actor(Protocol):
    """One kind of trial."""

    @property
    def kind(self) -> str:
        """What metrics and logs call it."""
        ...

    @property
    def actions(self) -> Sequence[str]:
        """Every word that `act` may give."""
        ...

    @property
    def is_open(self) -> bool:
        """Whether the last `candidates` saw any that will have something to do, now or later."""
        ...

    async def candidates(self, tx: Repository, now: datetime) -> Sequence[str]:
        """Ids of those that may have something to do. Takes no locks."""
        ...

    async def act(self, tx: Repository, trial_id: str, now: datetime) -> str | None:
        """Decide and do, all in the transaction of `tx`: what was done in a word, None for nothing.

        Locks the model first and then the trial, and gives up at once where somebody else holds one of them.
        """
        ...


class Controller:
    """Lets every actor act, one trial after the other, each in a transaction of its own. A trial that fails
    is tried again after a while that doubles, and never holds up another."""

    def __init__(self, edge: Edge, actors: Iterable[Actor], interval_s: float = INTERVAL_S) -> None:
        self._edge = edge
        self._actors = tuple(actors)
        self._interval_s = interval_s
        self._woken = asyncio.Event()
        #: When to try a failed one again (monotonic), and how long was waited.
        self._backoff: dict[tuple[str, str], tuple[float, float]] = {}
        self._task: asyncio.Task[None] | None = None
        # From 0: of a series that begins with 1, nobody sees that it grew.
        for actor in self._actors:
            for action in (*actor.actions, _FAILED):
                edge.metrics.decisions.labels(actor.kind, action)

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="controller")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=_CLOSE_S)

    def wake(self) -> None:
        """Look again at once."""
        self._woken.set()

    async def _run(self) -> None:
        while True:
            self._woken.clear()
            found, failed = 0, False
            for actor in self._actors:
                try:
                    found += await self._round(actor)
                except (HeadraceError, SQLAlchemyError, OSError) as error:
                    failed = True
                    log.warning("trials_not_looked_at", kind=actor.kind, reason=str(error))
                except Exception:
                    failed = True
                    log.exception("trials_not_looked_at", kind=actor.kind)  # the next look must come
            try:
                async with asyncio.timeout(self._pause_s(found, failed=failed)):
                    await self._woken.wait()
            except TimeoutError:
                pass

    def _pause_s(self, found: int, *, failed: bool) -> float:
        if found:
            return self._interval_s
        waits = failed or any(actor.is_open for actor in self._actors)
        return self._interval_s * (_IDLE if waits else _NOTHING_OPEN)

    async def _round(self, actor: Actor) -> int:
        """Let `actor` act once; how many trials had something to do."""
        async with asyncio.timeout(_ACT_S), self._edge.transaction() as tx:
            candidates = await actor.candidates(tx, self._edge.clock.now())
        live = {(actor.kind, trial_id) for trial_id in candidates}
        for key in [old for old in self._backoff if old[0] == actor.kind and old not in live]:
            del self._backoff[key]
        for trial_id in candidates:
            tried = self._backoff.get((actor.kind, trial_id))
            if tried is None or tried[0] <= self._edge.clock.monotonic():
                await self._act(actor, trial_id)
        return len(candidates)

    async def _act(self, actor: Actor, trial_id: str) -> None:
        try:
            async with asyncio.timeout(_ACT_S), self._edge.transaction() as tx:
                action = await actor.act(tx, trial_id, self._edge.clock.now())
        except (HeadraceError, SQLAlchemyError, OSError) as error:
            log.warning("trial_failed", kind=actor.kind, trial=trial_id, reason=str(error))
            self._fail(actor, trial_id)
        except Exception:
            log.exception("trial_failed", kind=actor.kind, trial=trial_id)
            self._fail(actor, trial_id)
        else:
            self._backoff.pop((actor.kind, trial_id), None)
            if action is not None:
                self._edge.metrics.decisions.labels(actor.kind, action).inc()
                log.info("trial_decided", kind=actor.kind, trial=trial_id, action=action)

    def _fail(self, actor: Actor, trial_id: str) -> None:
        self._edge.metrics.decisions.labels(actor.kind, _FAILED).inc()
        _, waited = self._backoff.get((actor.kind, trial_id), (0.0, 0.0))
        wait = min(_MAX_BACKOFF_S, 2 * waited or _FIRST_BACKOFF_S)
        self._backoff[actor.kind, trial_id] = (self._edge.clock.monotonic() + wait, wait)
