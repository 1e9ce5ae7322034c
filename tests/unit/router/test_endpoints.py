"""Endpoints come by heartbeats and go by their connection, with calls that are not there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from headrace.v1.control_pb2 import Balancing, LoadedVersion, WorkerStatus
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest

from services.common.assignment import unit_digest
from services.common.clock import ManualClock
from services.router.endpoints import Endpoints
from services.router.group import Endpoint, Group
from services.router.outliers import Verdict
from tests.fixtures.router import status

READY = LoadedVersion.STATE_READY
KEY = ("cancer", "1")
BY_LATENCY = {Balancing.BALANCING_UNSPECIFIED, Balancing.BALANCING_LEAST_LATENCY}


class FakeCalls:
    def __init__(self, address: str, on_state: Callable[[bool], None]) -> None:
        self.address = address
        self.usable = False
        self.started = self.closed = 0
        self._on_state = on_state

    def set(self, usable: bool) -> None:
        self.usable = usable
        self._on_state(usable)

    def start(self) -> None:
        self.started += 1

    def submit(
        self, request: PredictRequest, deadline: float | None, on_reply: Callable[[PredictReply], None]
    ) -> int:
        raise AssertionError("nothing is sent here")

    def forward(
        self,
        request: bytes | memoryview,
        more: bytes,
        deadline: float,
        on_reply: Callable[..., None],
        tensors: tuple[bytes | memoryview, ...] = (),
    ) -> int:
        raise AssertionError("nothing is sent here")

    def cancel(self, local_id: int) -> None:
        raise AssertionError("nothing is sent here")

    async def close(self) -> None:
        self.closed += 1


class Room:
    """Endpoints with fake calls and a clock that stands still."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.calls: list[FakeCalls] = []
        self.changes = 0
        self.endpoints = Endpoints(self._connect, self.clock, expiry_s=3.0, on_change=self._changed, seed=1)

    def _connect(self, address: str, on_state: Callable[[bool], None]) -> FakeCalls:
        self.calls.append(FakeCalls(address, on_state))
        return self.calls[-1]

    def _changed(self) -> None:
        self.changes += 1

    def beat(self, worker: str = "w1", address: str = "h:1", **fields: object) -> None:
        made = status(
            worker,
            address,
            fields.pop("versions", {KEY: READY}),  # type: ignore[arg-type]
            sent_at_us=self.clock.unix_us(),
            **fields,  # type: ignore[arg-type]
        )
        self.endpoints.apply(worker.encode(), made.SerializeToString())

    @property
    def ready(self) -> list[str]:
        return [endpoint.worker_id for endpoint in self.endpoints.group(KEY).members]


@pytest.fixture
async def room() -> Room:
    return Room()


async def test_ready_is_loaded_and_connected(room: Room) -> None:
    room.beat(versions={KEY: LoadedVersion.STATE_LOADING})
    assert room.calls[0].started == 1
    assert room.endpoints.coming(KEY)
    room.calls[0].set(usable=True)
    assert room.ready == []
    room.beat(sequence=2)
    assert room.ready == ["w1"]
    assert not room.endpoints.coming(KEY)
    room.calls[0].set(usable=False)
    assert room.ready == []
    assert room.endpoints.coming(KEY)  # it may be back in a moment


async def test_a_worker_that_loads_on_demand_is_asked_only_where_nobody_is_ready(room: Room) -> None:
    room.beat(versions={KEY: LoadedVersion.STATE_EVICTED})
    room.calls[0].set(usable=True)
    assert room.ready == ["w1"]
    room.beat("w2", "h:2")
    room.calls[1].set(usable=True)
    assert room.ready == ["w2"]
    room.calls[1].set(usable=False)
    assert room.ready == ["w1"]


async def test_older_heartbeats_are_ignored_and_equal_ones_change_nothing(room: Room) -> None:
    room.beat(sequence=5)
    room.calls[0].set(usable=True)
    changes = room.changes
    room.beat(sequence=4, versions={})
    room.beat(sequence=6)
    room.beat(sequence=7)
    room.beat(sequence=6, versions={})
    assert room.ready == ["w1"]
    assert room.changes == changes
    room.endpoints.all()[0].latency.observe(30.0, 0.0)
    room.beat(sequence=1, incarnation="b", versions={})
    assert room.ready == []
    assert room.endpoints.all()[0].latency.last == 0.0  # how slow it was says nothing about the new process


async def test_a_heartbeat_has_only_versions_looked_at_whose_state_changed(room: Room) -> None:
    other = ("cancer", "2")
    room.beat(versions={KEY: READY, other: LoadedVersion.STATE_LOADING})
    room.calls[0].set(usable=True)
    members, waited_for = room.endpoints.group(KEY).members, room.endpoints.group(other)
    room.beat(sequence=2, versions={KEY: READY, other: READY})
    assert room.endpoints.group(KEY).members is members
    assert [endpoint.worker_id for endpoint in waited_for.members] == ["w1"]
    room.beat(sequence=3, versions={KEY: READY})
    assert room.endpoints.group(KEY).members is members
    assert not waited_for.members
    room.beat(sequence=4, versions={KEY: READY}, state=WorkerStatus.STATE_DRAINING)
    assert room.ready == []


