"""The limit on requests in flight, against a platform in simulated time."""

from __future__ import annotations

from services.gateway.admission import Admission


def drive(
    admission: Admission, *, offered: float, capacity: float, seconds: float, start: float = 0.0
) -> tuple[float, float]:
    """Offer `offered` requests a second for `seconds` to a platform that passes on `capacity` a second; gives
    answers a second and the longest delay over the second half."""
    waiting: list[float] = []
    step, answered, longest, now, due, room = 0.01, 0, 0.0, 0.0, 0.0, 0.0
    while now < seconds:
        now += step
        due += offered * step
        while due >= 1:
            due -= 1
            if len(waiting) < admission.limit:
                waiting.append(now)
        room = min(room + capacity * step, capacity * step + 1)
        while waiting and room >= 1:
            room -= 1
            delay = now - waiting.pop(0)
            admission.observe(delay, len(waiting), start + now)
            if now > seconds / 2:
                answered += 1
                longest = max(longest, delay)
        if not waiting:
            room = 0.0
    return answered / (seconds / 2), longest


def test_what_fits_is_never_refused() -> None:
    admission = Admission(0.1, least=256, most=2000)
    rate, longest = drive(admission, offered=9_000, capacity=10_000, seconds=4)
    assert rate > 8_900
    assert longest < 0.05
    assert admission.limit == 2000


def test_twice_the_capacity_is_answered_at_capacity_and_soon() -> None:
    admission = Admission(0.1, least=256)
    rate, longest = drive(admission, offered=20_000, capacity=10_000, seconds=10)
    assert rate > 9_800
    assert longest < 0.3
    assert 256 <= admission.limit < 3_000


def test_a_slow_platform_keeps_a_least_limit_and_recovers() -> None:
    admission = Admission(0.1, least=256)
    drive(admission, offered=5_000, capacity=500, seconds=10)
    assert admission.limit < 400
    drive(admission, offered=100, capacity=500, seconds=4, start=10.0)
    assert admission.limit == 16_000


def test_a_few_slow_answers_and_one_bad_window_change_nothing() -> None:
    admission = Admission(0.1, least=256)
    for number in range(31):
        admission.observe(5.0, 1, float(number))
    assert admission.limit == 16_000
    admission = Admission(0.1, least=256)
    for _ in range(100):
        admission.observe(5.0, 100, 0.05)
    admission.observe(0.001, 100, 1.0)
    admission.observe(0.001, 100, 2.0)
    assert admission.limit == 16_000


def test_without_a_target_nothing_is_judged() -> None:
    admission = Admission(0)
    drive(admission, offered=5_000, capacity=500, seconds=4)
    assert admission.limit == 16_000


def test_a_refusal_says_when_to_come_back() -> None:
    admission = Admission(0.1, least=256)
    assert admission.refusal().retry_after_ms == 1000
    assert admission.refused == 1
