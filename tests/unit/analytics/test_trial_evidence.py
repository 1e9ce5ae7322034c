"""From what was observed to findings, words, weights and placebos; pure."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from headrace.v1.events_pb2 import ShadowComparison, ShadowVerdict
from headrace.v1.trials_pb2 import Bandit, Evidence, Trial, TrialArm, TrialMetric

from services.analytics.bandit import bounded_weights, recommended_weights
from services.analytics.evidence import Observed, statement_alpha, weigh
from services.analytics.lifts import guarded, lift
from services.analytics.pace import Open, Pace
from services.analytics.placebo import ControlUnits, crossings, halves
from services.analytics.quantile_evidence import QuantileEvidence
from services.analytics.shadow_totals import ShadowTotals
from services.analytics.statistics.stratified import Cells
from services.analytics.trial_queries import Bounded, Counts, Histogram, Tally, Visits
from services.analytics.trial_strata import BAKE, Strata
from services.analytics.trials import Trials
from services.analytics.verdicts import (
    Maxima,
    look_at,
    nothing_observed,
    sample_ratio_log_e,
    settle,
    verdict,
)
from tests.fixtures.trial_units import (
    DECREASE,
    GUARDRAIL,
    INCREASE,
    SUCCESS,
    World,
    findings,
    guardrails,
    observe,
    revenue,
    trial,
)

NONE = Counts(0, 0, 0, 0)


def test_the_error_budget_is_divided_between_all_statements() -> None:
    made = trial([*guardrails(), revenue()])
    assert statement_alpha(made) == pytest.approx(0.05 / 4)
    made.arms.add(name="3", version="3")
    assert statement_alpha(made) == pytest.approx(0.05 / 8)


def test_a_slower_version_is_harmful_and_an_equal_one_safe_by_its_margins() -> None:
    made = trial(guardrails(0.25))
    rng = np.random.default_rng(5)
    slow, _ = findings(made, World(users=0, weights=(0.1, 0.5), slower=3.0).simulate(rng), [3_000, 6_000])
    by_metric = {one.metric: one for one in slow}
    assert by_metric["latency_ms"].finding == Evidence.FINDING_HARMFUL
    assert by_metric["latency_ms:p99"].finding == Evidence.FINDING_HARMFUL
    assert by_metric["error_rate"].finding == Evidence.FINDING_SAFE
    assert by_metric["latency_ms:p99"].low > 0
    assert "worse by more than 0.25 of the control's value" in by_metric["latency_ms"].reason
    same, _ = findings(made, World(users=0, weights=(0.5,), drift=1.0).simulate(rng), [6_000])
    assert {one.metric: one.finding for one in same}["latency_ms"] == Evidence.FINDING_SAFE


def test_a_version_that_breaks_after_everybody_was_seen_is_found() -> None:
    """Thirty users, ten requests each; in the second period all requests to version 2 fail."""
    made = trial([guardrails(0.01)[0]])
    quiet = Tally(np.array([24.0, 6.0]), np.array([0.0, 0.0]))
    broken = Tally(np.array([24.0, 6.0]), np.array([0.0, 6.0]))
    strata = Strata(np.array([[0.8, 0.2]]), 0)
    once = Tally(quiet.units[None, :], quiet.failed[None, :])
    nobody = Tally(np.zeros(2), np.zeros(2))
    units = np.arange(30)
    arms = (units < 6).astype(np.int64)
    cells = Cells(
        units.astype(np.uint64),
        arms,
        np.zeros(30, dtype=np.int64),
        (5.0 * arms).astype(np.float64),
        np.full(30, 10.0),
    )
    calm = Visits(once, [(0, quiet)], nobody, nobody)
    late = Visits(once, [(0, quiet), (0, broken)], nobody, nobody)
    (before,), (after,) = (
        weigh(made, Observed(strata, seen, {"error_rate": cells})) for seen in (calm, late)
    )
    assert before.log_e_harm < 1
    assert after.log_e_harm > math.log(2 / 0.05)


def test_harm_goes_before_everything_and_what_was_found_stays() -> None:
    made = trial([guardrails(0.01)[0]])
    (now,) = weigh(made, nothing_observed(made, ShadowTotals()))
    assert (now.log_e_harm, now.finding) == (0.0, Evidence.FINDING_UNDECIDED)
    place = (now.metric, now.arm)
    threshold = math.log(2 / 0.05)
    expected = {
        Maxima(threshold - 0.01, threshold - 0.01, 0.0): Evidence.FINDING_UNDECIDED,
        Maxima(0.0, threshold, 0.0): Evidence.FINDING_SAFE,
        Maxima(0.0, threshold, threshold): Evidence.FINDING_BETTER,
        Maxima(threshold, threshold, threshold): Evidence.FINDING_HARMFUL,
    }
    for ever, finding in expected.items():
        (settled,) = settle(made, [now], {place: ever})
        assert settled.finding == finding


def test_the_bake_is_held_against_the_controls_last_time_and_says_so() -> None:
    made = trial([guardrails(0.01)[0]])
    made.arms[0].weight, made.arms[1].weight = 0, 10_000
    nobody = Tally(np.zeros((1, 2)), np.zeros((1, 2)))
    before = Tally(np.array([2_000.0, 2_000.0]), np.array([10.0, 10.0]))
    bake = Tally(np.array([0.0, 400.0]), np.array([0.0, 60.0]))
    n = 2_400
    arms = np.repeat([0, 1], [2_000, 400])
    cells = Cells(
        np.arange(n).astype(np.uint64),
        arms,
        np.where(arms == 1, BAKE, 0),
        (np.arange(n) % 40 == 0).astype(np.float64),
        np.ones(n),
    )
    observed = Observed(
        Strata(np.array([[0.5, 0.5]]), 0), Visits(nobody, [], before, bake), {"error_rate": cells}
    )
    look = look_at(made, observed, [NONE, NONE], 1)
    (settled,) = settle(made, look.evidence, {})
    assert settled.finding == Evidence.FINDING_HARMFUL
    assert "not randomised: assumes that the world stays" in settled.method
    assert any("the world stays as it was" in warning for warning in look.warnings)


def rated(control: np.ndarray, treated: np.ndarray, share: float = 0.5) -> Observed:
    """Ratings from 1 to 5 of units that chance divided."""

    def cut(values: np.ndarray) -> float:
        return float(((values - 1) / 4).sum())

    seen = Bounded(
        np.array([[control.size, treated.size]], dtype=float), np.array([[cut(control), cut(treated)]])
    )
    nothing = Tally(np.zeros((1, 2)), np.zeros((1, 2)))
    visits = Visits(nothing, [], Tally(np.zeros(2), np.zeros(2)), Tally(np.zeros(2), np.zeros(2)))
    values = np.concatenate([control, treated])
    cells = Cells(
        units=np.arange(values.size, dtype=np.uint64),
        arms=np.repeat([0, 1], [control.size, treated.size]),
        strata=np.zeros(values.size, dtype=np.int64),
        totals=values,
        counts=np.ones(values.size),
    )
    strata = Strata(np.array([[1 - share, share]]), 0)
    return Observed(strata, visits, {"rating": cells}, bounded={"rating": seen})


def test_values_in_a_known_range_are_weighed_before_there_are_a_hundred_units() -> None:
    metric = TrialMetric(name="rating", role=GUARDRAIL, direction=INCREASE, margin=0.2, low=1.0, high=5.0)
    made = trial([metric])
    worse = rated(np.repeat([5.0, 4.0], 30), np.repeat([1.0, 2.0], 30))
    (found,) = settle(made, weigh(made, worse), {})
    assert found.finding == Evidence.FINDING_HARMFUL
    assert -4 <= found.low <= found.high < -0.2
    assert "first value in 1 to 5" in found.method
    # Without a range there is nothing to say of so few, nor with one that is wider than any float.
    for low, high in ((1.0, 0.0), (-1.7e308, 1.7e308)):
        metric.low, metric.high = low, high
        (found,) = settle(trial([metric]), weigh(trial([metric]), worse), {})
        assert found.finding == Evidence.FINDING_UNDECIDED


def test_equal_ratings_are_condemned_no_more_often_than_promised() -> None:
    """At every look, of 60 trials at 5%."""
    metric = TrialMetric(name="rating", role=GUARDRAIL, direction=INCREASE, low=1.0, high=5.0)
    made = trial([metric])
    rng = np.random.default_rng(8)
    wrong = 0
    for _ in range(60):
        arms, ratings = rng.random(400) < 0.3, rng.integers(1, 6, 400).astype(float)
        ever = 0.0
        for n in range(40, 401, 40):
            part, chosen = ratings[:n], arms[:n]
            (one,) = weigh(made, rated(part[~chosen], part[chosen], 0.3))
            ever = max(ever, one.log_e_harm, one.log_e_better)
        wrong += ever >= math.log(2 / 0.05)
    assert wrong <= 3


def compared(users: list[int], different: list[bool]) -> ShadowTotals:
    """One request after the other, each in a record of its own time."""
    n = len(users)
    verdict = {True: ShadowVerdict.SHADOW_VERDICT_DIFFERENT, False: ShadowVerdict.SHADOW_VERDICT_EQUAL}
    return ShadowTotals.of(
        ShadowComparison(
            request_ids=np.random.default_rng(3).bytes(16 * n),
            unit_hashes=users,
            compared_at_us=1,
            verdicts=[verdict[one] for one in different],
        )
    )


def test_many_requests_of_few_users_condemn_no_shadow() -> None:
    """One user of five meets what the shadow answers differently, 200 times: that is one in five units, and
    no proof against a bound of 10%; 200 users who do are."""
    made = trial([TrialMetric(name="shadow_disagreement", role=GUARDRAIL, direction=DECREASE, margin=0.1)])
    made.shadow_version = "2"

    def judged(totals: ShadowTotals) -> Evidence:
        (found,) = weigh(made, nothing_observed(made, totals))
        return found

    few = judged(compared([1, 2, 3, 4, 5] * 200, [True, False, False, False, False] * 200))
    many = judged(compared(list(range(1, 1001)), [True, False, False, False, False] * 200))
    assert few.mean == many.mean == 0.2
    assert few.units == many.units == 1000
    assert few.log_e_harm < 1
    assert many.log_e_harm > 20
    assert "the first request of each of 5 units" in few.method
    # Who names nobody is taken for one of many, and that is said.
    unnamed = judged(compared([0] * 1000, [True, False, False, False, False] * 200))
    assert unnamed.log_e_harm == pytest.approx(many.log_e_harm)
    assert "1,000 requests name no unit" in unnamed.method
    assert "assumes that requests are independent" in judged(ShadowTotals(requests=9, equal=5)).method


def test_shadows_are_judged_by_what_they_answer_differently_and_fail_alone() -> None:
    metrics = [
        TrialMetric(name=name, role=GUARDRAIL, direction=DECREASE, margin=0.01)
        for name in ("shadow_disagreement", "shadow_error_rate")
    ]
    made = trial(metrics)
    made.shadow_version = "2"
    good = ShadowTotals(requests=3_000, equal=2_999, different=1)
    bad = ShadowTotals(requests=600, equal=540, failed=60, shadow_errors=60, only_shadow_errors=60)
    for totals, finding in ((good, Evidence.FINDING_SAFE), (bad, Evidence.FINDING_HARMFUL)):
        settled = settle(made, weigh(made, nothing_observed(made, totals)), {})
        assert [one.finding for one in settled] == [finding, finding]
    assert "10.00% of 600 requests were answered differently by 2" in settled[0].reason
    made.shadow_version = ""
    assert all(one.units == 0 for one in weigh(made, nothing_observed(made, good)))


def test_a_share_of_the_versions_errors_is_not_taken_for_points() -> None:
    """Half more failures than the version's 1% are 1.5%, not 51%: a shadow that fails in 20% is not safe."""
    metric = TrialMetric(name="shadow_error_rate", role=GUARDRAIL, direction=DECREASE, margin=0.5)
    metric.margin_is_relative = True
    made = trial([metric])
    made.shadow_version = "2"
    worse = ShadowTotals(
        requests=3_000, failed=630, errors=30, shadow_errors=600, only_errors=30, only_shadow_errors=600
    )
    (judged,) = settle(made, weigh(made, nothing_observed(made, worse)), {})
    assert judged.finding == Evidence.FINDING_UNDECIDED
    broken = replace(worse, failed=3_000, shadow_errors=3_000, only_errors=0, only_shadow_errors=2_970)
    (judged,) = settle(made, weigh(made, nothing_observed(made, broken)), {})
    assert judged.finding == Evidence.FINDING_HARMFUL


