"""Requests of a trial in DuckDB: which of them count, in which stratum, with which arm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from headrace.v1.trials_pb2 import Trial, TrialArm, TrialMetric

from services.analytics import novelty, placebo_queries, trial_queries, trial_strata, trial_values
from services.analytics.late_firsts import KnownFirsts
from services.analytics.looking import observe
from services.analytics.shadow_totals import ShadowTotals
from services.analytics.statistics.counts import SAMPLE_RATIO_LEVEL
from services.analytics.trial_strata import BAKE, TrialQuestion
from services.analytics.verdicts import look_at

START_US = 1_750_000_000_000_000
COLUMNS = (
    "unit",
    "version",
    "revision",
    "propensity",
    "at_s",
    "code",
    "latency_ms",
    "experiment",
    "variant",
)


def request(
    unit: int, version: str, revision: int, propensity: float, at_s: float, **given: Any
) -> dict[str, Any]:
    return {
        "unit": unit,
        "version": version,
        "revision": revision,
        "propensity": propensity,
        "at_s": at_s,
        "code": given.get("code", 0),
        "latency_ms": given.get("latency_ms", 2.0),
        "experiment": given.get("experiment"),
        "variant": given.get("variant", version),
        "outcome": given.get("outcome"),
        "observed_at_s": given.get("observed_at_s", at_s),
    }


@pytest.fixture
def connection() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect(":memory:") as made:
        yield made


def log(connection: duckdb.DuckDBPyConnection, requests: list[dict[str, Any]]) -> None:
    """The views of a snapshot that the queries read."""
    ids = [number.to_bytes(16, "big") for number in range(len(requests))]
    column = {name: [one[name] for one in requests] for name in COLUMNS}
    connection.register(
        "online",
        pa.table(
            {
                "request_id": pa.array(ids, pa.binary()),
                "version": column["version"],
                "variant": column["variant"],
                "experiment": pa.array(column["experiment"], pa.string()),
                "unit_hash": pa.array(column["unit"], pa.uint64()),
                "propensity": pa.array(column["propensity"], pa.float32()),
                "revision": pa.array(column["revision"], pa.uint64()),
                "code": pa.array(column["code"], pa.uint8()),
                "failed": [code not in (0, 1) for code in column["code"]],
                "cached": [False] * len(ids),
                "answered_at_us": [START_US + round(at * 1e6) for at in column["at_s"]],
                "latency_us": pa.array([round(1_000 * ms) for ms in column["latency_ms"]], pa.uint32()),
                "rows": [1] * len(ids),
                "predicted": pa.array([None] * len(ids), pa.list_(pa.float64())),
                "predicted_text": pa.array([None] * len(ids), pa.list_(pa.string())),
            }
        ),
    )
    observed = {id_: one["observed_at_s"] for id_, one in zip(ids, requests, strict=True)}
    said = [
        (id_, one["outcome"]) for id_, one in zip(ids, requests, strict=True) if one["outcome"] is not None
    ]
    connection.register(
        "outcomes",
        pa.table(
            {
                "request_id": pa.array([id_ for id_, _ in said], pa.binary()),
                "metric": pa.array(["revenue"] * len(said), pa.string()),
                "row": pa.array([0] * len(said), pa.int64()),
                "number": pa.array([value for _, value in said], pa.float64()),
                "text": pa.array([None] * len(said), pa.string()),
                "observed_at_us": pa.array(
                    [START_US + round(1e6 * observed[id_]) for id_, _ in said], pa.int64()
                ),
            }
        ),
    )


def rollout(canary: int, revision: int) -> TrialQuestion:
    arms = [
        TrialArm(name="1", version="1", weight=10_000 - canary),
        TrialArm(name="2", version="2", weight=canary),
    ]
    return TrialQuestion.of(
        Trial(trial_id="rol_1", kind=Trial.KIND_ROLLOUT, revision=revision, arms=arms, started_at_us=START_US)
    )


#: User 1 stays with version 1, 2 stays with 2, 3 is moved by the second weights; 4 comes late.
WALK = [
    request(1, "1", 1, 0.9, 0, code=13),
    request(2, "2", 1, 0.1, 1),
    request(3, "1", 1, 0.9, 2),
    request(2, "2", 1, 0.1, 3, code=13),
    request(1, "1", 2, 0.5, 400),
    request(3, "2", 2, 0.5, 401, code=13),
    request(3, "2", 2, 0.5, 402),
    request(4, "1", 3, 0.5, 403, code=1),
    request(4, "1", 3, 0.5, 404, latency_ms=8.0),
    request(5, "2", 2, 1.0, 405, code=13),  # asked for by name
    request(3, "2", 2, 0.5, 405.5),
    request(1, "1", 2, 0.5, 405.6),
    request(6, "1", 2, 0.3, 406),  # of weights that nobody has
    request(7, "1", 2, 0.5, 407, experiment="exp_9"),  # of an experiment
    request(8, "1", 1, 0.9, -5, code=13),  # before
]


def test_arms_that_log_nothing_at_all_are_counted_with_no_unit(
    connection: duckdb.DuckDBPyConnection,
) -> None:
    """Two of three variants never answer: their shares are those that are configured, as the third's is."""
    log(connection, [request(unit, "1", 4, 0.5, unit, experiment="exp_1", variant="a") for unit in range(60)])
    arms = [TrialArm(name=name, version=name, weight=weight) for name, weight in (("a", 5_000), ("b", 3_000))]
    trial = Trial(
        trial_id="exp_1",
        kind=Trial.KIND_EXPERIMENT,
        revision=4,
        arms=[*arms, TrialArm(name="c", version="c", weight=2_000)],
        metrics=[TrialMetric(name="error_rate", role=TrialMetric.ROLE_GUARDRAIL)],
        alpha=0.05,
        started_at_us=START_US,
    )
    question = TrialQuestion.of(trial)
    observed, counts = observe(connection, trial, question, ShadowTotals())
    np.testing.assert_allclose(observed.strata.shares, [[0.5, 0.3, 0.2]])
    assert observed.visits.first.units.tolist() == [[60, 0, 0]]
    look = look_at(trial, observed, counts, until_us=START_US)
    assert look.ratio_log_e > np.log(1 / SAMPLE_RATIO_LEVEL)
    assert any("No unit has come to b, whose weight is 30% nor to c" in one for one in look.warnings)


