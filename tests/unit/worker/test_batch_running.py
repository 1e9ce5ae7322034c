"""Runs of a chunk: in turns, of one size, with a poisoned row found by halving, and stopped between two."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import Cancelled, HeadraceError, InvalidArgument, ResourceExhausted, Unavailable
from services.worker.batch.rows import Group, Inputs, Rows
from services.worker.batch.running import ChunkRun, rows_of_a_run
from services.worker.best_batch import BestBatch
from services.worker.execution import Runner
from services.worker.input_layout import InputLayout
from services.worker.item import Item
from services.worker.tensors import Array
from services.worker.turn import BulkTurn
from tests.fixtures.batch import TABULAR
from tests.fixtures.waiting import PATIENCE_S

INPUTS = Inputs.of(TABULAR)


class Model:
    """y = 2 x in `sizes` runs; `wrong` says of an input whether, and how, the run fails."""

    device = "cpu"
    padding = None

    def __init__(self, wrong: Callable[[Array], Exception | None] = lambda _: None) -> None:
        self.wrong = wrong
        self.sizes: list[int] = []
        self.answer = np.empty((4096, 3), np.float32)

    def run(self, inputs: Mapping[str, Array], _outputs: Sequence[str]) -> dict[str, Array]:
        x = inputs["x"]
        self.sizes.append(len(x))
        error = self.wrong(x)
        if error is not None:
            raise error
        np.multiply(x, 2, out=self.answer[: len(x)])
        return {"y": self.answer[: len(x)]}  # used again by the next run, as a backend may

    def close(self) -> None: ...


class Slot:
    """A version with one slot: gives each turn at once, and counts them."""

    def __init__(self, model: Model) -> None:
        self.runner = Runner(model, TABULAR, InputLayout(TABULAR))
        self.turns = 0
        self.urgent = False
        self.refuse: list[HeadraceError] = []
        self.given_back = asyncio.Event()

    def submit(self, items: Sequence[Item]) -> None:
        (turn,) = items
        assert isinstance(turn, BulkTurn)
        self.turns += 1
        if self.refuse:
            turn.settle(self.refuse.pop())
            return
        loop = asyncio.get_running_loop()
        turn.bulk.begin(
            self.runner, lambda: self.urgent, lambda: loop.call_soon_threadsafe(self.given_back.set)
        )

    def cancel(self, item: Item) -> None:
        item.abandon()


def rows_of(count: int) -> Rows:
    x = np.arange(count * 3, dtype=np.float32).reshape(count, 3)
    return Rows(count, [Group(np.arange(count), {"x": x})])


@pytest.fixture
async def threads() -> AsyncIterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def run_of(
    rows: Rows,
    size: int,
    threads: ThreadPoolExecutor,
    stop: Callable[[], HeadraceError | None] = lambda: None,
) -> ChunkRun:
    return ChunkRun(rows, INPUTS, size, threads, stop)


def answered(run: ChunkRun) -> dict[int, list[float]]:
    return {
        int(place): row
        for answers, _ in run.answers()
        for place, row in zip(answers.places, answers.outputs["y"].tolist(), strict=True)
    }


async def test_all_rows_run_in_one_turn_where_nobody_waits(threads: ThreadPoolExecutor) -> None:
    model, rows = Model(), rows_of(10)
    slot, run = Slot(model), run_of(rows, 4, threads)
    await run.run(lambda: slot, 64)

    assert (slot.turns, model.sizes) == (1, [4, 4, 2])
    assert answered(run) == {i: [6 * i, 6 * i + 2, 6 * i + 4] for i in range(10)}
    ((_, inputs),) = run.answers()
    assert inputs["x"] is rows.groups[0].arrays["x"]


async def test_rows_are_let_go_of_without_a_collection(threads: ThreadPoolExecutor) -> None:
    """Few objects with large arrays hardly ever make Python look for cycles."""
    gc.disable()
    try:
        slot, run = Slot(Model()), run_of(rows_of(10), 4, threads)
        await run.run(lambda: slot, 64)
        left = weakref.ref(run)
        del run
        async with asyncio.timeout(PATIENCE_S):
            while left() is not None:  # noqa: ASYNC110 - the thread is about to end its turn
                await asyncio.sleep(0.01)
    finally:
        gc.enable()


async def test_the_slot_is_given_back_between_runs_where_somebody_waits(threads: ThreadPoolExecutor) -> None:
    model = Model()
    slot, run = Slot(model), run_of(rows_of(10), 4, threads)
    slot.urgent = True
    await run.run(lambda: slot, 64)

    assert (slot.turns, model.sizes) == (3, [4, 4, 2])
    assert len(answered(run)) == 10


async def test_a_poisoned_row_fails_alone(threads: ThreadPoolExecutor) -> None:
    bad = {30.0: InvalidArgument("no such index"), 45.0: RuntimeError("segment")}
    model = Model(lambda x: next((bad[v] for v in x[:, 0].tolist() if v in bad), None))
    slot, run = Slot(model), run_of(rows_of(32), 16, threads)
    await run.run(lambda: slot, 64)

    assert {place: error.message for place, error in run.failures.items()} == {
        10: "no such index", 15: "the model failed on this input",
    }  # fmt: skip
    assert sorted(answered(run)) == [i for i in range(32) if i not in (10, 15)]
    # What is wrong with a row is told at once; what may be the model's trouble was tried three times.
    assert model.sizes.count(1) >= 1 + 3


async def test_what_is_not_the_rows_fault_is_tried_again(threads: ThreadPoolExecutor) -> None:
    trouble: list[Exception] = [Unavailable("device lost"), RuntimeError("once")]
    model = Model(lambda x: trouble.pop(0) if trouble and len(x) == 1 else None)
    slot, run = Slot(model), run_of(rows_of(1), 1, threads)
    slot.refuse = [ResourceExhausted("queue full")]
    await run.run(lambda: slot, 64)

    assert answered(run) == {0: [0, 2, 4]}
    assert run.failures == {}


async def test_a_version_that_goes_on_refusing_ends_the_run(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.worker.batch.running._PAUSE_S", 0.001)
    slot, run = Slot(Model()), run_of(rows_of(1), 1, threads)
    slot.refuse = [ResourceExhausted("queue full")] * 20
    with pytest.raises(ResourceExhausted):
        await run.run(lambda: slot, 64)
    assert slot.turns == 8


async def test_a_cancelled_job_stops_within_one_run_and_keeps_what_is_done(
    threads: ThreadPoolExecutor,
) -> None:
    model = Model()
    cancelled: list[HeadraceError | None] = [None, None, Cancelled("the job was cancelled")]
    slot = Slot(model)
    run = run_of(rows_of(100), 10, threads, lambda: cancelled[min(len(model.sizes), 2)])
    await run.run(lambda: slot, 64)

    assert isinstance(run.stopped, Cancelled)
    assert len(model.sizes) == 2
    assert sorted(answered(run)) == list(range(20))


async def test_a_worker_that_leaves_ends_the_turn_after_its_run(threads: ThreadPoolExecutor) -> None:
    entered, gate = threading.Event(), threading.Event()

    def hold(_x: Array) -> None:
        entered.set()
        assert gate.wait(PATIENCE_S)

    model = Model(hold)
    slot, run = Slot(model), run_of(rows_of(10), 2, threads)
    task = asyncio.create_task(run.run(lambda: slot, 64))
    await asyncio.to_thread(entered.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.set()
    await asyncio.wait_for(slot.given_back.wait(), PATIENCE_S)
    assert len(model.sizes) == 1


async def test_rows_of_other_shapes_are_kept_apart(threads: ThreadPoolExecutor) -> None:
    class Widening(Model):
        def run(self, inputs: Mapping[str, Array], _outputs: Sequence[str]) -> dict[str, Array]:
            return {"y": np.repeat(inputs["x"], len(inputs["x"]), axis=1)}

    slot, run = Slot(Widening()), run_of(rows_of(3), 2, threads)
    await run.run(lambda: slot, 64)

    assert {len(row) for row in answered(run).values()} == {6, 3}
    assert sorted(answered(run)) == [0, 1, 2]


def test_a_run_of_a_job_that_says_nothing_is_short_and_a_power_of_two() -> None:
    assert rows_of_a_run(INPUTS, BestBatch()) == 1024
    assert rows_of_a_run(INPUTS, BestBatch(512, 50_000.0)) == 128
    assert rows_of_a_run(INPUTS, BestBatch(64, 50_000.0)) == 64
    assert rows_of_a_run(INPUTS, BestBatch(4, 1.0)) == 1


@given(
    count=st.integers(1, 60),
    size=st.integers(1, 16),
    bad=st.sets(st.integers(0, 59)),
    urgent=st.lists(st.booleans(), min_size=1, max_size=8),
)
def test_every_row_is_answered_or_fails_by_its_own_doing(
    count: int, size: int, bad: set[int], urgent: list[bool]
) -> None:
    async def scenario() -> None:
        model = Model(lambda x: InvalidArgument("bad") if bad & {int(v) // 3 for v in x[:, 0]} else None)
        with ThreadPoolExecutor(1) as pool:
            slot, run = Slot(model), ChunkRun(rows_of(count), INPUTS, size, pool, lambda: None)
            turns = iter(urgent * 200)

            def find() -> Slot:
                slot.urgent = next(turns)
                return slot

            await run.run(find, 64)
        expected_bad = {place for place in bad if place < count}
        assert set(run.failures) == expected_bad
        found = answered(run)
        assert set(found) == set(range(count)) - expected_bad
        assert all(row == [6 * i, 6 * i + 2, 6 * i + 4] for i, row in found.items())

    asyncio.run(scenario())