def test_a_split_that_is_not_as_promised_is_told_and_a_drifting_one_is_not() -> None:
    shares = Strata(np.array([[0.99, 0.01], [0.5, 0.5], [np.nan, 1.0]]), 1)
    fine = Tally(np.array([[990.0, 10], [500, 510], [0, 7]]), np.zeros((3, 2)))
    assert sample_ratio_log_e(shares, fine) < 1
    silent = Tally(np.array([[990.0, 10], [500, 400], [0, 7]]), np.zeros((3, 2)))
    made = trial([guardrails()[0]])
    observed = Observed(shares, Visits(silent, [], fine, fine), {"error_rate": observe_nothing()})
    look = look_at(made, observed, [NONE, NONE], 1)
    said = verdict(made, look, {}, look.ratio_log_e, verdict_id=bytes(16), now_us=2)
    assert said.sample_ratio_mismatch == (look.ratio_log_e >= math.log(1_000))
    worse = Tally(np.array([[990.0, 10], [500, 300], [0, 7]]), np.zeros((3, 2)))
    assert sample_ratio_log_e(shares, worse) > math.log(1_000)
    paused = Strata(np.array([[0.5, 0.5, 0.0]]), 0)
    for units, told in (((500, 490, 0), False), ((500, 300, 0), True)):
        assert (
            sample_ratio_log_e(paused, Tally(np.array([units]) * 1.0, np.zeros((1, 3)))) > math.log(1_000)
        ) == told
    again = verdict(made, look, {}, 20.0, verdict_id=bytes(16), now_us=2)
    assert again.sample_ratio_mismatch
    assert "Sample ratio mismatch" in again.summary


