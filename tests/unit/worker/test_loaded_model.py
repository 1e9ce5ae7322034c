"""A version that serves: the log before the replies, late and cancelled members, traces, full logs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import structlog
from headrace.v1.dataplane_pb2 import PredictReply
from headrace.v1.tensor_pb2 import Code
from opentelemetry.trace import SpanContext, TraceFlags

from services.common.clock import ManualClock, SystemClock
from services.common.errors import HeadraceError, Unavailable
from services.common.telemetry import context_from_kafka, setup_tracing, trace_bytes
from services.worker.batch_queue import BatchPolicy
from services.worker.execution import Runner
from services.worker.prediction_log import PayloadPolicy
from services.worker.serving import ServingPolicy
from services.worker.turn import BulkTurn
from tests.fixtures.loaded_model import Rig
from tests.fixtures.waiting import PATIENCE_S, eventually


@pytest.fixture
def rig() -> Iterator[Rig]:
    pool = ThreadPoolExecutor(2)
    made = Rig(pool)
    yield made
    made.backend.gate.set()
    pool.shutdown()


@pytest.mark.parametrize("inline_below", [0.0, 1.0])
async def test_the_record_is_written_before_the_replies_leave(rig: Rig, inline_below: float) -> None:
    rig.inline_below = inline_below
    model = rig.start()
    model.submit([rig.item(i) for i in range(5)])
    assert rig.answers == {}
    await eventually(lambda: len(rig.answers) == 5)
    for number, answer in rig.answers.items():
        assert isinstance(answer, PredictReply)
        assert np.frombuffer(answer.outputs[0].data, np.float32).tolist() == [2 * number]
        assert answer.compute_us >= 1
    assert set(rig.logged_before.values()) == {5}
    assert model.stats.inline_runs == (1 if inline_below else 0)
    assert (model.stats.succeeded, model.stats.rows, model.stats.runs) == (5, 5, 1)


async def test_large_batches_are_run_and_serialised_away_from_the_event_loop(rig: Rig) -> None:
    on_loop: list[bool] = []

    class Noting(SystemClock):
        def unix_us(self) -> int:  # asked once for each batch, as its outcome is decided
            on_loop.append(threading.current_thread() is threading.main_thread())
            return super().unix_us()

    rig.clock = Noting()
    rig.inline_bytes = 1 << 10
    rig.inline_below = 1.0
    model = rig.start(max_rows=1 << 10)
    model.submit([rig.item(1)])
    await eventually(lambda: len(rig.answers) == 1)
    model.submit([rig.item(2, rows=500)])
    await eventually(lambda: len(rig.answers) == 2)
    assert on_loop == [True, False]
    assert rig.logged_before == {1: 1, 2: 2}
    assert rig.codes() == {1: Code.CODE_OK, 2: Code.CODE_OK}
    answer = rig.answers[2]
    assert isinstance(answer, PredictReply)
    assert answer.outputs[0].data == np.full(500, 4, np.float32).tobytes()
    assert rig.log.records[1][1].inputs[0].data == np.full(500, 2, np.float32).tobytes()


async def test_what_is_not_joined_runs_inline_however_large_it_is(rig: Rig) -> None:
    rig.inline_bytes = 1 << 10
    rig.inline_below = 1.0
    model = rig.start(max_rows=1 << 10, apart=True)
    model.submit([rig.item(number, rows=500) for number in (1, 2, 3)])
    await eventually(lambda: len(rig.answers) == 3)
    assert set(rig.codes().values()) == {Code.CODE_OK}
    assert (model.stats.inline_runs, len(rig.log.records)) == (3, 3)


async def test_what_is_not_logged_with_tensors_keeps_no_thread(rig: Rig) -> None:
    on_loop: list[bool] = []

    class Noting(SystemClock):
        def unix_us(self) -> int:
            on_loop.append(threading.current_thread() is threading.main_thread())
            return super().unix_us()

    rig.clock = Noting()
    model = rig.start()
    model.configure(ServingPolicy(BatchPolicy(max_rows=500), PayloadPolicy(request_bytes=1 << 10), 1.0))
    model.submit([rig.item(1, rows=500)])
    await eventually(lambda: len(rig.answers) == 1)
    assert on_loop == [True]
    assert rig.logged_before == {1: 1}
    assert not rig.log.records[0][1].outputs
    assert model.stats.payloads_omitted == 1
    answer = rig.answers[1]
    assert isinstance(answer, PredictReply)
    assert answer.outputs[0].data == np.full(500, 2, np.float32).tobytes()


async def test_requests_of_many_rows_run_together_where_the_version_is_fast(rig: Rig) -> None:
    model = rig.start(max_rows=8, quick_rows=32)
    model.submit([rig.item(i, rows=10) for i in range(4)])
    await eventually(lambda: len(rig.answers) == 4)
    assert [sum(record.rows) for _, record, _ in rig.log.records] == [30, 10]
    # Also after the deployment changed, unless it says how many.
    model.configure(ServingPolicy(BatchPolicy(max_rows=8, grows=True), PayloadPolicy(), 1.0))
    model.submit([rig.item(i, rows=16) for i in (4, 5)])
    await eventually(lambda: len(rig.answers) == 6)
    model.configure(ServingPolicy(BatchPolicy(max_rows=8), PayloadPolicy(), 1.0))
    model.submit([rig.item(i, rows=16) for i in (6, 7)])
    await eventually(lambda: len(rig.answers) == 8)
    assert [sum(record.rows) for _, record, _ in rig.log.records] == [30, 10, 32, 16, 16]


async def test_a_full_log_refuses_instead_of_serving_unlogged(rig: Rig) -> None:
    model = rig.start()
    rig.log.full = True
    model.submit([rig.item(1), rig.item(2)])
    await eventually(lambda: len(rig.answers) == 2)
    assert set(rig.codes().values()) == {Code.CODE_RESOURCE_EXHAUSTED}
    rig.log.full = False
    model.submit([rig.item(3)])
    await eventually(lambda: len(rig.answers) == 3)
    assert rig.codes()[3] == Code.CODE_OK


async def test_late_and_cancelled_members_are_logged_as_such(rig: Rig) -> None:
    model = rig.start()
    rig.backend.gate.clear()
    good, late, cancelled = rig.item(1), rig.item(2, seconds=1.0), rig.item(3)
    model.submit([good, late, cancelled])
    await asyncio.sleep(0.01)
    model.cancel(cancelled)
    waiting = rig.item(4, seconds=0.05)
    model.submit([waiting])
    # The one that waits is told at its deadline, although the model is busy.
    await eventually(lambda: rig.answers)
    assert rig.codes() == {4: Code.CODE_DEADLINE_EXCEEDED}
    await eventually(lambda: SystemClock().monotonic() > late.deadline)
    rig.backend.gate.set()
    await eventually(lambda: len(rig.answers) == 3)
    assert rig.codes() == {1: Code.CODE_OK, 2: Code.CODE_DEADLINE_EXCEEDED, 4: Code.CODE_DEADLINE_EXCEEDED}
    logged = {1: Code.CODE_OK, 2: Code.CODE_DEADLINE_EXCEEDED, 3: Code.CODE_CANCELLED}
    assert rig.logged_codes() == logged
    # Whoever gives the final answer logs what has not run: these two can be told apart.
    ran = {n: answer.compute_us > 0 for n, answer in rig.answers.items() if isinstance(answer, PredictReply)}
    assert ran == {1: True, 2: True}
    assert model.idle


async def test_all_who_drain_it_are_told(rig: Rig) -> None:
    """The one that unloads it, and the worker that leaves meanwhile."""
    rig.backend.gate.clear()
    model = rig.start()
    model.submit([rig.item(1)])
    draining = [asyncio.create_task(model.drain()) for _ in range(2)]
    await eventually(lambda: model.running_rows == 1)
    rig.backend.gate.set()
    await asyncio.wait_for(asyncio.gather(*draining), PATIENCE_S)
    model.submit([rig.item(2)])
    await asyncio.wait_for(model.drain(), PATIENCE_S)
    assert len(rig.answers) == 2


async def test_drain_waits_for_what_runs_and_close_refuses_what_comes(rig: Rig) -> None:
    model = rig.start(max_rows=1)
    rig.backend.gate.clear()
    model.submit([rig.item(1), rig.item(2)])
    draining = asyncio.create_task(model.drain())
    await asyncio.sleep(0.02)
    assert not draining.done()
    rig.backend.gate.set()
    await asyncio.wait_for(draining, PATIENCE_S)
    assert set(rig.codes().values()) == {Code.CODE_OK}
    model.close()
    assert rig.backend.closed
    model.submit([rig.item(3)])
    assert isinstance(rig.answers[3], Unavailable | HeadraceError)
    assert rig.codes()[3] == Code.CODE_UNAVAILABLE


async def test_a_backend_closed_under_a_run_is_closed_when_the_run_ends(rig: Rig) -> None:
    model = rig.start(max_rows=1)
    rig.backend.gate.clear()
    model.submit([rig.item(n) for n in range(1, 5)])
    await eventually(lambda: model.running_rows)
    model.close()
    assert not rig.backend.closed
    assert rig.codes()[4] == Code.CODE_UNAVAILABLE
    rig.backend.gate.set()
    await eventually(lambda: len(rig.answers) == 4)
    assert rig.codes()[1] == Code.CODE_OK
    assert rig.backend.closed
    assert rig.backend.closings == 1


async def test_a_backend_closed_under_a_turn_is_closed_when_the_turn_is_over(rig: Rig) -> None:
    model, held = rig.start(), Held()
    model.submit([BulkTurn(held, 4)])
    await eventually(held.begun.is_set)
    model.close()
    assert not rig.backend.closed
    held.over()
    await eventually(lambda: rig.backend.closed)
    assert rig.backend.closings == 1


class Held:
    """Work of one turn that lasts until it is let go."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.urgent: Callable[[], bool] = lambda: False
        self.over: Callable[[], object] = lambda: None

    def begin(self, _runner: Runner, urgent: Callable[[], bool], over: Callable[[], object]) -> None:
        self.urgent, self.over = urgent, over
        self.begun.set()

    def refused(self, error: HeadraceError) -> None:
        raise error


