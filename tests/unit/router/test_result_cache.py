"""Single flight: whatever happens in whatever order, every request is answered once, with its own answer."""

from __future__ import annotations

import asyncio
from itertools import product
from typing import Any
from zlib import crc32

import pytest
from headrace.v1.control_pb2 import ServedVersion
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest, Priority
from headrace.v1.tensor_pb2 import Code, Tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import HeadraceError
from services.router.result_cache import Flight, ResultCache, _before
from services.router.result_store import Found
from services.router.routing_table import CachePolicy, Target
from services.router.stats import Stats

TARGET = Target("cancer", ServedVersion(version="1", artifact_digest="sha256:1"), 1.0)
POLICY = CachePolicy(1000, 1000)
NORMAL, HIGH, LOW = Priority.PRIORITY_NORMAL, Priority.PRIORITY_HIGH, Priority.PRIORITY_LOW
PRIORITIES = (Priority.PRIORITY_UNSPECIFIED, HIGH, NORMAL, LOW)
#: Equal where nobody is before the other.
CLASS = {HIGH: 0, Priority.PRIORITY_UNSPECIFIED: 1, NORMAL: 1, LOW: 2}


class FakeCall:
    """A call that notes what happens to it."""

    def __init__(self, cache: ResultCache, number: int, priority: Priority = NORMAL) -> None:
        self.cache: Any = cache
        self.request = PredictRequest(inputs=[Tensor(name="x", data=bytes([number]))], priority=priority)
        self.number = number
        self.target = TARGET
        self.flight: Flight | None = None
        self.began_at = 0.0
        self.deadline = 1e12
        self.fell_back = self.done = False
        self.sent = 0
        self.answers: list[PredictReply] = []

    def send(self, now: float) -> None:
        assert not self.done
        self.sent += 1

    def answer_cached(self, reply: PredictReply) -> None:
        self.finish(reply)

    def refuse(self, error: HeadraceError) -> None:
        self.finish(PredictReply(code=error.code))

    def finish(self, reply: PredictReply) -> None:
        """As Call does it."""
        self.done = True
        if self.flight is not None:
            self.cache.settle(self, reply)
        self.answers.append(reply)

    def cancel(self) -> None:
        self.done = True
        if self.flight is not None:
            self.cache.leave(self)


class FakeStore:
    """Answers when told to; an unusable one takes nothing."""

    def __init__(self) -> None:
        self.usable = True
        self.asked: list[tuple[bytes, Found]] = []
        self.kept: dict[bytes, bytes] = {}
        self.ttls: list[int] = []

    def ask(self, key: bytes, found: Found) -> bool:
        if self.usable:
            self.asked.append((key, found))
        return self.usable

    def keep(self, key: bytes, value: bytes, ttl_ms: int) -> None:
        self.kept[key] = value
        self.ttls.append(ttl_ms)


class FakeLog:
    """A log that may be full."""

    def __init__(self) -> None:
        self.full = False
        self.logged = 0

    def append(self, hits: list[Any]) -> bool:
        self.logged += 0 if self.full else len(hits)
        return not self.full


#: What may stand under a key of ours without being from us.
REPLY = PredictReply(message="x").SerializeToString()
SPOILT: tuple[bytes, ...] = (b"", b"\0", b"\0\0\0\0", REPLY, b"\0\0\0\0" + REPLY, b"\xff" * 40)
SPOILT += (crc32(b"\xff" * 4).to_bytes(4, "little") + b"\xff" * 4,)

Step = tuple[str, int]
OFTEN = ("enter", "enter", "enter", "found", "found", "answer", "answer", "turn")
SELDOM = ("lost", "spoilt", "late", "fail", "cancel", "away", "full")
STEPS = st.lists(st.tuples(st.sampled_from(OFTEN + SELDOM), st.integers(0, 7)), max_size=60)


