"""Pickers: who is chosen, seeded and with time given."""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, field

import pytest
from headrace.v1.control_pb2 import Balancing, WorkerStatus
from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.balancing import (
    ConsistentHash,
    LeastLatency,
    PeakEwma,
    RoundRobin,
    Weighted,
    picker,
    score,
    silence,
    silent,
)
from services.router.group import Endpoint


@dataclass(eq=False)
class Worker:
    worker_id: str
    in_flight: int = 0
    latency: PeakEwma = field(default_factory=PeakEwma)
    busy_since: float = 0.0


def workers(count: int) -> list[Worker]:
    return [Worker(f"w{n}") for n in range(count)]


class TestPeakEwma:
    def test_rises_at_once_and_falls_slowly(self) -> None:
        latency = PeakEwma()
        latency.observe(0.010, 0.0)
        latency.observe(0.100, 1.0)
        assert latency.value(1.0) == pytest.approx(0.100)
        latency.observe(0.010, 2.0)
        assert 0.09 < latency.value(2.0) < 0.1
        for second in range(3, 60):
            latency.observe(0.010, second)
        assert latency.value(59) == pytest.approx(0.010, rel=0.05)

    def test_fades_while_nothing_is_observed(self) -> None:
        latency = PeakEwma()
        latency.observe(1.0, 0.0)
        assert latency.value(10.0) == pytest.approx(0.3679, rel=1e-3)  # 1/e after one time constant
        assert PeakEwma().value(5.0) == 0

    def test_a_fast_failure_looks_slow(self) -> None:
        latency = PeakEwma()
        latency.observe(0.001, 0.0)
        latency.penalise(0.0)
        assert latency.value(0.0) >= 0.05
        latency.penalise(0.0)
        assert latency.value(0.0) == pytest.approx(0.1)

    def test_a_failure_is_heard_when_it_comes(self) -> None:
        latency = PeakEwma()
        latency.observe(0.001, 0.0)
        latency.penalise(100.0)
        assert latency.value(100.0) == latency.usual == 0.05
        assert latency.heard_at == 100.0

    def test_it_is_unanswered_since_the_request_was_sent_or_the_last_answer_came(self) -> None:
        latency = PeakEwma()
        latency.observe(0.01, 100.0)
        latency.late(1.0, 500.0)
        latency.late(1.0, 500.5)
        assert latency.unanswered_since == 499.0
        latency.observe(0.01, 501.0)
        latency.late(5.0, 503.0)
        assert latency.unanswered_since == 501.0

    def test_a_burst_of_failures_is_forgotten_within_two_minutes(self) -> None:
        latency = PeakEwma()
        for _ in range(2000):
            latency.penalise(0.0)
        assert latency.value(120.0) < 1e-4
        latency.observe(30.0, 130.0)
        latency.penalise(130.0)
        assert latency.value(130.0) == pytest.approx(30.0)  # a penalty never makes it look faster


class TestLeastLatency:
    def test_of_two_the_better_always(self) -> None:
        fast, slow = workers(2)
        fast.latency.observe(0.001, 0.0)
        slow.latency.observe(0.1, 0.0)
        pick = LeastLatency(random.Random(1)).pick
        assert {pick([fast, slow], 0, 0.0).worker_id for _ in range(50)} == {"w0"}
        fast.in_flight = 500
        assert {pick([fast, slow], 0, 0.0).worker_id for _ in range(50)} == {"w1"}

    def test_a_new_one_is_tried_once_before_it_is_trusted(self) -> None:
        known, fresh = workers(2)
        known.latency.observe(0.01, 0.0)
        assert score(fresh, 0.0) < score(known, 0.0)

    def test_load_evens_out(self) -> None:
        crowd = workers(10)
        for worker in crowd:
            worker.latency.observe(0.01, 0.0)
        pick = LeastLatency(random.Random(7)).pick
        for _ in range(10_000):
            pick(crowd, 0, 0.0).in_flight += 1
        loads = [worker.in_flight for worker in crowd]
        assert max(loads) - min(loads) < 20  # two choices: log log n, not sqrt


def test_round_robin_takes_turns() -> None:
    pick = RoundRobin().pick
    crowd = workers(3)
    assert Counter(pick(crowd, 0, 0.0).worker_id for _ in range(30)) == {"w0": 10, "w1": 10, "w2": 10}