def test_values_in_a_known_range_are_counted_once_a_unit(connection: duckdb.DuckDBPyConnection) -> None:
    """In the stratum of the unit's first value; beyond the range as its end."""
    values = [(1, "1", 1, 0.9, 2.0), (1, "1", 1, 0.9, 5.0), (2, "2", 1, 0.1, 9.0), (3, "1", 1, 0.9, None)]
    values += [(3, "2", 2, 0.5, 4.0), (4, "1", 2, 0.5, -3.0)]
    log(
        connection,
        [
            request(unit, version, revision, chance, at, outcome=value)
            for at, (unit, version, revision, chance, value) in enumerate(values)
        ],
    )
    strata = trial_strata.open_trial(connection, rollout(5_000, 2))
    metric = TrialMetric(name="revenue", low=1.0, high=5.0)
    found = trial_queries.bounded(connection, metric, strata)
    assert found.units.tolist() == [[1, 1], [1, 1]]
    assert found.shares.tolist() == [[0.25, 1.0], [0.0, 0.75]]
    assert found.outside == 2
    for other in ({"missing_is_zero": True}, {"quantile": 0.5}, {"high": 1.0}, {"name": "error_rate"}):
        changed = TrialMetric()
        changed.CopyFrom(metric)
        changed.MergeFrom(TrialMetric(**other))
        assert not trial_values.is_bounded(changed)
    assert trial_values.is_bounded(metric)


def test_what_an_arm_of_other_weights_had_is_not_made_up(connection: duckdb.DuckDBPyConnection) -> None:
    log(connection, [request(unit, "1", 3, 0.4, unit, experiment="exp_1", variant="a") for unit in range(9)])
    question = TrialQuestion(
        "exp_1", 4, False, ("a", "b", "c"), ("1", "2", "3"), (5_000, 3_000, 2_000), START_US
    )
    strata = trial_strata.open_trial(connection, question)
    assert np.isnan(strata.shares).tolist() == [[False, True, True]]


