"""What lies unread or set aside, as gauges show it."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Gauge

from services.common.bus import Malformed, MemoryBus, Record, Standing
from services.common.bus.lag_gauges import show_lag
from services.common.errors import Unavailable
from services.common.tasks import running
from services.common.topics import JOBS, VERDICTS, Topic
from tests.fixtures.waiting import eventually


class Shown:
    """The gauges, of a bus that may be away."""

    def __init__(self) -> None:
        self.bus = MemoryBus()
        self.registry = CollectorRegistry()
        self.lag = Gauge("lag", "", ["topic"], registry=self.registry)
        self.dead_letters = Gauge("dead_letters", "", ["topic"], registry=self.registry)

    def said(self, name: str, topic: str) -> float | None:
        return self.registry.get_sample_value(name, {"topic": topic})


async def test_what_waits_and_what_was_set_aside_is_shown_by_topic() -> None:
    shown = Shown()
    groups = [(VERDICTS, "registry"), (JOBS, "gateway")]
    looks = 0

    def wanted() -> Sequence[tuple[Topic, str]]:
        nonlocal looks
        looks += 1
        return groups

    async def handle(records: Sequence[Record]) -> None:
        for index, record in enumerate(records):
            if record.value == b"wrong":
                raise Malformed(index, "wrong")

    await shown.bus.publish([Record(JOBS.name, b"a", b"fine"), Record(JOBS.name, b"a", b"fine")])
    await shown.bus.publish([Record(VERDICTS.name, b"a", value) for value in (b"fine", b"wrong", b"fine")])
    async with (
        shown.bus.consume(VERDICTS, "registry", handle),
        running(show_lag(shown.bus, wanted, shown.lag, shown.dead_letters, 0.01), "lag"),
    ):
        await eventually(lambda: shown.said("dead_letters", VERDICTS.name) == 1)
        await eventually(lambda: shown.said("lag", VERDICTS.name) == 0)
        assert shown.said("lag", JOBS.name) == 2
        assert shown.said("dead_letters", JOBS.name) == 0
        groups.clear()  # nobody reads anything now; what was shown stays
        before = looks
        await eventually(lambda: looks > before + 1)
        assert shown.said("lag", JOBS.name) == 2


async def test_a_broker_that_is_away_ends_nothing() -> None:
    shown = Shown()
    asked = 0

    class Away(MemoryBus):
        async def standings(self, wanted: Sequence[tuple[Topic, str]]) -> list[Standing | None]:
            nonlocal asked
            asked += 1
            if asked < 3:
                raise Unavailable("away") if asked == 1 else RuntimeError("of the client")
            return [None for _ in wanted]

    show = show_lag(Away(), lambda: [(JOBS, "gateway")], shown.lag, shown.dead_letters, 0.01)
    async with running(show, "lag"):
        await eventually(lambda: asked > 3)
    assert shown.said("lag", JOBS.name) is None
    assert shown.said("dead_letters", JOBS.name) == 0
