"""What the router counts of its answers."""

from __future__ import annotations

from headrace.v1.tensor_pb2 import Code

from services.router.stats import LATENCY_S, VersionStats


def test_answers_within_a_millisecond_are_told_apart() -> None:
    """Those of the result cache, and of a worker of the same process."""
    stats = VersionStats()
    for seconds in (0.00005, 0.0002, 0.0004, 0.0009, 60.0):
        stats.answered(Code.CODE_OK, seconds)
    counted = dict(zip((*LATENCY_S, None), stats.latency, strict=True))
    assert [bound for bound, count in counted.items() if count] == [0.0001, 0.00025, 0.0005, 0.001, None]
    assert list(LATENCY_S) == sorted(LATENCY_S)
