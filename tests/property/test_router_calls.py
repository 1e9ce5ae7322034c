"""Calls of the router under random interleavings of simulated time: every waiter is settled once, before its
deadline or with a refusal, and whoever cancels, fails or dies harms nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from unittest.mock import patch

import pytest
from headrace.v1.control_pb2 import (
    Balancing,
    BucketRange,
    Hedging,
    LoadedVersion,
    ServedVersion,
    ServingConfig,
)
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest
from headrace.v1.tensor_pb2 import Code, Tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.clock import ManualClock
from services.common.telemetry import Tracing
from services.router.call import Call
from services.router.dispatch import Dispatcher
from services.router.endpoints import Endpoints
from services.router.retry_budget import RetryBudget
from services.router.routing_table import RoutingTable
from services.router.stats import Stats
from tests.fixtures.router import status

READY = LoadedVersion.STATE_READY
KEYS = {("m", "1"): READY, ("m", "2"): READY}
TIMEOUT_S = 1.0
OnReply = Callable[[PredictReply, bytes | None], None]


class Worker:
    """The calls to one worker: keeps what it is sent until it is told what to do with it."""

    def __init__(self, world: World, on_state: Callable[[bool], None]) -> None:
        self.world = world
        self.usable = True
        self.held: dict[int, tuple[PredictRequest, float, OnReply]] = {}
        self._on_state = on_state
        self._last = 0

    def start(self) -> None:
        pass

    def forward(
        self,
        request: bytes | memoryview,
        more: bytes,
        deadline: float,
        on_reply: OnReply,
        tensors: tuple[bytes | memoryview, ...] = (),
    ) -> int:
        self._last += 1
        item = PredictRequest.FromString(b"".join((*tensors, request, more)))
        assert [(tensor.name, tensor.data) for tensor in item.inputs] == [("x", item.request_id)]
        assert item.timeout_us > 0
        assert self.world.now + item.timeout_us / 1e6 <= deadline + 1e-3
        self.held[self._last] = (item, deadline, on_reply)
        return self._last

    def submit(self, request: PredictRequest, deadline: float | None, on_reply: OnReply) -> int:
        raise AssertionError("only what is mirrored is submitted")

    def cancel(self, local_id: int) -> None:
        assert self.held.pop(local_id, None) is not None, "cancelled twice, or after its answer"

    def answer(self, which: int, code: Code) -> None:
        if not self.held:
            return
        local_id = list(self.held)[which % len(self.held)]
        item, _, on_reply = self.held.pop(local_id)
        reply = PredictReply(id=local_id, code=code, version=item.version, message=item.request_id.hex())
        on_reply(reply, reply.SerializeToString())

    def expire(self) -> None:
        """As the frame channel does it."""
        for local_id, (_, deadline, on_reply) in list(self.held.items()):
            if deadline <= self.world.now and local_id in self.held:
                del self.held[local_id]
                on_reply(PredictReply(id=local_id, code=Code.CODE_DEADLINE_EXCEEDED), None)

    def turn(self, *, usable: bool) -> None:
        if usable == self.usable:
            return
        self.usable = usable
        self._on_state(usable)
        if not usable:
            for local_id, (_, _, on_reply) in list(self.held.items()):
                if local_id in self.held:
                    del self.held[local_id]
                    on_reply(
                        PredictReply(id=local_id, code=Code.CODE_UNAVAILABLE, message="connection lost"), None
                    )

    async def close(self) -> None:
        pass


class Refusals:
    dropped = 0

    def note(self, call: Call, code: Code) -> None:
        assert call.done is False
        assert code


class World:
    """Three workers, one router, callers that count their answers."""

    def __init__(
        self,
        *,
        hedging: bool,
        fallback: bool,
        near: bool = False,
        balancing: Balancing = Balancing.BALANCING_UNSPECIFIED,
    ) -> None:
        """`near`: the last worker is in the router's process."""
        self.now = 1000.0
        self.workers: list[Worker] = []
        self.answers: dict[int, list[PredictReply]] = {}
        self.calls: dict[int, Call] = {}
        self.cancelled: set[int] = set()
        table = RoutingTable(TIMEOUT_S)
        config = ServingConfig(
            model="m",
            revision=1,
            versions=[ServedVersion(version="1"), ServedVersion(version="2")],
            buckets=[BucketRange(first=0, last=9999, version="1")],
            balancing=balancing,
        )
        if hedging:
            config.hedging.CopyFrom(Hedging(quantile=0.5))
        if fallback:
            config.fallback.version = "2"
        table.apply(b"m", config.SerializeToString())
        clock = ManualClock()
        self.endpoints = Endpoints(self._connect, clock, expiry_s=1e9, seed=1)
        for name in ("a", "b", "c"):
            address = "local:c" if near and name == "c" else f"{name}:1"
            self.endpoints.apply(
                name.encode(), status(name, address, KEYS, sent_at_us=clock.unix_us()).SerializeToString()
            )
        self.dispatcher = Dispatcher(
            table,
            self.endpoints,
            Refusals(),  # type: ignore[arg-type]  # a log that writes nothing
            Stats(),
            Tracing("router", 0.0, None),
            RetryBudget(0.2, 3),
            max_attempts=3,
            endpoint_wait_s=0.5,
            max_waiting=3,
        )

    def _connect(self, _address: str, on_state: Callable[[bool], None]) -> Worker:
        self.workers.append(Worker(self, on_state))
        return self.workers[-1]

    # Owner

    def answer(self, call: Call, reply: PredictReply) -> None:
        self.answers.setdefault(call.owner_id, []).append(reply)
        assert call.owner_id not in self.cancelled
        assert self.now <= call.began_at + TIMEOUT_S + 1e-6 or reply.code

    def pass_on(self, call: Call, reply: bytes) -> None:
        self.answer(call, PredictReply.FromString(reply))

    def under_way(self) -> list[PredictRequest]:
        return [item for worker in self.workers for item, _, _ in worker.held.values()]

    def check_versions(self) -> None:
        """No request is asked of two versions at once."""
        under_way = self.under_way()
        versions = {(item.request_id, item.version) for item in under_way}
        assert len(versions) == len({item.request_id for item in under_way})

    # Steps

    def ask(self, which: int, _: int) -> None:
        number = len(self.calls) + 1
        request = PredictRequest(
            id=number,
            model="m",
            version="1" if which % 3 == 0 else "",
            request_id=number.to_bytes(16, "big"),
            timeout_us=int(TIMEOUT_S * 1e6) if which % 2 else 0,
        )
        payload, tensor = request.SerializeToString(), Tensor(name="x", data=request.request_id)
        inputs = PredictRequest(inputs=[tensor]).SerializeToString()
        call = Call(self.dispatcher, request, payload if which % 5 else inputs + payload, self, self.now)
        if which % 5:  # a large one, sent from where it stands
            call.apart = (inputs[:9], memoryview(inputs)[9:])
        self.calls[number] = call
        call.begin()

    def reply(self, which: int, code: int) -> None:
        codes = (
            Code.CODE_OK, Code.CODE_OK, Code.CODE_OK, Code.CODE_UNAVAILABLE, Code.CODE_RESOURCE_EXHAUSTED,
            Code.CODE_INTERNAL, Code.CODE_INVALID_ARGUMENT, Code.CODE_DEADLINE_EXCEEDED,
        )  # fmt: skip
        self.workers[which % 3].answer(which // 3, codes[code % len(codes)])

    def cancel(self, which: int, _: int) -> None:
        if self.calls:
            number = which % len(self.calls) + 1
            if not self.calls[number].done:
                self.cancelled.add(number)
                self.calls[number].cancel()

    def lose(self, which: int, _: int) -> None:
        self.workers[which % 3].turn(usable=False)
        self.dispatcher.waiting.wake()

    def find(self, which: int, _: int) -> None:
        self.workers[which % 3].turn(usable=True)
        self.dispatcher.waiting.wake()

    def late(self, which: int, _: int) -> None:
        """A hedge is due, whatever the timers say."""
        if self.calls:
            self.calls[which % len(self.calls) + 1].hedge(self.now)

    def wait(self, which: int, _: int) -> None:
        self.now += (0.001, 0.05, 0.3)[which % 3]
        for worker in self.workers:
            worker.expire()
        for call in list(self.dispatcher.waiting._calls):
            if self.now >= min(call.deadline, call.began_at + 0.5):
                self.dispatcher.waiting._give_up(call)
        self.endpoints.sweep()


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["ask", "ask", "ask", "reply", "reply", "reply", "cancel", "lose", "find", "late", "wait"]
        ),
        st.integers(0, 60),
        st.integers(0, 7),
    ),
    max_size=80,
)


