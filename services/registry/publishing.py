"""Keeping the control topics true: whatever the broker lost or never had is published again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from itertools import count, islice
from types import TracebackType
from typing import Self

import structlog
from headrace.v1.control_pb2 import ApiKey, ServingConfig
from headrace.v1.trials_pb2 import Trial
from sqlalchemy.exc import SQLAlchemyError

from services.common.bus import Bus, Table
from services.common.errors import HeadraceError
from services.common.topics import DEPLOYMENTS, KEYS, TRIALS, Topic
from services.registry.deployments import republish
from services.registry.edge import Edge
from services.registry.keys import republish_key
from services.registry.trials import republish_trial

log = structlog.get_logger(__name__)

_CLOSE_S = 5.0
#: Topics that say what they said when all was well are compared with the database every so many times only.
_SELDOM = 6
#: Keys are many, and whoever has one is kept out until it is back: one transaction for each would take
#: minutes.
_KEYS_AT_ONCE = 100


def outdated(ours: Mapping[str, int], known: Mapping[str, int], seen: Mapping[str, int]) -> dict[str, int]:
    """Keys whose record must be published again, each with the revision seen on the topic (0: none).

    `ours` are the live revisions of the database, `known` the last ones of everything it ever published,
    `seen` what the topic holds. A key that the database never knew is left alone: an empty database that is
    pointed at a running installation by mistake must not switch it off.
    """
    wrong = {key: seen.get(key, 0) for key, revision in ours.items() if seen.get(key) != revision}
    ghosts = {key: revision for key, revision in seen.items() if key not in ours and key in known}
    return wrong | ghosts


class TopicState:
    """Revisions that the broker holds in one compacted topic, followed by `apply`."""

    def __init__(self, topic: Topic, revision_of: Callable[[bytes], int]) -> None:
        self.topic = topic
        self.table: Table | None = None
        self._revision_of = revision_of
        self._revisions: dict[str, int] = {}
        self._reading = 0

    @property
    def readings(self) -> int:
        """How often the topic was read from its start; 0 while it has not been."""
        return 0 if self.table is None else self.table.readings

    def apply(self, key: bytes, value: bytes | None) -> None:
        """One record of the topic."""
        self._forget_earlier_readings()
        if value is None:
            self._revisions.pop(key.decode(), None)
        else:
            self._revisions[key.decode()] = self._revision_of(value)

    def seen(self) -> dict[str, int] | None:
        """Revision by key; None while the topic has not been read."""
        if self.table is None or not self.table.caught_up:
            return None
        self._forget_earlier_readings()
        return dict(self._revisions)

    def _forget_earlier_readings(self) -> None:
        """A table keeps what a broker lost, since serving goes on with it; here it counts as lost."""
        if self.table is not None and self.table.readings != self._reading:
            self._reading = self.table.readings
            self._revisions.clear()


class Republisher:
    """Compares topics and database at start and every `interval_s` in which a topic changed, otherwise every
    sixth time, and publishes what differs. The check is two small queries for each topic while all is well;
    several replicas do no harm, only the same record twice."""

    def __init__(self, edge: Edge, bus: Bus, interval_s: float) -> None:
        self._edge = edge
        self._bus = bus
        self._interval_s = interval_s
        self._deployments = TopicState(DEPLOYMENTS, lambda value: ServingConfig.FromString(value).revision)
        self._keys = TopicState(KEYS, lambda value: ApiKey.FromString(value).revision)
        self._trials = TopicState(TRIALS, lambda value: Trial.FromString(value).revision)
        self._stack = AsyncExitStack()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        for state in (self._deployments, self._keys, self._trials):
            state.table = await self._stack.enter_async_context(self._bus.table(state.topic, state.apply))
        self._task = asyncio.create_task(self._run(), name="republisher")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=_CLOSE_S)
        await self._stack.aclose()

    async def check(self) -> int:
        """Compare once; the number of records put into the outbox. Topics not read yet are left out."""
        return await self._check_deployments() + await self._check_keys() + await self._check_trials()

    async def _run(self) -> None:
        states = (self._deployments, self._keys, self._trials)
        for state in states:
            if state.table is not None:
                try:
                    await state.table.ready(self._interval_s)
                except HeadraceError as error:
                    log.warning("control_topic_not_read", topic=state.topic.name, reason=error.message)
        well: list[tuple[int, dict[str, int] | None]] = []
        for turn in count():
            seen = [(state.readings, state.seen()) for state in states]
            try:
                if seen != well or turn % _SELDOM == 0:
                    well = []
                    if await self.check() == 0:
                        well = seen
            except (HeadraceError, SQLAlchemyError, OSError) as error:
                log.warning("control_topics_not_checked", reason=str(error))
            except Exception:
                log.exception("control_topics_not_checked")  # the next check must come all the same
            self._edge.metrics.outbox_age.set(self._edge.relay.oldest_pending_s)
            await asyncio.sleep(self._interval_s)

    async def _check_deployments(self) -> int:
        seen = self._deployments.seen()
        if seen is None:
            return 0
        async with self._edge.transaction() as tx:
            pending = await tx.pending(DEPLOYMENTS)
            wrong = outdated(await tx.deployed_revisions(), await tx.last_revisions(), seen)
        todo = {model: revision for model, revision in wrong.items() if model not in pending}
        for model, revision in todo.items():
            async with self._edge.transaction() as tx:
                await republish(tx, model, revision, self._edge.clock)
        return self._report(DEPLOYMENTS, wrong, todo)

    async def _check_keys(self) -> int:
        seen = self._keys.seen()
        if seen is None:
            return 0
        async with self._edge.transaction() as tx:
            pending = await tx.pending(KEYS)
            ours = await tx.key_revisions()
        wrong = outdated(ours, ours, seen)
        todo = {key: seen_ for key, seen_ in wrong.items() if key not in pending}
        # In one order, so that two replicas never wait for each other's rows.
        due = iter(sorted(todo.items()))
        while some := list(islice(due, _KEYS_AT_ONCE)):
            async with self._edge.transaction() as tx:
                for key_id, revision in some:
                    await republish_key(tx, key_id, revision)
        return self._report(KEYS, wrong, todo)

    async def _check_trials(self) -> int:
        seen = self._trials.seen()
        if seen is None:
            return 0
        async with self._edge.transaction() as tx:
            pending = await tx.pending(TRIALS)
            ours = await tx.trial_revisions()
        wrong = outdated(ours, ours, seen)
        todo = {trial: seen_ for trial, seen_ in wrong.items() if trial not in pending}
        for trial_id, revision in todo.items():
            async with self._edge.transaction() as tx:
                await republish_trial(tx, trial_id, revision)
        return self._report(TRIALS, wrong, todo)

    def _report(self, topic: Topic, wrong: Mapping[str, int], todo: Mapping[str, int]) -> int:
        # Those that wait in the outbox are not there either.
        self._edge.metrics.control_missing.labels(topic.name).set(len(wrong))
        if todo:
            self._edge.metrics.republished.labels(topic.name).inc(len(todo))
            log.info("control_records_republished", topic=topic.name, records=len(todo))
        return len(todo)