def observe_nothing() -> Cells:
    none = np.zeros(0)
    return Cells(none.astype(np.uint64), none.astype(np.int64), none.astype(np.int64), none, none)


def test_quantiles_of_few_values_have_open_limits() -> None:
    made = trial([guardrails(0.25)[2]])
    few = {(0, arm): Histogram(np.array([10, 20]), np.array([2.0, 1.0])) for arm in (0, 1)}
    nobody = Tally(np.zeros(2), np.zeros(2))
    once = Tally(np.zeros((1, 2)), np.zeros((1, 2)))
    observed = Observed(
        Strata(np.array([[0.5, 0.5]]), 0),
        Visits(once, [], nobody, nobody),
        histograms={"latency_ms:p99": few},
    )
    (one,) = weigh(made, observed)
    assert one.estimate == 0
    assert math.isinf(one.low)
    assert math.isinf(one.high)
    assert one.log_e_harm < 1


def test_weights_move_by_no_more_than_they_may() -> None:
    assert bounded_weights([0.9, 0.05, 0.05], [3_334, 3_333, 3_333], 500, 1_000) == [4_334, 2_833, 2_833]
    assert bounded_weights([1.0, 0.0], [5_000, 5_000], 500, 10_000) == [9_500, 500]
    assert bounded_weights([1.0, 0.0], [10_000, 0], 500, 100) == [9_500, 500]
    assert bounded_weights([0.2, 0.8], [5_000, 5_000], 6_000, 100) == [5_000, 5_000]
    assert sum(bounded_weights([1 / 3] * 3, [10_000, 0, 0], 0, 333)) == 10_000