async def test_on_a_processor_requests_run_beside_a_turn(rig: Rig) -> None:
    model, held = rig.start(), Held()
    model.submit([BulkTurn(held, 4)])
    await eventually(held.begun.is_set)
    assert model.running_rows == 4
    model.submit([rig.item(1)])
    await eventually(lambda: len(rig.answers) == 1)
    assert not held.urgent()
    assert not model.idle
    draining = asyncio.create_task(model.drain())
    await asyncio.sleep(0.02)
    assert not draining.done()
    held.over()
    await asyncio.wait_for(draining, PATIENCE_S)
    assert (model.idle, model.running_rows) == (True, 0)


async def test_on_a_device_a_turn_has_the_slot_for_itself(rig: Rig) -> None:
    rig.backend.device = "cuda:0"
    model, held = rig.start(), Held()
    model.submit([BulkTurn(held, 4)])
    await eventually(held.begun.is_set)
    assert not held.urgent()
    model.submit([rig.item(1)])
    await eventually(held.urgent)
    assert rig.answers == {}
    held.over()
    await eventually(lambda: len(rig.answers) == 1)
    assert model.idle


async def test_a_batch_is_one_span_in_the_trace_of_its_first_sampled_request(rig: Rig) -> None:
    rig.tracing = setup_tracing("worker", None, exporter=rig.spans)
    model = rig.start()
    callers = [SpanContext(100 + i, 7 + i, is_remote=True, trace_flags=TraceFlags(1)) for i in range(2)]
    model.submit([rig.item(1), *[rig.item(2 + i, trace=trace_bytes(c)) for i, c in enumerate(callers)]])
    await eventually(lambda: len(rig.answers) == 3)
    await rig.tracing.close()
    (span,) = rig.spans.get_finished_spans()
    assert span.name == "worker.batch"
    assert span.parent is not None
    assert span.context is not None
    assert (span.context.trace_id, span.parent.span_id) == (100, 7)
    assert [link.context.trace_id for link in span.links] == [101]
    assert span.attributes is not None
    assert span.attributes["headrace.rows"] == 3
    continued = context_from_kafka(rig.log.records[0][2])
    assert continued is not None
    assert (continued.trace_id, continued.span_id) == (100, span.context.span_id)