def own_answer(call: FakeCall) -> PredictReply:
    return PredictReply(outputs=[Tensor(name="y", data=bytes([call.number]))])


@given(STEPS)
@settings(max_examples=300)
def test_every_request_is_answered_once_with_its_own_answer(steps: list[Step]) -> None:
    asyncio.run(play(steps))


async def play(steps: list[Step]) -> None:
    scene = Scene()
    for what, which in steps:
        if what == "turn":
            await asyncio.sleep(0)
        else:
            getattr(scene, what)(which)
        scene.check_classes()
    # Everything ends: the store answers, the workers answer.
    while scene.store.asked:
        scene.lost(0)
    for _ in range(4):
        await asyncio.sleep(0)
        while scene.computing:
            scene.answer(0)
    for call in scene.calls:
        assert len(call.answers) == (call not in scene.cancelled)
        assert call.sent <= 1
        for reply in call.answers:
            if reply.code == Code.CODE_OK:
                assert reply.outputs[0].data == bytes([call.number])
    assert len(scene.cache) == 0


class Scene:
    """A cache and what can happen to it; `which` picks among those that it can happen to."""

    def __init__(self) -> None:
        self.store, self.log = FakeStore(), FakeLog()
        self.cache = ResultCache(self.store, self.log, Stats())  # type: ignore[arg-type]  # writes nothing
        self.calls: list[FakeCall] = []
        self.cancelled: set[FakeCall] = set()

    @property
    def computing(self) -> list[FakeCall]:
        return [call for call in self.calls if call.sent and not call.done]

    def enter(self, which: int) -> None:
        self.calls.append(FakeCall(self.cache, which % 2, PRIORITIES[which // 2]))
        self.cache.enter(self.calls[-1], POLICY)  # type: ignore[arg-type]  # a call that is sent nowhere

    def found(self, which: int) -> None:
        if self.store.asked:
            key, found = self.store.asked.pop(which % len(self.store.asked))
            found(self.store.kept.get(key))

    def lost(self, which: int) -> None:
        if self.store.asked:
            self.store.asked.pop(which % len(self.store.asked))[1](None)

    def spoilt(self, which: int) -> None:
        if self.store.asked:
            self.store.asked.pop(which % len(self.store.asked))[1](SPOILT[which % len(SPOILT)])

    def check_classes(self) -> None:
        """Nobody waits for the run of somebody less urgent."""
        for call in self.calls:
            if not call.done and call.flight is not None and not call.flight.asking:
                leader: Any = call.flight.leader
                assert CLASS[call.request.priority] >= CLASS[leader.request.priority]

    def answer(self, which: int) -> None:
        if self.computing:
            call = self.computing[which % len(self.computing)]
            call.finish(own_answer(call))

    def fail(self, which: int) -> None:
        if self.computing:
            self.computing[which % len(self.computing)].finish(PredictReply(code=Code.CODE_INTERNAL))

    def late(self, which: int) -> None:
        if self.computing:
            late = PredictReply(code=Code.CODE_DEADLINE_EXCEEDED)
            self.computing[which % len(self.computing)].finish(late)

    def cancel(self, which: int) -> None:
        waiting = [call for call in self.calls if not call.done]
        if waiting:
            call = waiting[which % len(waiting)]
            self.cancelled.add(call)
            call.cancel()

    def away(self, which: int) -> None:
        self.store.usable = not self.store.usable

    def full(self, which: int) -> None:
        self.log.full = not self.log.full


@pytest.mark.parametrize(("mine", "theirs"), list(product(PRIORITIES, repeat=2)))
def test_only_a_more_urgent_class_comes_before(mine: Priority, theirs: Priority) -> None:
    calls: list[Any] = [FakeCall(None, 1, priority) for priority in (mine, theirs)]  # type: ignore[arg-type]
    assert _before(*calls) == (CLASS[mine] < CLASS[theirs])


async def entered(count: int, *, usable: bool = True, most: int = 1000) -> tuple[Scene, list[FakeCall]]:
    """So many equal calls, of which the first is looked up or, where the store is not usable, computed."""
    scene = Scene()
    scene.store.usable = usable
    calls = [FakeCall(scene.cache, 1) for _ in range(count)]
    for call in calls:
        scene.cache.enter(call, CachePolicy(1000, most))  # type: ignore[arg-type]
    return scene, calls


def sealed(reply: PredictReply) -> bytes:
    kept = reply.SerializeToString()
    return crc32(kept).to_bytes(4, "little") + kept


async def test_a_hit_is_given_to_all_who_wait_and_is_not_kept_again() -> None:
    scene, calls = await entered(4)
    calls[2].answer_cached = None  # type: ignore[assignment,method-assign]  # what fails is this one's alone
    scene.store.asked.pop()[1](sealed(own_answer(calls[0])))
    calls[1].cancel()
    await asyncio.sleep(0)
    assert [len(call.answers) for call in calls] == [1, 0, 0, 1]
    assert scene.log.logged == 3
    assert ([call.sent for call in calls], scene.store.ttls, len(scene.cache)) == ([0] * 4, [], 0)


async def test_what_another_version_answered_is_neither_kept_nor_shared() -> None:
    scene, (first, second) = await entered(2, usable=False)
    first.fell_back = True
    first.finish(own_answer(first))
    assert (scene.store.kept, second.sent, second.answers) == ({}, 1, [])


@pytest.mark.parametrize("room", [0, -1])
async def test_an_answer_as_large_as_may_be_is_kept_and_no_larger_one(room: int) -> None:
    size = own_answer(FakeCall(None, 1)).ByteSize()  # type: ignore[arg-type]
    scene, (call,) = await entered(1, usable=False, most=size + room)
    call.finish(own_answer(call))
    assert len(scene.store.kept) == (room == 0)


async def test_one_that_cannot_be_sent_is_refused_and_no_other() -> None:
    scene, (first, second, third) = await entered(3, usable=False)
    second.send = None  # type: ignore[assignment,method-assign]
    first.finish(PredictReply(code=Code.CODE_INTERNAL))
    assert [reply.code for reply in second.answers] == [Code.CODE_INTERNAL]
    assert (third.sent, third.answers, len(scene.cache)) == (1, [], 0)


async def test_inputs_in_shared_memory_are_neither_looked_up_nor_kept() -> None:
    store = FakeStore()
    cache = ResultCache(store, FakeLog(), Stats())  # type: ignore[arg-type]  # a log that writes nothing
    calls = [FakeCall(cache, 1), FakeCall(cache, 1)]
    for call in calls:
        call.request.inputs[0].ClearField("data")
        call.request.inputs[0].shared_memory.key = "region"
        cache.enter(call, POLICY)  # type: ignore[arg-type]
        call.finish(own_answer(call))
    assert [call.sent for call in calls] == [1, 1]
    assert (store.asked, store.kept, len(cache)) == ([], {}, 0)


async def test_followers_past_their_deadline_are_refused_and_the_first_goes_on() -> None:
    store = FakeStore()
    cache = ResultCache(store, FakeLog(), Stats())  # type: ignore[arg-type]  # a log that writes nothing
    first, second = FakeCall(cache, 1), FakeCall(cache, 1)
    second.deadline = 0.0
    for call in (first, second):
        cache.enter(call, POLICY)  # type: ignore[arg-type]
    await asyncio.sleep(0.01)
    assert [reply.code for reply in second.answers] == [Code.CODE_DEADLINE_EXCEEDED]
    store.asked.pop()[1](None)
    first.finish(own_answer(first))
    assert len(store.kept) == 1
    assert len(cache) == 0


async def test_what_was_computed_together_does_not_expire_together() -> None:
    store = FakeStore()
    store.usable = False
    cache = ResultCache(store, FakeLog(), Stats(), seed=1)  # type: ignore[arg-type]
    for number in range(100):
        call = FakeCall(cache, number)
        cache.enter(call, POLICY)  # type: ignore[arg-type]
        call.finish(own_answer(call))
    assert len(store.ttls) == 100
    assert 0.9 * POLICY.ttl_ms <= min(store.ttls) < 0.92 * POLICY.ttl_ms
    assert 0.98 * POLICY.ttl_ms < max(store.ttls) <= POLICY.ttl_ms


async def test_a_first_that_is_late_leaves_one_of_the_others_to_be_computed() -> None:
    cache = ResultCache(FakeStore(), FakeLog(), Stats())  # type: ignore[arg-type]
    calls = [FakeCall(cache, 1) for _ in range(5)]
    for call in calls:
        cache.enter(call, POLICY)  # type: ignore[arg-type]
    cache._found(calls[0].flight, None)  # type: ignore[arg-type]
    calls[0].finish(PredictReply(code=Code.CODE_DEADLINE_EXCEEDED))
    assert [call.sent for call in calls] == [1, 1, 0, 0, 0]
    calls[1].finish(own_answer(calls[1]))
    await asyncio.sleep(0)
    assert [reply.code for call in calls[1:] for reply in call.answers] == [Code.CODE_OK] * 4
    assert len(cache) == 0


async def test_who_is_more_urgent_waits_for_nobody_who_is_less() -> None:
    store = FakeStore()
    cache = ResultCache(store, FakeLog(), Stats())  # type: ignore[arg-type]
    low, high, normal = FakeCall(cache, 1, LOW), FakeCall(cache, 1, HIGH), FakeCall(cache, 1, NORMAL)
    for call in (low, high):
        cache.enter(call, POLICY)  # type: ignore[arg-type]
    store.asked.pop()[1](None)
    assert [low.sent, high.sent] == [0, 1]  # what is looked up together is computed for the most urgent

    high.cancel()
    assert low.sent == 1
    store.usable = False
    cache.enter(normal, POLICY)  # type: ignore[arg-type]
    assert normal.sent == 1
    other = FakeCall(cache, 1, LOW)
    cache.enter(other, POLICY)  # type: ignore[arg-type]
    low.finish(PredictReply(code=Code.CODE_RESOURCE_EXHAUSTED))
    normal.finish(own_answer(normal))
    await asyncio.sleep(0)
    assert [reply.code for reply in other.answers] == [Code.CODE_OK]
    assert other.sent == 0
    assert len(cache) == 0


async def test_what_is_not_ours_in_the_store_is_a_miss() -> None:
    for value in SPOILT:
        store = FakeStore()
        cache = ResultCache(store, FakeLog(), Stats())  # type: ignore[arg-type]
        call = FakeCall(cache, 1)
        cache.enter(call, POLICY)  # type: ignore[arg-type]
        store.asked.pop()[1](value)
        await asyncio.sleep(0)
        assert (call.sent, call.answers) == (1, [])


async def test_hits_that_cannot_be_logged_for_whatever_reason_are_computed() -> None:
    class BrokenLog:
        def append(self, hits: list[Any]) -> bool:
            raise IndexError(len(hits))

    store = FakeStore()
    cache = ResultCache(store, FakeLog(), Stats())  # type: ignore[arg-type]
    first = FakeCall(cache, 1)
    cache.enter(first, POLICY)  # type: ignore[arg-type]
    store.asked.pop()[1](None)
    first.finish(own_answer(first))
    cache = ResultCache(store, BrokenLog(), Stats())  # type: ignore[arg-type]
    call = FakeCall(cache, 1)
    cache.enter(call, POLICY)  # type: ignore[arg-type]
    (key, found) = store.asked.pop()
    found(store.kept[key])
    await asyncio.sleep(0)
    assert (call.sent, call.answers) == (1, [])