def test_a_bandit_asks_for_more_of_what_may_be_best_the_same_each_time() -> None:
    rng = np.random.default_rng(6)
    n = 3_000
    arms = np.arange(n) % 3
    values = rng.normal(np.array([0.0, 0.3, 0.3])[arms], 1.0)
    cells = {
        "revenue": Cells(
            np.arange(n).astype(np.uint64), arms, np.zeros(n, dtype=np.int64), values, np.ones(n)
        )
    }
    made = Trial(
        trial_id="exp_1",
        arms=[
            TrialArm(name=name, weight=weight) for name, weight in (("a", 3_334), ("b", 3_333), ("c", 3_333))
        ],
        metrics=[revenue()],
        bandit=Bandit(min_weight=500, max_change=2_000, update_every_s=60),
    )
    weights = recommended_weights(made, cells, 61_000_000)
    assert weights == recommended_weights(made, cells, 119_000_000)
    assert sum(weights) == 10_000
    assert weights[0] == 1_334
    assert min(weights[1:]) > 4_000
    few = {"revenue": cells["revenue"].where(np.arange(n) < 200)}
    assert recommended_weights(made, few, 61_000_000) == []
    equal = {"revenue": replace(cells["revenue"], totals=np.zeros(n))}
    assert recommended_weights(made, equal, 61_000_000) == []  # nobody has bought yet
    made.ClearField("bandit")
    assert recommended_weights(made, cells, 61_000_000) == []