def test_weighted_goes_by_the_rate_of_answers() -> None:
    fast, slow, fresh = workers(3)
    fast.latency.observe(0.01, 0.0)
    slow.latency.observe(0.03, 0.0)
    pick = Weighted(random.Random(3)).pick
    drawn = Counter(pick([fast, slow, fresh], 0, 0.0).worker_id for _ in range(9000))
    assert drawn["w0"] / drawn["w1"] == pytest.approx(3, rel=0.15)
    assert drawn["w2"] / drawn["w1"] == pytest.approx(1.5, rel=0.15)  # as the mean of those that are known


class TestConsistentHash:
    @settings(max_examples=50, deadline=None)
    @given(st.integers(0, (1 << 64) - 1))
    def test_a_unit_stays_and_only_the_leavers_units_move(self, unit: int) -> None:
        crowd = workers(5)
        ring = ConsistentHash()
        home = ring.pick(crowd, unit, 0.0)
        assert ring.pick(crowd, unit, 0.0) is home
        for leaver in crowd:
            rest = [worker for worker in crowd if worker is not leaver]
            if leaver is not home:
                assert ring.pick(rest, unit, 0.0) is home

    def test_units_spread(self) -> None:
        crowd, rng, ring = workers(4), random.Random(5), ConsistentHash()
        drawn = Counter(ring.pick(crowd, rng.getrandbits(64), 0.0).worker_id for _ in range(4000))
        assert min(drawn.values()) > 500

    def test_a_hot_unit_cannot_bury_one_worker(self) -> None:
        crowd, ring = workers(4), ConsistentHash()
        for _ in range(400):
            ring.pick(crowd, 42, 0.0).in_flight += 1
        assert max(worker.in_flight for worker in crowd) <= 1.25 * 401 / 4 + 1


