"""The batcher under random interleavings in simulated time: whatever arrives, is cancelled or fails, every
waiter is settled once, with its own rows, in time or with a refusal."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import DeadlineExceeded, ResourceExhausted
from services.worker.batch_queue import Answer, Batch, BatchPolicy, Item
from services.worker.batcher import Batcher
from services.worker.run_time import RunTime

# The batcher looks for expired requests in steps of 5 ms.
EXPIRY_STEP = 0.005 + 1e-9


class Timer:
    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


class SimulatedTurns:
    """An event loop without a machine: callbacks in order of simulated time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Timer]] = []
        self._numbers = count()

    def time(self) -> float:
        return self.now

    def call_soon(self, callback: Callable[[], object]) -> Timer:
        return self.call_at(self.now, callback)

    def call_at(self, when: float, callback: Callable[[], object]) -> Timer:
        timer = Timer(callback)
        heapq.heappush(self._due, (when, next(self._numbers), timer))
        return timer

    def run_until(self, end: float) -> None:
        while self._due and self._due[0][0] <= end:
            when, _, timer = heapq.heappop(self._due)
            self.now = max(self.now, when)
            if timer.callback is not None:
                timer.callback()
        self.now = max(self.now, end)

    @property
    def pending(self) -> int:
        return sum(timer.callback is not None for _, _, timer in self._due)


class World:
    """A batcher, a model that takes simulated time and echoes its rows, and what became of every request."""

    def __init__(self, policy: BatchPolicy, slots: int, fixed: float, per_row: float) -> None:
        self.turns = SimulatedTurns()
        self.run_time = RunTime()
        self.policy = policy
        self.fixed, self.per_row = fixed, per_row
        self.batcher = Batcher(self.turns, policy, self.run_time, self._run, slots=slots)
        self.items: dict[int, Item] = {}
        self.cancelled: dict[int, float] = {}
        self.answers: dict[int, list[tuple[float, Answer]]] = {}
        self.ran: list[Batch] = []
        self.running = 0
        self.most_running = 0
        self.slots = slots

    def submit(self, sizes: list[int], timeouts: list[float], keys: list[int]) -> None:
        """One frame of requests; each names its rows by its own id."""
        frame = []
        for rows, timeout, key in zip(sizes, timeouts, keys, strict=True):
            identifier = len(self.items)
            data = bytes([identifier % 251]) * rows
            request = PredictRequest(id=identifier)
            shape = ((), ((key,),))
            item = Item(request, rows, shape, (data,), self.turns.now + timeout, self._settle)
            self.items[identifier] = item
            self.answers[identifier] = []
            frame.append(item)
        self.batcher.submit(frame)

    def cancel(self, identifier: int) -> None:
        if identifier in self.items and not self.answers[identifier]:
            self.cancelled.setdefault(identifier, self.turns.now)
            self.batcher.cancel(self.items[identifier])

    def _settle(self, request: PredictRequest, answer: Answer) -> None:
        kept: Answer = answer
        if isinstance(answer, PredictReply):
            kept = PredictReply()
            kept.CopyFrom(answer)
        self.answers[request.id].append((self.turns.now, kept))

    def _run(self, batch: Batch) -> None:
        self.ran.append(batch)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        seconds = self.fixed + self.per_row * batch.rows
        joined = b"".join(item.data[0] for item in batch.items)
        self.turns.call_at(self.turns.now + seconds, lambda: self._finish(batch, joined, seconds))

    def _finish(self, batch: Batch, joined: bytes, seconds: float) -> None:
        self.running -= 1
        self.run_time.observe(batch.rows, seconds, self.turns.now)
        first = 0
        for item in batch.items:
            reply = PredictReply(id=item.request.id)
            reply.outputs.add(data=joined[first : first + item.rows])
            first += item.rows
            item.settle(reply)
        self.batcher.finished()


frames = st.lists(
    st.tuples(
        st.integers(1, 12),  # rows
        st.sampled_from([0.001, 0.004, 0.02, 0.1, 5.0]),  # seconds to the deadline
        st.integers(0, 2),  # merge key
    ),
    min_size=1,
    max_size=12,
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("frame"), frames),
        st.tuples(st.just("cancel"), st.integers(0, 120)),
        st.tuples(st.just("wait"), st.sampled_from([0.0, 0.0005, 0.003, 0.01, 0.2])),
    ),
    min_size=1,
    max_size=30,
)
policies = st.builds(
    BatchPolicy,
    max_rows=st.sampled_from([1, 4, 8, 32]),
    max_delay=st.sampled_from([0.0, 0.002, 0.01]),
    preferred_rows=st.sampled_from([(), (4,), (2, 8)]),
    max_queue_rows=st.sampled_from([16, 64, 1000]),
)