def test_success_by_an_increase_is_better_and_by_a_decrease_harmful() -> None:
    for gain, finding in ((0.3, Evidence.FINDING_BETTER), (-0.3, Evidence.FINDING_HARMFUL)):
        metric = TrialMetric(name="revenue", role=SUCCESS, direction=INCREASE)
        made = trial([metric])
        rng = np.random.default_rng(7)
        arms = np.arange(4_000) % 2
        cells = Cells(
            np.arange(4_000).astype(np.uint64),
            arms,
            np.zeros(4_000, dtype=np.int64),
            rng.normal(2 + gain * arms, 1),
            np.ones(4_000),
        )
        nothing = nothing_observed(made, ShadowTotals())
        observed = Observed(nothing.strata, nothing.visits, {"revenue": cells})
        (settled,) = settle(made, weigh(made, observed), {})
        assert settled.finding == finding


@pytest.mark.parametrize("level", [-100.0, 100.0])
def test_a_relative_margin_is_a_share_of_the_controls_size(level: float) -> None:
    for gap, finding in ((0.0, Evidence.FINDING_SAFE), (-20.0, Evidence.FINDING_HARMFUL)):
        metric = TrialMetric(
            name="profit", role=GUARDRAIL, direction=INCREASE, margin=0.1, margin_is_relative=True
        )
        made = trial([metric])
        arms = np.arange(4_000) % 2
        values = np.random.default_rng(7).normal(level + gap * arms, 20)
        units = np.arange(4_000).astype(np.uint64)
        cells = Cells(units, arms, np.zeros(4_000, dtype=np.int64), values, np.ones(4_000))
        nothing = nothing_observed(made, ShadowTotals())
        observed = Observed(nothing.strata, nothing.visits, {"profit": cells})
        (settled,) = settle(made, weigh(made, observed), {})
        assert settled.finding == finding
        found = lift(cells, alpha=0.05, tuning=5_000)
        assert found is not None
        assert found.relative is not None
        assert found.relative == pytest.approx(gap / 100, abs=0.02)
        low, high = found.fixed.relative_interval or (0.0, 0.0)
        assert low < found.relative < high
        tested = guarded(found, 0.1, relative=True, larger_is_better=True)
        assert tested is not None
        assert (tested.non_inferiority_p < 0.001) == (gap == 0)


def test_a_quantile_may_not_fall_below_nothing() -> None:
    """A relative margin of all of the control's value and more says nothing, and fails nothing."""
    same = Histogram(np.arange(0, 300), np.ones(300))
    evidence = QuantileEvidence([(same, same)], 0.5)
    for bound in (-1.0, -2.5):
        assert [evidence.wealth(bound, side, True) for side in ("above", "below")] == [0.0, 0.0]


def test_the_pace_is_shared_and_a_failing_trial_delays_only_itself() -> None:
    pace = Pace(share=0.1)
    running = Open(1, running=True)
    pace.keep({"a": running, "b": running})
    assert pace.next(0.0)[0] == "a"
    pace.looked("a", 0.0, 0.2)
    assert pace.next(0.0)[0] == "b"
    pace.failed("b", 0.0, 0.2)
    pace.wake("a")
    nobody, wait_s = pace.next(3.9)
    assert nobody is None
    assert wait_s == pytest.approx(0.1)  # 0.2 s of two trials at a tenth of the time
    assert pace.next(4.0)[0] == "a"
    pace.looked("a", 4.0, 0.01)
    assert pace.next(4.0)[0] == "b"
    for _ in range(20):
        pace.failed("b", 4.0, 0.0)
    pace.wake("a")
    assert pace.next(4.5)[0] == "a"
    pace.looked("a", 4.5, 0.01)
    assert pace.next(14.5)[0] == "a"  # nothing new: every ten seconds
    pace.looked("a", 14.5, 0.01)
    assert pace.next(64.1)[0] == "a"
    pace.keep({"b": running})
    assert pace.next(64.1)[0] == "b"


