"""Whoever looks for jobs in the database looks less often when there were none for a while."""

from __future__ import annotations

from services.common.clock import ManualClock
from services.gateway.jobs.pauses import QUIET_AFTER_S, Pauses


def test_pauses_are_longer_after_a_while_without_work_and_short_after_some() -> None:
    clock = ManualClock()
    pauses = Pauses(clock, 2.0)
    assert pauses.next_s() == 2.0
    clock.advance(QUIET_AFTER_S)
    assert pauses.next_s() == 5.0
    pauses.worked()
    assert pauses.next_s() == 2.0