def test_strata_are_weights_and_a_moved_unit_counts_in_each(connection: duckdb.DuckDBPyConnection) -> None:
    log(connection, WALK)
    strata = trial_strata.open_trial(connection, rollout(5_000, 2))
    np.testing.assert_allclose(strata.shares, [[0.9, 0.1], [0.5, 0.5]])
    np.testing.assert_allclose(strata.share(1), [0.1, 0.5])
    assert strata.last == 1  # revision 3 has the weights of 2

    seen = trial_queries.visits(connection, strata)
    # Every user once, by its first request: 4's first was cancelled, so its second counts.
    assert seen.first.units.tolist() == [[2, 1], [1, 0]]
    assert seen.first.failed.tolist() == [[1, 0], [0, 0]]
    # After five minutes and under new weights everybody counts anew.
    assert [stratum for stratum, _ in seen.periods] == [0, 1]
    assert seen.periods[1][1].units.tolist() == [2, 1]
    assert seen.periods[1][1].failed.tolist() == [0, 1]

    found = trial_queries.cells(connection, TrialMetric(name="error_rate"))
    by_place = {
        (unit, stratum, arm): (total, count)
        for unit, stratum, arm, total, count in zip(
            found.units.tolist(),
            found.strata.tolist(),
            found.arms.tolist(),
            found.totals.tolist(),
            found.counts.tolist(),
            strict=True,
        )
    }
    assert by_place == {
        (1, 0, 0): (1, 1),
        (2, 0, 1): (1, 2),
        (3, 0, 0): (0, 1),
        (1, 1, 0): (0, 2),
        (3, 1, 1): (1, 3),
        (4, 1, 0): (0, 1),
    }
    counted = trial_queries.counts(connection, rollout(5_000, 2))
    assert [(one.requests, one.units, one.errors) for one in counted] == [(6, 4, 1), (6, 3, 3)]
    assert [one.requests_since for one in counted] == [4, 4]


def test_all_traffic_on_one_arm_is_held_against_the_controls_last_time(
    connection: duckdb.DuckDBPyConnection,
) -> None:
    log(connection, [*WALK, request(1, "2", 4, 1.0, 900), request(9, "2", 4, 1.0, 901, code=13)])
    strata = trial_strata.open_trial(connection, rollout(10_000, 4))
    seen = trial_queries.visits(connection, strata)
    assert (seen.bake.units[1], seen.bake.failed[1]) == (2, 1)
    assert (seen.before.units[0], seen.before.failed[0]) == (2, 0)
    assert seen.first.units.sum() == 4
    found = trial_queries.cells(connection, TrialMetric(name="latency_ms"))
    assert np.sum(found.strata == BAKE) == 1


def test_blue_green_has_no_weights_to_learn_from(connection: duckdb.DuckDBPyConnection) -> None:
    log(
        connection,
        [request(1, "1", 1, 1.0, 0), request(2, "1", 1, 1.0, 1), request(1, "2", 2, 1.0, 9, code=13)],
    )
    strata = trial_strata.open_trial(connection, rollout(10_000, 2))
    assert strata.last == -1
    seen = trial_queries.visits(connection, strata)
    assert (seen.before.units[0], seen.bake.units[1], seen.bake.failed[1]) == (2, 1, 1)
    assert seen.first.units.size == 0