async def test_without_a_sampled_request_there_is_no_trace(rig: Rig) -> None:
    rig.tracing = setup_tracing("worker", None, exporter=rig.spans)
    model = rig.start()
    model.submit([rig.item(1)])
    await eventually(lambda: len(rig.answers) == 1)
    await rig.tracing.close()
    assert rig.spans.get_finished_spans() == ()
    assert rig.log.records[0][2] == ()


async def test_a_model_that_always_fails_writes_a_traceback_now_and_then(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("the weights are gone")

    monkeypatch.setattr(rig.backend, "run", broken)
    clock = rig.clock = ManualClock()
    clock.advance(SystemClock().monotonic() - clock.monotonic())
    model = rig.start(max_rows=1)
    with structlog.testing.capture_logs() as lines:
        for number in range(20):
            if number == 15:
                clock.advance(11)
            model.submit([rig.item(number)])
            await eventually(lambda asked=number: asked in rig.answers)  # type: ignore[misc]  # its own number
    assert set(rig.codes().values()) == {Code.CODE_INTERNAL}
    assert model.stats.failed == {"CODE_INTERNAL": 20}
    told = [line for line in lines if line["event"] == "model_failed"]
    assert [line["request_id"] for line in told] == [bytes([number] * 16).hex() for number in range(20)]
    assert {line["error"] for line in told} == {"ValueError('the weights are gone')"}
    assert [number for number, line in enumerate(told) if line["exc_info"]] == [0, 15]