def test_what_is_asked_anew_is_looked_at_at_once_and_what_has_stopped_is_in_nobodys_way() -> None:
    pace = Pace(share=0.1, longest_s=15.0)
    stopped = {f"old-{number}": Open(9, running=False) for number in range(50)}
    pace.keep({"a": Open(1, running=True), **stopped})
    for _ in range(51):
        name, _ = pace.next(0.0)
        assert name is not None
        pace.looked(name, 0.0, 0.1)
        pace.wake(name)
    assert pace.next(0.9)[0] is None
    assert pace.next(1.0)[0] == "a"  # 0.1 s of the one that runs, at a tenth of the time
    pace.looked("a", 1.0, 60.0)
    pace.wake("a")
    assert pace.next(2.0)[0] is None
    pace.keep({"a": Open(2, running=True), **stopped})
    assert pace.next(2.0)[0] == "a"
    pace.looked("a", 2.0, 60.0)
    pace.wake("a")
    due = {pace.next(10.0)[0]}
    assert due <= set(stopped)
    for name in stopped:
        pace.looked(name, 10.0, 0.0)
    assert pace.next(17.0)[0] == "a"  # however much it costs


def test_trials_only_grow_and_a_deleted_one_is_gone() -> None:
    changed: list[str] = []
    trials = Trials()
    trials.watch(changed.append)
    made = trial(guardrails())
    made.revision, made.started_at_us = 3, 1
    trials.apply(b"rol_1", made.SerializeToString())
    trials.apply(b"rol_1", made.SerializeToString())
    older = trial(guardrails())
    older.revision = 2
    older.closed = True
    trials.apply(b"rol_1", older.SerializeToString())
    trials.apply(b"rol_2", b"\xff\xff")
    trials.apply(b"rol_3", made.SerializeToString())
    assert trials.open() == [made]
    assert changed == ["m"]
    made.closed, made.revision = True, 4
    trials.apply(b"rol_1", made.SerializeToString())
    assert trials.open() == []
    assert trials.get("rol_1") == made
    trials.apply(b"rol_1", None)
    assert trials.get("rol_1") is None
    assert trials.ended == {"rol_1"}
    assert changed == ["m", "m", "m"]


def test_halves_of_a_control_are_even_unlike_and_seldom_told_apart() -> None:
    rng = np.random.default_rng(8)
    units = rng.integers(0, 2**63, 4_000).astype(np.uint64)
    signs = halves(units)
    assert np.abs(signs.mean(axis=1)).max() < 0.07
    likeness = np.abs(signs @ signs.T / 4_000 - np.eye(100))
    assert likeness.max() < 0.08
    values = rng.lognormal(0, 1, 4_000)
    failed = rng.random(4_000) < 0.05
    decided, naive = np.zeros(100, dtype=bool), np.zeros(100, dtype=bool)
    for n in range(200, 4_001, 200):
        cells = Cells(
            units[:n], np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64), values[:n], np.ones(n)
        )
        found = crossings(ControlUnits(units[:n], failed[:n], cells))
        decided |= found.decided
        naive |= found.naive
    assert decided.mean() <= 0.05
    assert naive.mean() > 0.25
    # A method that finds differences where there are none is seen.
    rigged = failed | ((signs[0] > 0) & (rng.random(4_000) < 0.2))
    found = crossings(ControlUnits(units, rigged, observe_nothing()))
    assert found.decided[0]


def test_words_are_finite_and_summaries_hold_every_reason() -> None:
    made = trial([*guardrails(0.25), revenue()])
    requests = World(users=300).simulate(np.random.default_rng(9))
    look = look_at(made, observe(made, requests, 3_000), [Counts(2_900, 200, 9, 1), Counts(100, 90, 1, 1)], 7)
    said = verdict(made, look, {}, 0.0, verdict_id=bytes(16), now_us=8)
    assert len(said.evidence) == 4
    assert all(one.reason in said.summary for one in said.evidence)
    assert "nan" not in said.summary
    assert "inf" not in said.summary
    assert json.dumps(said.summary)


def test_words_say_which_numbers_are_versions() -> None:
    """`0.00% of 4 (4 units)` reads as a count."""
    made = trial([guardrails()[0]])
    requests = World(users=300).simulate(np.random.default_rng(9))
    (judged,) = settle(made, weigh(made, observe(made, requests, 600)), {})
    assert " of version 2 (" in judged.reason
    assert " of version 1 (" in judged.reason
    made.kind = Trial.KIND_EXPERIMENT  # whose arms have names of their own
    (judged,) = settle(made, weigh(made, observe(made, requests, 600)), {})
    assert " of 2 (" in judged.reason


def test_halves_without_a_unit_are_not_told_apart() -> None:
    """Warnings are errors here, and numpy warns of divisions by nothing."""
    lonely = ControlUnits(np.array([7], dtype=np.uint64), np.array([True]), observe_nothing())
    found = crossings(lonely)
    assert not found.decided.any()
    assert not found.naive.any()