async def test_draining_gone_and_removed(room: Room) -> None:
    room.beat()
    room.calls[0].set(usable=True)
    room.beat(sequence=2, state=WorkerStatus.STATE_DRAINING)
    assert room.ready == []
    assert not room.endpoints.coming(KEY)
    room.beat(sequence=3, state=WorkerStatus.STATE_GONE)
    assert room.endpoints.all() == []
    room.beat("w2")
    room.endpoints.apply(b"w2", None)
    await room.endpoints.close()
    assert [calls.closed for calls in room.calls] == [1, 1]
    assert room.endpoints.records() == {}


async def test_a_worker_that_moved_is_connected_anew(room: Room) -> None:
    room.beat()
    room.calls[0].set(usable=True)
    room.beat(address="h:2", incarnation="b")
    room.calls[1].set(usable=True)
    assert room.ready == ["w1"]
    await room.endpoints.close()
    assert room.calls[0].closed == 1


async def test_silence_ends_only_those_that_cannot_be_reached(room: Room) -> None:
    room.beat("dead")
    room.beat("alive")
    room.calls[1].set(usable=True)
    room.clock.advance(2.9)
    room.endpoints.sweep()
    assert len(room.endpoints.all()) == 2
    room.clock.advance(0.2)
    room.endpoints.sweep()
    assert [endpoint.worker_id for endpoint in room.endpoints.all()] == ["alive"]
    room.calls[1].set(usable=False)
    room.endpoints.sweep()
    assert room.endpoints.all() == []
    await room.endpoints.close()


async def test_the_snapshot_brings_back_even_old_workers(room: Room) -> None:
    old = status("w1", "h:1", {KEY: READY}, sent_at_us=1).SerializeToString()
    room.endpoints.apply(b"w1", old)
    assert room.endpoints.all() == []
    room.endpoints.restore(b"w1", old)
    room.endpoints.restore(b"w1", old)
    assert len(room.calls) == 1
    assert room.endpoints.records() == {"w1": old}


async def test_a_record_about_somebody_else_is_refused(room: Room) -> None:
    with pytest.raises(ValueError, match="is about"):
        room.endpoints.apply(b"w9", status("w1", "h:1", {}).SerializeToString())


async def test_picks_among_those_not_tried(room: Room) -> None:
    for name in ("w1", "w2"):
        room.beat(name, address=f"{name}:1")
        room.calls[-1].set(usable=True)
    group = room.endpoints.group(KEY)
    first = group.pick(Balancing.BALANCING_ROUND_ROBIN, 0, 0.0)
    assert first is not None
    second = group.pick(Balancing.BALANCING_ROUND_ROBIN, 0, 0.0, (first,))
    assert second is not None
    assert second is not first
    assert group.pick(Balancing.BALANCING_ROUND_ROBIN, 0, 0.0, (first, second)) is None


async def test_an_ejected_worker_gets_one_probe_and_a_new_incarnation_a_fresh_start(room: Room) -> None:
    for name in ("w1", "w2"):
        room.beat(name, f"{name}:1")
    for calls in room.calls:
        calls.set(True)
    group = room.endpoints.group(KEY)
    sick = group.members[0]
    for _ in range(5):
        group.judge(sick, Verdict.FAILED, 0.0, 0.0)
    assert room.ready == ["w2"]
    room.clock.advance(30)
    room.endpoints.sweep()
    picked = [group.pick(Balancing.BALANCING_ROUND_ROBIN, 0, 30.0) for _ in range(3)]
    assert [endpoint.worker_id for endpoint in picked if endpoint] == ["w1", "w2", "w2"]
    group.judge(sick, Verdict.FAILED, 30.0, 30.0)
    assert room.ready == ["w2"]
    room.beat("w1", "w1:1", incarnation="b")
    assert room.ready == ["w1", "w2"]


@pytest.mark.parametrize(
    ("address", "near"),
    [
        ("local:guest-0", True),
        ("local:8080", False),  # a host of that name
        ("h:1", False),
        ("unix:/run/local:guest-0", False),
    ],
)
async def test_only_a_name_on_this_event_loop_is_near(room: Room, address: str, near: bool) -> None:
    room.beat("w1", address)
    assert [endpoint.near for endpoint in room.endpoints.all()] == [near]


