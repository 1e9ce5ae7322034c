"""What is published again, and what is left alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from headrace.v1.control_pb2 import ServingConfig

from services.common.bus import MemoryBus, Record
from services.common.topics import DEPLOYMENTS, KEYS, Topic
from services.registry import publishing
from services.registry.edge import Edge
from services.registry.metrics import Metrics
from services.registry.publishing import Republisher, TopicState, outdated
from services.registry.tables import KeyRow
from tests.fixtures.waiting import PATIENCE_S, eventually


@pytest.mark.parametrize(
    ("ours", "known", "seen", "expected"),
    [
        ({}, {}, {}, {}),
        ({"a": 3}, {"a": 3}, {"a": 3}, {}),
        ({"a": 3}, {"a": 3}, {}, {"a": 0}),  # an empty topic
        ({"a": 3}, {"a": 3}, {"a": 2}, {"a": 2}),  # behind
        ({"a": 3}, {"a": 3}, {"a": 9}, {"a": 9}),  # ahead: a restored database
        ({}, {"a": 4}, {"a": 3}, {"a": 3}),  # undeployed, and the topic does not know
        ({}, {}, {"a": 3}, {}),  # never ours
    ],
)
def test_outdated(
    ours: dict[str, int], known: dict[str, int], seen: dict[str, int], expected: dict[str, int]
) -> None:
    assert outdated(ours, known, seen) == expected


def record(model: str, revision: int | None) -> Record:
    value = None if revision is None else ServingConfig(model=model, revision=revision).SerializeToString()
    return Record(DEPLOYMENTS.name, model.encode(), value)


async def test_a_topic_state_forgets_what_the_broker_lost() -> None:
    bus = MemoryBus()
    state = TopicState(DEPLOYMENTS, lambda value: ServingConfig.FromString(value).revision)
    assert state.seen() is None
    await bus.publish([record("a", 1), record("b", 7), record("a", 2), record("c", 1), record("c", None)])
    async with bus.table(DEPLOYMENTS, state.apply) as table:
        state.table = table
        await table.ready(PATIENCE_S)
        assert state.seen() == {"a": 2, "b": 7}
        bus.lose_everything()
        await bus.publish([record("b", 8)])
        assert state.seen() == {"b": 8}
        bus.lose_everything()
        await bus.publish([])
        assert state.seen() == {}


class Turns:
    """The relay, which is asked for its age once in each turn."""

    def __init__(self) -> None:
        self.count = 0

    @property
    def oldest_pending_s(self) -> float:
        self.count += 1
        return 0.0


class Counting(Republisher):
    """Finds `wrong` records in each check."""

    def __init__(self, bus: MemoryBus) -> None:
        self.turns = Turns()
        edge = SimpleNamespace(metrics=Metrics(), relay=self.turns)
        super().__init__(cast(Edge, cast(Any, edge)), bus, 0.001)
        self.checks = 0
        self.wrong = 0

    async def check(self) -> int:
        self.checks += 1
        return self.wrong


async def test_topics_that_did_not_change_are_seldom_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "_SELDOM", 10)
    async with Counting(MemoryBus()) as republisher:
        await eventually(lambda: republisher.turns.count >= 40)
        # One more where the first turn came before the topics had been read.
        assert 4 <= republisher.checks <= 2 + republisher.turns.count / 10


async def test_topics_are_compared_when_they_change_or_were_lost_or_were_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(publishing, "_SELDOM", 1 << 60)
    bus = MemoryBus()
    async with Counting(bus) as republisher:

        async def settled() -> int:
            turns = republisher.turns.count
            await eventually(lambda: republisher.turns.count >= turns + 3)
            return republisher.checks

        before = await settled()
        assert await settled() == before
        await bus.publish([record("a", 1)])
        changed = await settled()
        assert changed == before + 1
        bus.lose_everything()
        await bus.publish([record("a", 1)])
        lost = await settled()
        assert lost > changed
        republisher.wrong = 1
        await bus.publish([record("a", 2)])
        wrong = await settled()
        assert wrong >= lost + 2
        republisher.wrong = 0
        healed = await settled()
        assert await settled() == healed


class Waiting:
    """A database whose one deployment waits in the outbox."""

    async def __aenter__(self) -> Waiting:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def pending(self, topic: Topic) -> set[str]:
        return {"a"} if topic is DEPLOYMENTS else set()

    async def deployed_revisions(self) -> dict[str, int]:
        return {"a": 1}

    async def last_revisions(self) -> dict[str, int]:
        return {"a": 1}

    async def key_revisions(self) -> dict[str, int]:
        return {}

    trial_revisions = key_revisions


async def test_what_waits_in_the_outbox_is_missing_on_the_broker_and_not_put_there_again() -> None:
    """An alert looks for records that stay missing; a broker that takes none leaves them in the outbox."""
    metrics = Metrics()
    edge = SimpleNamespace(metrics=metrics, relay=Turns(), transaction=Waiting)
    of_deployments = {"topic": DEPLOYMENTS.name}

    def missing() -> float | None:
        return metrics.registry.get_sample_value("headrace_registry_control_missing", of_deployments)

    async with Republisher(cast(Edge, cast(Any, edge)), MemoryBus(), 3600.0):
        await eventually(lambda: missing() is not None)
        assert missing() == 1
    assert not metrics.registry.get_sample_value("headrace_registry_republished_total", of_deployments)


class Keys(Waiting):
    """A database with keys, one transaction after another."""

    count = 250
    #: Keys that each transaction put into the outbox.
    published: list[list[str]] = []  # noqa: RUF012 - set anew by its test

    def __init__(self) -> None:
        self._mine: list[str] = []

    async def __aexit__(self, *_: object) -> None:
        if self._mine:
            self.published.append(self._mine)

    async def pending(self, topic: Topic) -> set[str]:
        return {"k001"} if topic is KEYS else set()

    async def deployed_revisions(self) -> dict[str, int]:
        return {}

    trial_revisions = last_revisions = deployed_revisions

    async def key_revisions(self) -> dict[str, int]:
        return {f"k{number:03}": 1 for number in reversed(range(self.count))}

    async def key(self, key_id: str, *, lock: bool) -> KeyRow:
        assert lock
        row = KeyRow(
            key_id=key_id, name="", key_sha256=b"", scopes=[], rate_per_second=0.0, burst=0, models=[]
        )
        row.revision = 1
        return row

    def publish(self, _topic: Topic, key: str, _value: bytes | None) -> None:
        self._mine.append(key)


async def test_thousands_of_keys_are_published_again_in_few_transactions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A registry on PostgreSQL does 115 transactions a second: 10,000 keys took a minute and a half."""
    published: list[list[str]] = []
    monkeypatch.setattr(Keys, "published", published)
    edge = SimpleNamespace(metrics=Metrics(), relay=Turns(), transaction=Keys)
    async with Republisher(cast(Edge, cast(Any, edge)), MemoryBus(), 3600.0):
        await eventually(lambda: sum(map(len, published)) >= Keys.count - 1)
    assert [len(some) for some in published] == [100, 100, 49]
    in_order = [key for some in published for key in some]
    assert in_order == [f"k{number:03}" for number in range(Keys.count) if number != 1]
