"""Deployments come and go for months: what the router keeps of them goes with them."""

from __future__ import annotations

from typing import Any

from headrace.v1.control_pb2 import LoadedVersion
from headrace.v1.tensor_pb2 import Code

from services.common.telemetry import Tracing
from services.router.dispatch import Dispatcher
from services.router.retry_budget import RetryBudget
from services.router.routing_table import RoutingTable, Target
from services.router.stats import NOWHERE, Stats
from tests.fixtures.router import sole
from tests.unit.router.test_endpoints import Room

TIMES = 20
READY = LoadedVersion.STATE_READY


def parts(room: Room) -> tuple[RoutingTable, Dispatcher]:
    """A table, and who is told of its changes."""
    nothing: Any = None

    def changed() -> None:
        dispatcher.table_changed()

    table = RoutingTable(10.0, changed)
    dispatcher = Dispatcher(
        table,
        room.endpoints,
        nothing,
        Stats(),
        Tracing("router", 0.0, None),
        RetryBudget(0.2, 3),
        max_attempts=3,
        endpoint_wait_s=0.5,
        max_waiting=3,
    )
    return table, dispatcher


def deploy(table: RoutingTable, model: str) -> Target:
    table.apply(model.encode(), sole(model).SerializeToString())
    route = table.find(model)
    assert route is not None
    (target,) = route.targets
    return target


async def test_what_is_served_no_more_is_forgotten() -> None:
    room = Room()
    table, dispatcher = parts(room)
    dispatcher.stats.of(NOWHERE).answered(Code.CODE_NOT_FOUND, 0.1)
    stays = dispatcher.way(deploy(table, "stays"))
    for number in range(TIMES):
        model = f"m{number}"
        dispatcher.way(deploy(table, model)).totals.answered(Code.CODE_OK, 0.1)
        table.apply(model.encode(), None)
    assert set(dispatcher.stats.versions) == {NOWHERE, ("stays", "1")}
    assert [key for key, _ in room.endpoints.groups()] == [("stays", "1")]
    assert dispatcher.stats.of(("stays", "1")) is stays.totals
    assert room.endpoints.group(("stays", "1")) is stays.group


async def test_what_a_worker_still_has_is_kept_until_it_has_it_no_more() -> None:
    room = Room()
    table, dispatcher = parts(room)
    room.beat(versions={("old", "1"): READY})
    room.calls[0].set(usable=True)
    way = dispatcher.way(deploy(table, "old"))
    table.apply(b"old", None)
    assert room.endpoints.group(("old", "1")) is way.group
    assert dispatcher.stats.of(("old", "1")) is way.totals
    room.beat(sequence=2, versions={})
    deploy(table, "new")
    assert room.endpoints.groups() == []
    assert not dispatcher.stats.versions