def test_experiments_are_told_by_id_and_variant_and_outcomes_join(
    connection: duckdb.DuckDBPyConnection,
) -> None:
    mine = {"experiment": "exp_1"}
    log(
        connection,
        [
            request(1, "1", 1, 0.5, -9, outcome=4.0),
            request(1, "1", 1, 0.5, 0, variant="a", outcome=2.0, **mine),
            request(1, "1", 1, 0.5, 1, variant="a", outcome=3.0, **mine),
            request(2, "1", 1, 0.5, 2, variant="b", **mine),
            request(3, "1", 1, 0.5, 3, variant="b", outcome=1.0, **mine),
            request(3, "1", 1, 1.0, 3, variant="b", outcome=99.0, **mine),  # an override
            request(4, "1", 1, 0.5, 4, variant="a", outcome=7.0),
        ],
    )
    arms = [TrialArm(name=name, version="1", weight=5_000) for name in "ab"]
    trial = Trial(trial_id="exp_1", kind=Trial.KIND_EXPERIMENT, arms=arms, started_at_us=START_US)
    strata = trial_strata.open_trial(connection, TrialQuestion.of(trial))
    assert strata.shares.tolist() == [[0.5, 0.5]]
    zero = TrialMetric(
        name="revenue", missing_is_zero=True, covariate=TrialMetric.COVARIATE_PRE_PERIOD, pre_period_s=60
    )
    found = trial_queries.cells(connection, zero)
    order = np.argsort(found.units)
    assert found.totals[order].tolist() == [5.0, 0.0, 1.0]
    assert found.counts.tolist() == [1.0, 1.0, 1.0]
    assert found.covariate is not None
    assert found.covariate[order][0] == 4.0
    assert np.isnan(found.covariate[order][1:]).all()
    some = trial_queries.cells(connection, TrialMetric(name="revenue"))
    assert sorted(zip(some.totals.tolist(), some.counts.tolist(), strict=True)) == [(1.0, 1.0), (5.0, 2.0)]
    assert [one.requests for one in trial_queries.counts(connection, TrialQuestion.of(trial))] == [2, 3]


def test_what_a_fallback_answers_is_a_failure_of_the_arm_that_was_given(
    connection: duckdb.DuckDBPyConnection,
) -> None:
    split = [request(unit, "1", 1, 0.5, unit) for unit in range(8)]
    stood_in = [request(8, "1", 1, 0.5, 8, variant="2"), request(9, "1", 1, 0.5, 9, variant="2")]
    log(connection, [*split, *stood_in])  # the new version never answered
    strata = trial_strata.open_trial(connection, rollout(5_000, 1))
    first = trial_queries.visits(connection, strata).first
    assert (first.units.tolist(), first.failed.tolist()) == ([[8, 2]], [[0, 2]])
    latencies = trial_queries.cells(connection, TrialMetric(name="latency_ms"))
    assert latencies.arms.tolist().count(1) == 2  # what the units got
    counted = trial_queries.counts(connection, rollout(5_000, 1))
    assert [(one.requests, one.errors) for one in counted] == [(8, 0), (2, 2)]
    with duckdb.connect(":memory:") as other:
        named = [request(unit, "1", 1, 0.9, unit, variant="old") for unit in range(8)]
        log(other, [*named, request(8, "2", 1, 0.1, 8, variant="new", code=13)])
        strata = trial_strata.open_trial(other, rollout(1_000, 1))
        first = trial_queries.visits(other, strata).first
        assert (first.units.tolist(), first.failed.tolist()) == ([[8, 1]], [[0, 1]])
    with duckdb.connect(":memory:") as other:
        mine = {"experiment": "exp_1"}
        log(
            other,
            [
                request(1, "1", 1, 0.5, 1, variant="a", **mine),
                request(2, "2", 1, 0.5, 2, variant="b", **mine),
                request(3, "1", 1, 0.5, 3, variant="b", **mine),
            ],
        )
        arms = [
            TrialArm(name=name, version=version, weight=5_000) for name, version in (("a", "1"), ("b", "2"))
        ]
        trial = Trial(trial_id="exp_1", kind=Trial.KIND_EXPERIMENT, arms=arms, started_at_us=START_US)
        strata = trial_strata.open_trial(other, TrialQuestion.of(trial))
        assert trial_queries.visits(other, strata).first.failed.tolist() == [[0, 1]]