@settings(max_examples=300, deadline=None)
@given(
    policy=policies,
    slots=st.integers(1, 3),
    fixed=st.sampled_from([0.0, 0.001, 0.015]),
    per_row=st.sampled_from([0.0, 0.0002, 0.002]),
    script=steps,
)
def test_every_waiter_is_settled_once_with_its_own_rows(
    policy: BatchPolicy, slots: int, fixed: float, per_row: float, script: list[tuple[str, object]]
) -> None:
    world = World(policy, slots, fixed, per_row)
    for action, value in script:
        if action == "frame":
            assert isinstance(value, list)
            world.submit([v[0] for v in value], [v[1] for v in value], [v[2] for v in value])
        elif action == "cancel":
            assert isinstance(value, int)
            world.cancel(value)
        else:
            assert isinstance(value, float)
            world.turns.run_until(world.turns.now + value)
    world.turns.run_until(world.turns.now + 60.0)

    longest_run = fixed + per_row * max(policy.max_rows, 12)
    for identifier, item in world.items.items():
        answers = world.answers[identifier]
        if identifier in world.cancelled:
            assert answers == [] or answers[0][0] <= world.cancelled[identifier]
            continue
        assert len(answers) == 1
        when, answer = answers[0]
        if isinstance(answer, PredictReply):
            assert answer.outputs[0].data == item.data[0]
        else:
            assert isinstance(answer, DeadlineExceeded | ResourceExhausted)
            if isinstance(answer, DeadlineExceeded):
                assert when <= item.deadline + EXPIRY_STEP
        # Whoever started in time may end late, by one run at most.
        assert when <= item.deadline + longest_run + EXPIRY_STEP
    # Rows in = rows out, each in one batch at most, no batch larger than allowed or of mixed keys.
    batched = [item for batch in world.ran for item in batch.items]
    assert len(batched) == len(set(map(id, batched)))
    for batch in world.ran:
        assert batch.rows == sum(item.rows for item in batch.items)
        assert batch.rows <= policy.max_rows or len(batch.items) == 1
        assert len({item.key for item in batch.items}) == 1
    assert world.most_running <= slots
    assert world.batcher.idle
    assert world.turns.pending == 0


@settings(max_examples=150, deadline=None)
@given(script=st.lists(frames, min_size=1, max_size=10), cancels=st.sets(st.integers(0, 100)))
def test_cancelled_peers_change_nothing_for_the_others(
    script: list[list[tuple[int, float, int]]], cancels: set[int]
) -> None:
    world = World(BatchPolicy(max_rows=8), 1, 0.001, 0.0)
    for frame in script:
        world.submit([f[0] for f in frame], [60.0] * len(frame), [f[2] for f in frame])
        world.turns.run_until(world.turns.now + 0.0015)
        for identifier in cancels:
            world.cancel(identifier)
    world.turns.run_until(world.turns.now + 60.0)
    for identifier, item in world.items.items():
        if identifier in world.cancelled:
            continue
        ((_, answer),) = world.answers[identifier]
        assert isinstance(answer, PredictReply)
        assert answer.outputs[0].data == item.data[0]


@settings(max_examples=150, deadline=None)
@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=60), limit=st.integers(1, 100))
def test_the_queue_never_holds_more_rows_than_allowed(sizes: list[int], limit: int) -> None:
    world = World(BatchPolicy(max_rows=4, max_queue_rows=max(limit, 20)), 1, 0.01, 0.0)
    for rows in sizes:
        world.submit([rows], [60.0], [0])
        assert world.batcher.queued_rows <= max(limit, 20)
    world.turns.run_until(600.0)
    answered = [answers[0][1] for answers in world.answers.values()]
    assert len(answered) == len(sizes)
    assert world.batcher.queued_rows == 0


@settings(max_examples=100, deadline=None)
@given(flood=st.integers(10, 60), key_count=st.integers(1, 3), delay=st.sampled_from([0.0, 0.002]))
def test_no_merge_key_starves(flood: int, key_count: int, delay: float) -> None:
    policy = BatchPolicy(max_rows=4, max_delay=delay, max_queue_rows=100_000)
    world = World(policy, 1, 0.001, 0.0)
    # Far more than the model can take soon, of other keys, and then one of its own.
    for number in range(flood):
        world.submit([4], [1000.0], [1 + number % key_count])
    world.submit([1], [1000.0], [0])
    # Every key has its turn: one run for each of the others, the delay, and its own run.
    world.turns.run_until(world.turns.now + (key_count + 2) * 0.001 + delay + 0.002)
    assert world.answers[flood], "it waited behind every request of the other keys"