class TestNear:
    """One worker in this process, two elsewhere."""

    LEAST = Balancing.BALANCING_LEAST_LATENCY

    @pytest.fixture
    async def group(self, room: Room) -> Group:
        for name, address in (("w1", "h:1"), ("guest", "local:guest"), ("w2", "unix:/run/w2")):
            room.beat(name, address)
            room.calls[-1].set(usable=True)
        return room.endpoints.group(KEY)

    @staticmethod
    def picked(
        group: Group,
        balancing: Balancing = LEAST,
        tried: tuple[Endpoint, ...] = (),
        *,
        small: bool = True,
        now: float = 0.0,
    ) -> set[str]:
        """Who gets twenty requests of twenty units."""
        hashes = [int.from_bytes(unit_digest(bytes([unit])), "little") for unit in range(20)]
        found = {group.pick(balancing, unit, now, tried, small=small) for unit in hashes}
        return {endpoint.worker_id if endpoint else "nobody" for endpoint in found}

    @staticmethod
    def named(group: Group, name: str) -> Endpoint:
        return next(endpoint for endpoint in group.ready if endpoint.worker_id == name)

    @pytest.mark.parametrize("balancing", sorted(BY_LATENCY))
    async def test_gets_what_is_small_and_nothing_else(self, group: Group, balancing: Balancing) -> None:
        assert self.picked(group, balancing) == {"guest"}
        assert self.picked(group, balancing, small=False) == {"w1", "w2"}

    @pytest.mark.parametrize("balancing", sorted(set(Balancing.values()) - BY_LATENCY))
    async def test_is_left_out_where_the_deployment_says_how_requests_are_spread(
        self, group: Group, balancing: Balancing
    ) -> None:
        assert self.picked(group, balancing) == {"w1", "w2"}

    async def test_what_it_had_goes_to_others(self, group: Group) -> None:
        guest, first = self.named(group, "guest"), self.named(group, "w1")
        assert self.picked(group, tried=(guest,)) == {"w1", "w2"}
        assert self.picked(group, tried=(guest, first)) == {"w2"}
        assert self.picked(group, tried=group.members) == {"nobody"}

    async def test_is_asked_again_for_what_no_other_is_left_for(self, group: Group) -> None:
        others = self.named(group, "w1"), self.named(group, "w2")
        assert self.picked(group, tried=others, small=False) == {"guest"}

    async def test_what_was_tried_elsewhere_stays_elsewhere(self, group: Group) -> None:
        assert self.picked(group, tried=(self.named(group, "w1"),)) == {"w2"}

    @pytest.mark.parametrize("balancing", Balancing.values())
    async def test_gets_everything_where_there_is_no_other(self, room: Room, balancing: Balancing) -> None:
        room.beat("guest", "local:guest")
        room.calls[-1].set(usable=True)
        group = room.endpoints.group(KEY)
        for small in (True, False):
            assert self.picked(group, balancing, small=small) == {"guest"}
        assert self.picked(group, tried=group.members) == {"nobody"}

    async def test_gets_everything_only_until_others_are_there(self, room: Room, group: Group) -> None:
        for calls in (room.calls[0], room.calls[2]):
            calls.set(usable=False)
        assert self.picked(group, small=False) == {"guest"}
        room.calls[0].set(usable=True)
        assert self.picked(group, small=False) == {"w1"}

    async def test_gets_nothing_while_it_is_out_and_one_request_to_come_back(
        self, room: Room, group: Group
    ) -> None:
        guest = self.named(group, "guest")
        for _ in range(5):
            group.judge(guest, Verdict.FAILED, 0.0, 0.0)
        assert self.picked(group) == {"w1", "w2"}
        room.clock.advance(30)
        room.endpoints.sweep()
        probe = group.pick(self.LEAST, 0, 30.0, small=True)
        assert probe is guest
        assert self.picked(group, now=30.0) == {"w1", "w2"}
        group.judge(guest, Verdict.ANSWERED, 30.0, 30.0)
        assert self.picked(group, now=30.0) == {"guest"}

    async def test_others_that_are_out_do_not_send_it_what_is_large(self, group: Group) -> None:
        for _ in range(5):
            group.judge(self.named(group, "w1"), Verdict.FAILED, 0.0, 0.0)
        assert self.picked(group, small=False) == {"w2"}
        assert self.picked(group) == {"guest"}

    @pytest.mark.parametrize(
        "fields",
        [
            {"versions": {KEY: LoadedVersion.STATE_LOADING}},
            {"versions": {KEY: LoadedVersion.STATE_FAILED}},
            {"versions": {KEY: LoadedVersion.STATE_EVICTED}},
            {"versions": {}},
            {"state": WorkerStatus.STATE_DRAINING},
            {"state": WorkerStatus.STATE_GONE},
        ],
    )
    async def test_gets_nothing_that_it_has_not(
        self, room: Room, group: Group, fields: dict[str, object]
    ) -> None:
        room.beat("guest", "local:guest", sequence=2, **fields)
        for small in (True, False):
            assert self.picked(group, small=small) == {"w1", "w2"}
        await room.endpoints.close()

    async def test_is_not_remembered_for_the_next_process(self, room: Room, group: Group) -> None:
        assert self.picked(group) == {"guest"}
        room.beat("guest", "local:guest", sequence=2, versions={})  # a change that would be written
        room.beat("w2", "unix:/run/w2", sequence=2, versions={})
        assert room.endpoints.records().keys() == {"w1", "w2"}
        assert WorkerStatus.FromString(room.endpoints.records()["w2"]).sequence == 2
        assert {endpoint.worker_id for endpoint in room.endpoints.all()} == {"w1", "guest", "w2"}