def test_every_unit_weighs_the_same_in_a_histogram(connection: duckdb.DuckDBPyConnection) -> None:
    log(
        connection,
        [request(1, "1", 1, 0.5, at, latency_ms=1.0) for at in range(3)]
        + [request(1, "1", 1, 0.5, 3, latency_ms=100.0), request(2, "2", 1, 0.5, 4, latency_ms=50.0)],
    )
    trial_strata.open_trial(connection, rollout(5_000, 1))
    found = trial_queries.histograms(connection, TrialMetric(name="latency_ms", quantile=0.99))
    assert found[0, 0].units.tolist() == [0.75, 0.25]
    assert found[0, 0].buckets[0] == 0
    assert found[0, 1].units.tolist() == [1.0]


def test_values_below_zero_are_in_no_bucket_and_so_in_no_quantile(
    connection: duckdb.DuckDBPyConnection,
) -> None:
    earned = [request(unit, "1", 1, 0.5, unit, outcome=float(unit - 1)) for unit in range(4)]
    log(connection, earned)
    trial_strata.open_trial(connection, rollout(5_000, 1))
    assert trial_queries.histograms(connection, TrialMetric(name="revenue", quantile=0.5)) == {}
    with duckdb.connect(":memory:") as other:
        log(other, earned[1:])
        trial_strata.open_trial(other, rollout(5_000, 1))
        found = trial_queries.histograms(other, TrialMetric(name="revenue", quantile=0.5))
        assert found[0, 0].units.sum() == 3


def test_of_answers_of_one_batch_the_same_one_counts_at_every_look() -> None:
    """Batches have one time."""
    at_once = [request(unit, "1", 1, 0.5, 0, code=13 * (n % 3 == 1)) for n in range(20) for unit in range(99)]
    seen = set()
    for order in (at_once, at_once[::-1]):
        with duckdb.connect(":memory:") as made:
            log(made, order)
            ids = [n.to_bytes(16, "big") for n in range(len(order))]
            table = made.sql("FROM online").to_arrow_table()
            place = table.schema.get_field_index("request_id")
            wanted = ids if order is at_once else ids[::-1]
            made.register("online", table.set_column(place, "request_id", pa.array(wanted, pa.binary())))
            first = trial_queries.visits(made, trial_strata.open_trial(made, rollout(5_000, 1))).first
            seen.add((first.units.sum(), first.failed.sum()))
    assert seen == {(99.0, 0.0)}


def test_an_arm_without_weight_leaves_the_others_their_chances(
    connection: duckdb.DuckDBPyConnection,
) -> None:
    mine = {"experiment": "exp_1"}
    log(connection, [request(n, "1", 1, 0.5, n, variant="ab"[n % 2], **mine) for n in range(4)])
    arms = [TrialArm(name=name, version="1", weight=5_000 * (name != "c")) for name in "abc"]
    trial = Trial(trial_id="exp_1", kind=Trial.KIND_EXPERIMENT, arms=arms, started_at_us=START_US)
    strata = trial_strata.open_trial(connection, TrialQuestion.of(trial))
    assert strata.shares.tolist() == [[0.5, 0.5, 0.0]]
    assert trial_queries.visits(connection, strata).first.units.tolist() == [[2, 2, 0]]


