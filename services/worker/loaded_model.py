"""A model version that is loaded and warm: requests in, batches through the backend, log, replies out."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf
from time import thread_time
from typing import Final

import structlog
from headrace.v1.tensor_pb2 import Code
from opentelemetry.trace import SpanKind

from services.common.errors import DeadlineExceeded, HeadraceError, Internal
from services.common.telemetry import from_trace_bytes, kafka_headers, log_fields
from services.common.telemetry.seldom import Seldom
from services.worker.batcher import Batcher, LoopTurns
from services.worker.best_batch import UNMEASURED, BestBatch
from services.worker.execution import Execution, Runner
from services.worker.handed import HandedOver
from services.worker.item import Batch, Item
from services.worker.outcome import Outcome, outcome_of
from services.worker.prediction_log import PredictionRecords
from services.worker.record_columns import Answered
from services.worker.replies import Replies, error_reply
from services.worker.run_time import RunTime
from services.worker.serving import Serving, ServingPolicy
from services.worker.stats import ModelStats
from services.worker.turn import BulkTurn

log = structlog.get_logger(__name__)

_OK: Final = Code.CODE_OK
_MOST_LINKS: Final = 128
_US_MAX: Final = (1 << 32) - 1
#: Once in so many seconds a run that fails is logged with its traceback.
_TRACEBACK_S: Final = 10.0
_MOST_SAID: Final = 500


class LoadedModel:
    """Serves one model version. All methods belong to the event loop; only runs happen in threads.

    A batch's record is in the prediction log before any of its replies leaves; where the log takes none, its
    members are refused with RESOURCE_EXHAUSTED."""

    def __init__(
        self,
        runner: Runner,
        run_time: RunTime,
        records: PredictionRecords,
        policy: ServingPolicy,
        serving: Serving,
        *,
        version: str,
        slots: int,
        best: BestBatch = UNMEASURED,
    ) -> None:
        self.layout = runner.layout
        self.stats = ModelStats()
        self.run_time = run_time
        #: The batch that jobs are cut for.
        self.best = best
        self.running_rows = 0
        self._last_used = serving.clock.monotonic()
        self._closed = self._closing = False
        self._slow = inf
        self._on_slow: Callable[[], None] = _nothing
        self._runner = runner
        self._records = records
        self._replies = Replies(version, batched=runner.layout.batched)
        self._policy = policy = self._fitted(policy)
        self._serving = serving
        self._tracebacks = Seldom(_TRACEBACK_S)
        self._loop = asyncio.get_running_loop()
        self._beside = runner.backend.device == "cpu"
        self._handed = HandedOver(serving.pool, slots, self._execute, self._ran)
        self._batcher = Batcher(
            LoopTurns(serving.clock),
            policy.batching,
            run_time,
            self._run,
            slots=slots,
            # A device that a turn has is not to be used beside it.
            ahead_below=serving.ahead_below if self._beside else 0.0,
        )

    @property
    def timeout(self) -> float:
        """Seconds that a request has whose caller set no deadline."""
        return self._policy.timeout

    @property
    def queued_rows(self) -> int:
        return self._batcher.queued_rows

    @property
    def queued_rows_of(self) -> list[int]:
        """`queued_rows` by priority class, most urgent first."""
        return self._batcher.queued_rows_of

    @property
    def pending(self) -> int:
        """Requests that wait."""
        return self._batcher.queued

    @property
    def unused(self) -> float:
        """Seconds since it last ran, or was loaded."""
        return self._serving.clock.monotonic() - self._last_used

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return self._batcher.idle

    @property
    def refused(self) -> Counter[str]:
        """Requests that the batcher refused, by the name of the code."""
        return self._batcher.refused

    @property
    def device(self) -> str:
        return self._runner.backend.device

    def configure(self, policy: ServingPolicy) -> None:
        """Serve by `policy` from the next batch on."""
        self._policy = policy = self._fitted(policy)
        self._batcher.policy = policy.batching

    def watch(self, slow: float, on_slow: Callable[[], None]) -> None:
        """Call `on_slow` after each batch that kept the event loop for more than `slow` seconds. They are the
        processor's: that the machine had none to give is no fault of the version's."""
        self._slow, self._on_slow = slow, on_slow

    def _fitted(self, policy: ServingPolicy) -> ServingPolicy:
        batching = policy.batching.grown(self.best.quick_rows)
        return replace(policy, batching=batching.parted() if self.best.apart else batching)

    def submit(self, items: Sequence[Item]) -> None:
        """Queue requests that arrived together; each is settled exactly once, later."""
        self._batcher.submit(items)

    def cancel(self, item: Item) -> None:
        """Nobody waits for `item` any more."""
        self._batcher.cancel(item)

    async def drain(self) -> None:
        """Return once nothing waits and nothing runs."""
        await self._batcher.drain()

    def close(self) -> None:
        """Refuse what waits and what comes, and give the backend's memory back once nothing runs."""
        if self._closed:
            return
        self._closed = self._closing = True
        self._batcher.close()
        self._close_backend()

    def _close_backend(self) -> None:
        """Free its memory once nothing runs any more, where that is wanted."""
        if self._closing and self._batcher.idle:
            self._closing = False
            self._runner.backend.close()

    def _run(self, batch: Batch) -> None:
        serving = self._serving
        started = serving.clock.monotonic()
        self._last_used = started
        self.running_rows += batch.rows
        if isinstance(turn := batch.items[0], BulkTurn):
            self._give(turn)
            return
        # Where a dimension varies, rows say too little about the time that a run takes.
        inline = (
            self.layout.fixed
            and not self._handed.busy
            and self.run_time.estimate(batch.rows) <= serving.inline_below
            and (batch.nbytes() <= serving.inline_bytes or self._policy.batching.apart)
        )
        # `value` is a property written in Python.
        self.stats.batch(batch.rows, batch.reason._value_, inline=inline)
        if not inline:
            self._handed.add(batch)
            return
        _begin(batch.items, started)
        watched = self._slow < inf
        began = thread_time() if watched else 0.0
        execution = self._runner.execute(batch, self._policy.batching.max_rows)
        slow = watched and thread_time() - began > self._slow
        self._finish(batch, execution, None, started)
        if slow:
            self._on_slow()

    def _give(self, turn: BulkTurn) -> None:
        """Lend the slot to `turn` until it is over.

        On a processor requests run beside it: its thread has a low priority, so that a run of it which the
        scheduler puts off would hold up whoever waits for the slot. A device takes one after the other."""
        beside = self._beside

        def over() -> None:
            turn.abandon()
            self.running_rows -= turn.rows
            if beside:
                self._batcher.finished_aside()
            else:
                self._batcher.finished()
            self._close_backend()

        def urgent() -> bool:
            return not beside and self._batcher.queued_rows > 0

        if beside:
            self._batcher.step_aside()
        turn.bulk.begin(self._runner, urgent, lambda: self._loop.call_soon_threadsafe(over))

    def _execute(self, batch: Batch) -> tuple[Execution, Outcome | None, float]:
        """In a thread: run `batch`, and make of it all that would hold up the event loop; the rest is made
        there, while the thread has the next batch."""
        started = self._serving.clock.monotonic()
        _begin(batch.items, started)
        execution = self._runner.execute(batch, self._policy.batching.max_rows)
        if self._is_brief(batch, execution):
            return execution, None, started
        return execution, self._outcome(batch, execution, started), started

    def _is_brief(self, batch: Batch, execution: Execution) -> bool:
        """Whether a single request was run of which no tensors are logged, so that its outcome is made in no
        time."""
        if len(batch.items) > 1 or execution.failures:
            return False
        payloads = self._policy.payloads
        nbytes = sum([len(column.data) for column in execution.parts[0].columns])
        return not payloads.enabled or nbytes > payloads.request_bytes

    def _outcome(self, batch: Batch, execution: Execution, started: float) -> Outcome:
        payloads, clock = self._policy.payloads, self._serving.clock
        return outcome_of(batch, execution, started, self._records, payloads, clock)

    def _ran(self, batch: Batch, result: tuple[Execution, Outcome | None, float] | Exception) -> None:
        if not isinstance(result, Exception):
            execution, outcome, started = result
            self._finish(batch, execution, outcome, started)
            return
        # Else the slot would stay taken and the version answer nothing more.
        internal = Internal("the model could not be run")
        failures: list[tuple[Item, HeadraceError]] = [(item, internal) for item in batch.items]
        execution = Execution([], failures, 0.0, 0.0, 0.0, fault=result)
        self._finish(batch, execution, None, self._serving.clock.monotonic())

    def _finish(self, batch: Batch, execution: Execution, outcome: Outcome | None, started: float) -> None:
        try:
            self._answer(batch, execution, outcome or self._outcome(batch, execution, started))
        except HeadraceError as error:  # the log is full
            self._settle_all(batch.items, error)
        except Exception:  # whatever goes wrong here, every caller gets an answer
            log.exception("answering_failed", model=self._records.key.decode())
            self._settle_all(batch.items, Internal("the answer could not be made"))
        finally:
            self.running_rows -= batch.rows
            self._batcher.finished()
            if self._closing:
                self._close_backend()

    def _answer(self, batch: Batch, execution: Execution, outcome: Outcome) -> None:
        times = outcome.times
        if execution.fault is not None:
            self._tell(batch, execution.fault)
        if not execution.reruns and not execution.failures:
            # Without the way to a thread and back: a fast model must not look slow because it was sent there.
            took = execution.prepare + execution.infer + execution.cut
            self.run_time.observe(batch.rows, took, times.finished)
        headers = self._trace(batch, times, failed=bool(execution.failures))
        # All or none: a batch of which a part were logged would be run, and logged, again elsewhere.
        self._serving.log.append_many(self._records.key, outcome.records, headers)
        self.stats.payloads_omitted += outcome.omitted
        if outcome.codes is None:
            items = batch.items
            replies = self._replies.of_part(execution.parts[0], times, outcome.named)
            # Not zip: that it should be strict takes half a microsecond to say.
            for position in range(len(items)):
                items[position].settle(replies[position])
            self.stats.succeeded += len(batch.items)
            self.stats.rows += batch.rows
        else:
            self._answer_each(execution, times, outcome.codes)
        self._count(batch, execution, times)

    def _tell(self, batch: Batch, fault: BaseException) -> None:
        """Log why a run failed, so that who has its trace finds it. A model that fails on everything would
        write a page of traceback for every batch."""
        traced = self._tracebacks.due(self._serving.clock.monotonic()) is not None
        trace = next((item.request.trace for item in batch.items if item.request.trace), b"")
        log.error(
            "model_failed",
            model=self._records.key.decode(),
            request_id=batch.items[0].request.request_id.hex(),
            requests=len(batch.items),
            error=repr(fault)[:_MOST_SAID],
            exc_info=fault if traced else None,
            **log_fields(from_trace_bytes(trace)),
        )

    def _answer_each(self, execution: Execution, times: Answered, codes: dict[int, Code]) -> None:
        """The same where members failed, were cancelled or came too late."""
        for part in execution.parts:
            replies = self._replies.of_part(part, times)
            for item, reply in zip(part.items, replies, strict=True):
                if codes[id(item)] == _OK:
                    item.settle(reply)
                    self.stats.succeeded += 1
                    self.stats.rows += item.rows
                else:
                    self._fail(item, DeadlineExceeded("the answer came after the deadline"), times.compute_us)
        for item, error in execution.failures:
            self._fail(item, error, times.compute_us)

    def _settle_all(self, items: Sequence[Item], error: HeadraceError) -> None:
        for item in items:
            self._fail(item, error)

    def _fail(self, item: Item, error: HeadraceError, compute_us: int = 0) -> None:
        """A reply with `compute_us` tells the router that the failure ran and is in the log."""
        if not item.done:
            self.stats.failed[Code.Name(error.code)] += 1
            item.settle(error_reply(item.request, error, compute_us).SerializeToString())

    def _count(self, batch: Batch, execution: Execution, times: Answered) -> None:
        stats, count = self.stats, len(batch.items)
        stats.ran += count
        stats.last_ran_at = times.finished
        stats.reruns += execution.reruns
        stats.compute_input_s += execution.prepare * count
        stats.compute_infer_s += execution.infer * count
        stats.compute_output_s += execution.cut * count
        waited = 0.0
        for item in batch.items:
            waited += item.queued_at
        stats.queue_s += times.started * count - waited
        stats.request_s += times.finished * count - waited

    def _trace(self, batch: Batch, times: Answered, *, failed: bool) -> tuple[tuple[str, bytes], ...]:
        """Record the batch as a span, child of its first sampled request and linked to the others; gives the
        headers that let the log's readers continue that trace."""
        traces = [trace for item in batch.items if (trace := item.request.trace)]
        if not traces:
            return ()
        callers = [caller for trace in traces[:_MOST_LINKS] if (caller := from_trace_bytes(trace))]
        if not callers:
            return ()
        tracing = self._serving.tracing
        context = tracing.start(callers[0])
        if context is None:
            return ()
        if tracing.enabled:
            ended = times.unix_us * 1000
            tracing.record_span(
                "worker.batch",
                ended - times.compute_us * 1000,
                ended,
                callers[0],
                callers[1:],
                {
                    "headrace.model_version": self._records.key.decode(),
                    "headrace.requests": len(batch.items),
                    "headrace.rows": batch.rows,
                    "headrace.release": batch.reason.value,
                    "headrace.queue_us": max(0, int((times.started - batch.items[0].queued_at) * 1e6)),
                },
                context=context,
                kind=SpanKind.SERVER,
                error="requests of the batch failed" if failed else None,
            )
        return kafka_headers(context)


def _nothing() -> None:
    """Nobody watches."""


def _begin(items: Sequence[Item], started: float) -> None:
    """Say how long each has waited."""
    queued_at, queue_us = -1.0, 0
    for item in items:
        if item.queued_at != queued_at:  # those that arrived together waited equally long
            queued_at = item.queued_at
            queue_us = min(int((started - queued_at) * 1e6), _US_MAX)
        item.queue_us = queue_us
