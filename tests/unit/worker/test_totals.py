"""What a worker counted of a version, as its heartbeat carries it."""

from __future__ import annotations

from headrace.v1.control_pb2 import ServingTotals

from services.common.clock import ManualClock
from services.worker.stats import ModelStats


def test_nothing_is_said_of_a_version_that_nobody_asked() -> None:
    assert ModelStats().totals(ManualClock()) is None


def test_totals_are_those_of_requests_in_nanoseconds() -> None:
    clock = ManualClock()
    stats = ModelStats(
        succeeded=3, rows=7, ran=4, last_ran_at=clock.monotonic(), runs=2, request_s=4.0, queue_s=1.0,
        compute_input_s=0.25, compute_infer_s=0.5, compute_output_s=0.125,
    )  # fmt: skip
    stats.failed["CODE_INTERNAL"] += 1
    ran_at_us = clock.unix_us()
    clock.advance(5)
    assert stats.totals(clock, refused=2) == ServingTotals(
        succeeded=3, rows=7, failed=3, batches=2, ran=4, request_ns=4 * 10**9, queue_ns=10**9,
        compute_input_ns=25 * 10**7, compute_infer_ns=5 * 10**8, compute_output_ns=125 * 10**6,
        last_ran_at_us=ran_at_us,
    )  # fmt: skip


def test_who_was_refused_only_never_ran() -> None:
    assert ModelStats().totals(ManualClock(), refused=1) == ServingTotals(failed=1)
