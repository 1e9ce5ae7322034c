"""Which experiment gets a request: one at most, the same one as traffic grows, and never a held-out unit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
from headrace.v1.control_pb2 import Condition, Experiment, LayerRange, Unit, VariantRange
from headrace.v1.dataplane_pb2 import PredictRequest
from headrace.v1.tensor_pb2 import Parameter
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.assignment import BUCKETS, unit_digest
from services.common.experiments import Layer, unit_of
from services.common.targeting import Targeting
from tests.fixtures.experiments import experiment

UNITS = st.sampled_from([Unit.UNIT_USER, Unit.UNIT_SESSION, Unit.UNIT_REQUEST])
REQUESTS = [
    PredictRequest(model="m", unit=f"user-{n}", session=f"session-{n // 2}", request_id=n.to_bytes(16, "big"))
    for n in range(400)
]


@st.composite
def layers(draw: st.DrawFn) -> list[Experiment]:
    """Up to four experiments of any units that share the layer out among them, not always all of it."""
    cuts = sorted(draw(st.lists(st.integers(1, BUCKETS - 1), min_size=1, max_size=4, unique=True)))
    return [
        experiment(f"exp_{number}", [(first, last - 1)], unit=draw(UNITS))
        for number, (first, last) in enumerate(zip([0, *cuts], cuts, strict=False))
    ]


@given(layers(), st.integers(0, 3000))
@settings(max_examples=40, deadline=None)
def test_a_request_is_in_one_experiment_at_most_and_the_explanation_says_the_same(
    experiments: list[Experiment], holdout: int
) -> None:
    layer = Layer("m", experiments, holdout)
    for request in REQUESTS[:60]:
        assigned = layer.assign(request)
        told = {one.experiment_id: layer.explain(request, one.experiment_id) for one in experiments}
        inside = [name for name, said in told.items() if said.in_experiment]
        if assigned is None:
            assert inside == []
            assert all(said.held_out or not said.in_layer for said in told.values())
            continue
        name = experiments[assigned.experiment].experiment_id
        assert inside == [name]
        assert (told[name].variant, told[name].propensity) == (assigned.variant, 0.5)
        assert {said.owner for other, said in told.items() if other != name} <= {name}
        assert assigned.digest == unit_digest(unit_of(request, experiments[assigned.experiment].unit))


@given(layers(), st.integers(0, 2000), st.integers(0, 2000))
@settings(max_examples=20, deadline=None)
def test_a_growing_holdout_only_takes_units_out(experiments: list[Experiment], one: int, other: int) -> None:
    small, large = (Layer("m", experiments, share) for share in sorted((one, other)))
    for request in REQUESTS[:100]:
        after = large.assign(request)
        assert after is None or after == small.assign(request)


@given(st.integers(1, BUCKETS - 1), st.integers(1, BUCKETS - 1), st.integers(1, 9_998), st.integers(1, 9_998))
@settings(max_examples=40, deadline=None)
def test_growing_traffic_and_weights_move_no_unit_that_stays(a: int, b: int, c: int, d: int) -> None:
    (less, more), (light, heavy) = sorted((a, b)), sorted((c, d))
    before = Layer("m", [experiment("exp_1", [(0, less - 1)], [BUCKETS - light])])
    wider = Layer("m", [experiment("exp_1", [(0, more - 1)], [BUCKETS - light])])
    heavier = Layer("m", [experiment("exp_1", [(0, less - 1)], [BUCKETS - heavy])])
    for request in REQUESTS[:150]:
        assigned = before.assign(request)
        if assigned is None:
            assert heavier.assign(request) is None
            continue
        assert wider.assign(request) == assigned
        moved = heavier.assign(request)
        assert moved is not None
        assert moved.variant >= assigned.variant  # only into the variant that grew


@given(UNITS, st.integers(0, 399), st.integers(0, 3000))
@settings(max_examples=60, deadline=None)
def test_overrides_win_over_holdout_targeting_and_buckets(unit: Unit, number: int, holdout: int) -> None:
    request = REQUESTS[number]
    digest = int.from_bytes(unit_digest(unit_of(request, unit)), "little")
    nobody = [Condition(attribute="never", operator=Condition.OPERATOR_PRESENT)]
    chosen = {"override_units": [digest], "override_variants": [1]}
    first = experiment("exp_1")
    second = experiment("exp_2", [], unit=unit, targeting=nobody, **chosen)
    layer = Layer("m", [first, second], holdout)
    assigned = layer.assign(request)
    assert assigned is not None
    assert (assigned.experiment, assigned.variant, assigned.overridden) == (1, 1, True)
    said = layer.explain(request, "exp_2")
    assert (said.overridden, said.propensity, said.in_layer) == (True, 1.0, False)
    assert layer.explain(request, "exp_1").owner == "exp_2"


@given(st.lists(st.integers(1, BUCKETS - 1), min_size=1, max_size=4, unique=True))
@settings(max_examples=5, deadline=None)
def test_propensities_are_the_shares_that_units_get(cuts: list[int]) -> None:
    made = experiment("exp_1", cuts=sorted(cuts))
    layer = Layer("m", [made])
    requests = [PredictRequest(unit=f"u{n}") for n in range(5000)]
    got = Counter(assigned.variant for request in requests if (assigned := layer.assign(request)))
    for variant in range(len(made.variants)):
        share = layer.share(0, variant)
        assert abs(got[variant] - 5000 * share) <= 6 * math.sqrt(5000 * share * (1 - share)) + 1
    assert math.isclose(sum(layer.share(0, variant) for variant in range(len(made.variants))), 1.0)


def test_experiments_of_one_model_split_their_units_along_lines_of_their_own() -> None:
    halves = [experiment("exp_1", [(0, 4999)]), experiment("exp_2", [(5000, 9999)])]
    layer, alone = Layer("m", halves), Layer("m", [experiment("exp_1")])
    requests = [PredictRequest(unit=f"u{n}") for n in range(4000)]
    table = Counter(
        (theirs.experiment, ours.variant)
        for request in requests
        if (theirs := layer.assign(request)) and (ours := alone.assign(request))
    )
    assert sum(table.values()) == 4000
    # Independent lines: each quarter has 1,000 within six standard deviations.
    assert all(abs(count - 1000) < 6 * math.sqrt(4000 * 3 / 16) for count in table.values())


def parameter(value: str | float | bool) -> Parameter:
    """The value as the gateway writes it."""
    if isinstance(value, bool):
        return Parameter(bool_value=value)
    if isinstance(value, int):
        return Parameter(int64_value=value)
    return Parameter(string_value=value) if isinstance(value, str) else Parameter(double_value=value)


SCALARS = st.one_of(st.text(max_size=3), st.integers(-5, 5), st.floats(-5, 5), st.booleans())
MEANING: dict[Condition.Operator, Callable[[object, object], bool]] = {
    Condition.OPERATOR_LESS: lambda a, b: a < b,  # type: ignore[operator]
    Condition.OPERATOR_LESS_OR_EQUAL: lambda a, b: a <= b,  # type: ignore[operator]
    Condition.OPERATOR_GREATER: lambda a, b: a > b,  # type: ignore[operator]
    Condition.OPERATOR_GREATER_OR_EQUAL: lambda a, b: a >= b,  # type: ignore[operator]
    Condition.OPERATOR_STARTS_WITH: lambda a, b: str(a).startswith(str(b)),
    Condition.OPERATOR_IN: lambda a, b: a == b,
}


@given(st.none() | SCALARS, SCALARS, st.sampled_from(list(MEANING)), st.booleans())
@settings(max_examples=300, deadline=None)
def test_targeting_compares_like_with_like(
    value: str | float | bool | None,
    bound: str | float | bool,
    said: Condition.Operator,
    given_as_parameter: bool,
) -> None:
    request = PredictRequest()
    if value is not None:
        (request.parameters if given_as_parameter else request.attributes)["a"].CopyFrom(parameter(value))
    alike = value is not None and isinstance(value, str) == isinstance(bound, str)
    if said == Condition.OPERATOR_STARTS_WITH and not isinstance(bound, str):
        with pytest.raises(ValueError, match="takes text"):
            Targeting([Condition(attribute="a", operator=said, values=[parameter(bound)])])
        return
    holds = Targeting([Condition(attribute="a", operator=said, values=[parameter(bound)])]).holds(request)
    assert holds == (alike and MEANING[said](value, bound))
    if said == Condition.OPERATOR_IN:
        other = Condition(attribute="a", operator=Condition.OPERATOR_NOT_IN, values=[parameter(bound)])
        assert Targeting([other]).holds(request) != holds
    there = Targeting([Condition(attribute="a", operator=Condition.OPERATOR_PRESENT)]).holds(request)
    missing = Targeting([Condition(attribute="a", operator=Condition.OPERATOR_ABSENT)]).holds(request)
    assert (there, missing) == (value is not None, value is None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"targeting": [Condition(operator=Condition.OPERATOR_PRESENT)]}, "names no attribute"),
        ({"targeting": [Condition(attribute="a")]}, "lacks a value"),
        ({"targeting": [Condition(attribute="a", operator=Condition.OPERATOR_IN)]}, "lacks a value"),
        ({"override_units": [1]}, "one variant each"),
        ({"override_units": [1], "override_variants": [2]}, "names the 2th"),
        ({"unit": 17}, "unknown kind"),
        ({"layer": [LayerRange(first=9, last=10_000)]}, "no range of buckets"),
        ({"layer": [LayerRange(first=0, last=0)]}, "given twice"),
        ({"buckets": [VariantRange(first=5, last=5, variant=1)]}, "bucket 5 is given twice"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, object], message: str) -> None:
    made = experiment("exp_1")
    made.MergeFrom(Experiment(**wrong))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        Layer("m", [made])


def test_one_experiment_twice_and_a_holdout_of_more_than_all_are_refused() -> None:
    with pytest.raises(ValueError, match="given twice"):
        Layer("m", [experiment("exp_1", [(0, 1)]), experiment("exp_1", [(2, 3)])])
    with pytest.raises(ValueError, match="holdout"):
        Layer("m", [experiment("exp_1")], BUCKETS + 1)
    with pytest.raises(KeyError):
        Layer("m", [experiment("exp_1")]).explain(REQUESTS[0], "exp_2")
