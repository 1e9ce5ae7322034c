"""What is published again, and what is left alone."""

from __future__ import annotations

import pytest
from headrace.v1.control_pb2 import ServingConfig

from services.common.bus import MemoryBus, Record
from services.common.topics import DEPLOYMENTS
from services.registry.publishing import TopicState, outdated
from tests.fixtures.waiting import PATIENCE_S


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