@given(STEPS, st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_every_caller_is_answered_once(
    steps: list[tuple[str, int, int]], hedging: bool, fallback: bool, near: bool
) -> None:
    asyncio.run(play(steps, hedging=hedging, fallback=fallback, near=near))


async def play(steps: list[tuple[str, int, int]], *, hedging: bool, fallback: bool, near: bool) -> None:
    world = World(hedging=hedging, fallback=fallback, near=near)
    with (
        patch("services.router.call._monotonic", lambda: world.now),
        patch("services.router.waiting.time.monotonic", lambda: world.now),
    ):
        for what, which, more in steps:
            getattr(world, what)(which, more)
            world.check_versions()
        for _ in range(8):
            world.wait(2, 0)
    for number, call in world.calls.items():
        answers = world.answers.get(number, [])
        assert call.done
        assert len(answers) == (0 if number in world.cancelled else 1)
        if answers and answers[0].code == Code.CODE_OK:
            assert answers[0].message == call.request.request_id.hex()  # its own, nobody else's
            assert answers[0].fallback == (answers[0].version == "2")
    dispatcher = world.dispatcher
    assert dispatcher.budget.active == 0
    assert dispatcher.budget.retrying == 0
    assert not len(dispatcher.waiting)
    assert [endpoint.in_flight for endpoint in world.endpoints.all()] == [0, 0, 0]
    assert not any(worker.held for worker in world.workers)
    dispatcher.close()


async def test_a_hedge_that_is_out_decides_before_the_fallback_does() -> None:
    world = World(hedging=True, fallback=True)
    with patch("services.router.call._monotonic", lambda: world.now):
        world.ask(1, 0)
        world.late(0, 0)
        first, second = sorted(
            (worker for worker in world.workers if worker.held),
            key=lambda worker: next(iter(worker.held.values()))[0].attempt,
        )
        first.answer(0, Code.CODE_DEADLINE_EXCEEDED)  # its queue is too long for the deadline
        assert [(item.version, item.attempt) for item in world.under_way()] == [("1", 1)]
        second.answer(0, Code.CODE_OK)
    (answer,) = world.answers[1]
    assert (answer.code, answer.version, answer.fallback) == (Code.CODE_OK, "1", False)
    world.dispatcher.close()


async def test_a_hedge_that_fails_too_leaves_it_to_the_fallback() -> None:
    world = World(hedging=True, fallback=True)
    with patch("services.router.call._monotonic", lambda: world.now):
        world.ask(1, 0)
        world.late(0, 0)
        for worker in [worker for worker in world.workers if worker.held]:
            worker.answer(0, Code.CODE_DEADLINE_EXCEEDED)
        assert [item.version for item in world.under_way()] == ["2"]
        next(worker for worker in world.workers if worker.held).answer(0, Code.CODE_OK)
    (answer,) = world.answers[1]
    assert (answer.code, answer.version, answer.fallback) == (Code.CODE_OK, "2", True)
    world.dispatcher.close()


@pytest.mark.parametrize("told", ["by the caller", "by the router"])
async def test_a_worker_that_never_answers_is_left_out(told: str) -> None:
    """What it did not answer says nothing of how long an answer takes: five in a row are five."""
    world = World(hedging=False, fallback=False, balancing=Balancing.BALANCING_ROUND_ROBIN)
    hangs, *others = world.workers
    kept = 0
    with patch("services.router.call._monotonic", lambda: world.now):
        for number in range(1, 31):
            world.ask(1, 0)
            world.now += 0.01
            for worker in others:
                worker.answer(0, Code.CODE_OK)
            if not hangs.held:
                continue
            kept += 1
            world.now += TIMEOUT_S
            if told == "by the caller":  # whose patience ends first
                world.cancel(number - 1, 0)
            else:
                hangs.expire()
        group = world.dispatcher.endpoints.group(("m", "1"))
        assert {member.worker_id for member in group.members} == {"b", "c"}
        assert (kept, group.outliers.ejected_total) == (5, 1)
    world.dispatcher.close()


async def test_one_burst_that_is_late_leaves_nobody_out() -> None:
    """A worker that has too much to do is not one that hangs."""
    world = World(hedging=False, fallback=False)
    with patch("services.router.call._monotonic", lambda: world.now):
        for _ in range(60):
            world.ask(1, 0)
        world.now += TIMEOUT_S
        for worker in world.workers:
            worker.expire()
    assert len(world.answers) == 60
    assert world.dispatcher.endpoints.group(("m", "1")).outliers.ejected_total == 0
    world.dispatcher.close()