def test_placebos_take_the_controls_units_or_everybody(connection: duckdb.DuckDBPyConnection) -> None:
    log(connection, WALK)
    trial = Trial(
        trial_id="rol_1",
        kind=Trial.KIND_ROLLOUT,
        revision=2,
        arms=[TrialArm(name="1", version="1", weight=5_000), TrialArm(name="2", version="2", weight=5_000)],
        started_at_us=START_US,
    )
    control = placebo_queries.of_trial(connection, trial)
    assert control.units.tolist() == [1, 3, 4]
    assert control.failed.tolist() == [True, False, False]
    assert set(control.cells.arms.tolist()) == {0}
    with duckdb.connect(":memory:") as other:
        log(other, WALK)
        everybody = placebo_queries.of_everybody(other, START_US)
        assert everybody.units.tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_a_lift_that_wears_off_is_told_and_one_that_stays_is_not(
    connection: duckdb.DuckDBPyConnection,
) -> None:
    """Each of 600 users comes in the first minute it is there and ten minutes after it."""
    rng = np.random.default_rng(4)
    requests = []
    for unit in range(600):
        arm, begins = unit % 2, float(rng.uniform(0, 60))
        for at, lift in ((0, 3.0), (600, 0.0)):
            requests.append(
                request(
                    unit,
                    str(arm + 1),
                    1,
                    0.5,
                    begins + at,
                    latency_ms=10.0 + arm + rng.normal(),
                    outcome=5.0 + arm * lift + rng.normal(),
                )
            )
    log(connection, requests)
    trial_strata.open_trial(connection, rollout(5_000, 1))
    found = {
        name: novelty.novelty(novelty.tenure(connection, metric, 700_000_000), 1)
        for name, metric in (
            ("revenue", TrialMetric(name="revenue")),
            ("altogether", TrialMetric(name="revenue", missing_is_zero=True)),
            ("latency_ms", TrialMetric(name="latency_ms")),
        )
    }
    for name in ("revenue", "altogether"):
        told = found[name]
        assert told is not None
        assert told["changes"]
        assert (told["first_lift"], told["later_lift"]) == pytest.approx((3.0, 0.0), abs=0.4)
    assert "novelty wears off" in novelty.warning("revenue", "2", found["revenue"] or {})
    assert "first 2.92 minutes" in novelty.warning("revenue", "2", found["revenue"] or {})
    steady = found["latency_ms"]
    assert steady is not None
    assert not steady["changes"]
    assert steady["p_value"] > 0.01
    few = novelty.tenure(connection, TrialMetric(name="revenue"), 4_000_000_000)
    assert novelty.novelty(few, 1) is None  # nobody was there for longer than a quarter of it


def test_an_outcome_that_became_known_after_the_start_is_no_covariate(
    connection: duckdb.DuckDBPyConnection,
) -> None:
    log(
        connection,
        [
            request(1, "1", 1, 0.5, -20, outcome=5.0, observed_at_s=-10),
            request(1, "1", 1, 0.5, -15, outcome=50.0, observed_at_s=30),
            request(2, "2", 1, 0.5, -15, outcome=7.0, observed_at_s=1),
            request(1, "1", 1, 0.5, 1, outcome=2.0),
            request(2, "2", 1, 0.5, 2, outcome=3.0),
        ],
    )
    trial_strata.open_trial(connection, rollout(5_000, 1))
    metric = TrialMetric(name="revenue", covariate=TrialMetric.COVARIATE_PRE_PERIOD, pre_period_s=60)
    found = trial_queries.cells(connection, metric)
    assert found.covariate is not None
    by_unit = dict(zip(found.units.tolist(), found.covariate.tolist(), strict=True))
    assert by_unit[1] == 5.0
    assert np.isnan(by_unit[2])


def test_a_log_that_comes_late_does_not_revise_first_requests_silently() -> None:
    requests = [request(unit, str(unit % 2 + 1), 1, 0.5, unit) for unit in range(10)]
    late = request(3, "1", 1, 0.5, 0.5)

    def look(requests: list[dict[str, Any]], at_s: float, earlier: KnownFirsts | None) -> KnownFirsts:
        with duckdb.connect(":memory:") as made:
            log(made, requests)
            trial_queries.visits(made, trial_strata.open_trial(made, rollout(5_000, 1)))
            until_us = START_US + round(1e6 * at_s)
            return KnownFirsts.at(until_us, partial(trial_queries.known_firsts, made), earlier)

    first = look(requests, 100, None)
    assert (first.units, first.warning) == (10, "")
    newer = look([*requests, request(11, "1", 1, 0.5, 90)], 200, first)
    assert (newer.units, newer.warning) == (11, "")
    revised = look([late, *requests], 200, newer)
    assert "some units' first request is another than it was" in revised.warning
    assert look([late, *requests], 300, revised).warning == revised.warning
    # A clock that was an hour ahead at the first of two looks: nothing was held back.
    ahead = look(requests, 3700, None)
    assert look([*requests, request(11, "1", 1, 0.5, 110)], 111, ahead).warning == ""
    assert look([*requests, request(11, "1", 1, 0.5, 110)], 111, replace(ahead, revised_us=1)).warning