class TestSilence:
    """A worker that was frozen holds what it was given, and answers nothing."""

    @staticmethod
    def frozen(at: float = 100.0) -> list[Worker]:
        """The first of three, with one request, since `at`; all of them had been answering in 10 ms."""
        crowd = workers(3)
        for worker in crowd:
            worker.latency.observe(0.01, at)
        crowd[0].in_flight, crowd[0].busy_since = 1, at
        return crowd

    @pytest.mark.parametrize("balancing", Balancing.values())
    def test_others_are_asked_meanwhile(self, balancing: Balancing) -> None:
        crowd, chooser, rng = self.frozen(), picker(balancing, random.Random(3)), random.Random(4)
        before = Counter(chooser.pick(crowd, rng.getrandbits(64), 100.0).worker_id for _ in range(300))
        assert before["w0"] > 50 or balancing != Balancing.BALANCING_ROUND_ROBIN
        drawn = Counter(chooser.pick(crowd, rng.getrandbits(64), 102.0).worker_id for _ in range(300))
        assert drawn["w0"] <= 10  # weights leave it a little
        assert drawn["w1"] > 50
        assert drawn["w2"] > 50

    @pytest.mark.parametrize("balancing", Balancing.values())
    def test_where_all_are_silent_they_are_asked_all_the_same(self, balancing: Balancing) -> None:
        crowd, chooser, rng = self.frozen(), picker(balancing, random.Random(3)), random.Random(4)
        for worker in crowd:
            worker.in_flight, worker.busy_since = 1, 100.0
        drawn = Counter(chooser.pick(crowd, rng.getrandbits(64), 110.0).worker_id for _ in range(300))
        assert min(drawn[worker.worker_id] for worker in crowd) > 50

    def test_a_slow_model_is_not_silent(self) -> None:
        slow, other = workers(2)
        slow.latency.observe(3.0, 100.0)
        slow.in_flight, slow.busy_since = 1, 100.0
        pick = RoundRobin().pick
        drawn = Counter(pick([slow, other], 0, 109.0).worker_id for _ in range(10))
        assert drawn == {"w0": 5, "w1": 5}

    @pytest.mark.parametrize(
        "balancing", [Balancing.BALANCING_ROUND_ROBIN, Balancing.BALANCING_CONSISTENT_HASH]
    )
    def test_what_is_given_up_is_no_answer(self, balancing: Balancing) -> None:
        """60 requests a second with deadlines of a second; one of two stops, and answers again after 7 s."""
        frozen, well = (Endpoint(WorkerStatus(worker_id=name, frames_address=f"{name}:1")) for name in "ab")
        pick, rng = picker(balancing, random.Random(3)).pick, random.Random(4)
        given_up_at: deque[float] = deque()
        lost = answered = 0
        for now in (100 + tick / 60 for tick in range(600)):
            while given_up_at and given_up_at[0] <= now:
                given_up_at.popleft()
                frozen.in_flight -= 1
                frozen.latency.late(1.0, now)
            chosen = pick([frozen, well], rng.getrandbits(64), now)
            chosen.take(now)
            if chosen is frozen and 101 <= now < 108:
                given_up_at.append(now + 1)
                lost += 1
            else:
                chosen.in_flight -= 1
                chosen.latency.observe(0.01, now)
                answered += chosen is frozen and now > 108
        assert lost < 30  # half a second's share, and one after the other
        assert answered > 20

    def test_the_hash_ring_goes_on_to_the_next_however_little_the_silent_one_holds(self) -> None:
        crowd, ring, rng = self.frozen(), ConsistentHash(), random.Random(4)
        for other in crowd[1:]:
            other.in_flight, other.busy_since = 3, 102.0
        assert all(ring.pick(crowd, rng.getrandbits(64), 102.0) is not crowd[0] for _ in range(50))

    def test_one_that_is_never_idle_and_answers_is_not_silent(self) -> None:
        (busy,) = workers(1)
        busy.in_flight, busy.busy_since = 1, 100.0
        busy.latency.observe(0.01, 200.0)
        assert silence(busy, 200.1) == pytest.approx(0.1)
        assert not silent(busy, 200.1)

    def test_silence_makes_it_look_as_slow(self) -> None:
        crowd = self.frozen()
        assert score(crowd[0], 103.0) == pytest.approx(3.0 * 2)

    @pytest.mark.parametrize("how", ["answered", "failed"])
    def test_what_was_given_up_is_over_with_the_next_answer(self, how: str) -> None:
        endpoint = Endpoint(WorkerStatus(worker_id="a", frames_address="a:1"))
        endpoint.latency.late(1.0, 100.0)
        if how == "answered":
            endpoint.latency.observe(0.01, 101.0)
        else:
            endpoint.latency.penalise(101.0)
        endpoint.take(500.0)
        endpoint.take(500.3)
        assert silence(endpoint, 500.4) == pytest.approx(0.4)

    def test_what_was_idle_is_not_silent(self) -> None:
        idle, other = workers(2)
        idle.latency.observe(0.01, 100.0)
        idle.in_flight, idle.busy_since = 1, 500.0
        pick = RoundRobin().pick
        assert {pick([other, idle], 0, 500.1).worker_id for _ in range(2)} == {"w0", "w1"}
        assert score(idle, 500.001) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("balancing", "kind"),
    [
        (Balancing.BALANCING_UNSPECIFIED, LeastLatency),
        (Balancing.BALANCING_LEAST_LATENCY, LeastLatency),
        (Balancing.BALANCING_ROUND_ROBIN, RoundRobin),
        (Balancing.BALANCING_WEIGHTED, Weighted),
        (Balancing.BALANCING_CONSISTENT_HASH, ConsistentHash),
    ],
)
def test_what_a_deployment_asks_for(balancing: Balancing, kind: type) -> None:
    assert isinstance(picker(balancing, random.Random(0)), kind)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(Balancing.values()),
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(0, (1 << 64) - 1), st.floats(0, 100)), max_size=40),
)
def test_every_picker_picks_a_candidate_whatever_the_loads(
    balancing: Balancing, count: int, steps: list[tuple[int, float]]
) -> None:
    crowd = workers(count)
    chosen = picker(balancing, random.Random(0))
    now = 0.0
    for unit, seconds in steps:
        now += seconds
        worker = chosen.pick(crowd, unit, now)
        assert worker in crowd
        worker.in_flight += 1
        worker.latency.observe(seconds / 100, now)


def test_an_endpoint_that_holds_requests_does_not_look_faster_by_its_silence() -> None:
    hung, well = workers(2)
    for worker in (hung, well):
        worker.latency.observe(0.002, 0.0)
    hung.in_flight = well.in_flight = 1
    for second in range(1, 61):
        well.latency.observe(0.002, float(second))
    hung.in_flight = 3
    assert score(hung, 60.0) > score(well, 60.0)


def test_an_unknown_endpoint_gets_one_try_at_a_time() -> None:
    unknown, known = workers(2)
    known.latency.observe(0.002, 0.0)
    assert score(unknown, 0.0) < score(known, 0.0)
    unknown.in_flight = 1
    assert score(unknown, 0.0) > score(known, 0.0)
