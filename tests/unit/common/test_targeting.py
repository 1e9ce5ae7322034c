"""What each condition of an experiment holds for, and which conditions are none."""

from __future__ import annotations

import re

import pytest
from headrace.v1.control_pb2 import Condition
from headrace.v1.dataplane_pb2 import PredictRequest
from headrace.v1.tensor_pb2 import Parameter

from services.common.errors import InvalidArgument
from services.common.targeting import (
    MAX_ATTRIBUTE_NAME,
    MAX_ATTRIBUTE_TEXT,
    MOST_ATTRIBUTES,
    Targeting,
    Value,
    check_attributes,
)


def parameter(value: Value | None) -> Parameter:
    if value is None:
        return Parameter()
    if isinstance(value, bool):
        return Parameter(bool_value=value)
    if isinstance(value, str):
        return Parameter(string_value=value)
    return Parameter(int64_value=value) if isinstance(value, int) else Parameter(double_value=value)


def condition(operator: str, *values: Value | None, name: str = "x") -> Condition:
    said = f"OPERATOR_{operator}"
    return Condition(attribute=name, operator=said, values=[parameter(value) for value in values])


@pytest.mark.parametrize(
    ("one", "holds", "holds_not"),
    [
        (condition("STARTS_WITH", "de"), ["de", "de-AT"], ["d", "en-de", 5, None]),
        (condition("IN", "a", 1), ["a", 1, True], ["b", 2, None]),
        (condition("NOT_IN", "a"), ["b", 1, None], ["a"]),
        (condition("PRESENT"), ["", 0, False], [None]),
        (condition("ABSENT"), [None], ["", 0]),
        (condition("LESS", 5), [4, 4.9, True], [5, 6, "4", None]),
        (condition("LESS_OR_EQUAL", 5), [5], [5.1, "5"]),
        (condition("GREATER", 5), [5.1], [5, "6", None]),
        (condition("GREATER_OR_EQUAL", 5), [5], [4.9]),
        (condition("LESS", "b"), ["a", ""], ["b", "c", 1]),
    ],
)
def test_a_condition_holds_for_what_it_says(
    one: Condition, holds: list[Value | None], holds_not: list[Value | None]
) -> None:
    targeting = Targeting([one])
    for value in (*holds, *holds_not):
        request = PredictRequest(attributes={} if value is None else {"x": parameter(value)})
        assert targeting.holds(request) is (value in holds)
        assert list(targeting.unmet(request)) == ([] if value in holds else [one])


def test_every_condition_has_to_hold_and_those_that_do_not_are_named() -> None:
    one, two = condition("PRESENT", name="a"), condition("PRESENT", name="b")
    request = PredictRequest(attributes={"a": parameter(1)})
    assert not Targeting([one, two]).holds(request)
    assert list(Targeting([one, two]).unmet(request)) == [two]


def test_an_attribute_comes_before_a_parameter_of_its_name_and_one_without_a_value_is_none() -> None:
    targeting = Targeting([condition("IN", "a")])
    assert targeting.holds(PredictRequest(parameters={"x": parameter("a")}))
    assert not targeting.holds(
        PredictRequest(attributes={"x": parameter("b")}, parameters={"x": parameter("a")})
    )
    assert not targeting.holds(PredictRequest(attributes={"x": parameter(None)}))


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (condition("IN", "a", name=""), "names no attribute"),
        (condition("PRESENT", 1), "takes no value"),
        (condition("ABSENT", "a"), "takes no value"),
        (condition("IN"), "lacks a value"),
        (condition("IN", "a", None), "lacks a value"),
        (condition("LESS"), "lacks a value"),
        (condition("LESS", 1, 2), "takes one value"),
        (condition("STARTS_WITH", "a", "b"), "takes one value"),
        (condition("STARTS_WITH", 1), "takes text"),
        (condition("UNSPECIFIED", 1), "unknown operator"),
    ],
)
def test_what_cannot_be_tested_is_refused(one: Condition, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Targeting([one])


def test_attributes_may_be_as_many_and_as_long_as_is_said() -> None:
    names = [str(number).rjust(MAX_ATTRIBUTE_NAME, "n") for number in range(MOST_ATTRIBUTES)]
    most = dict.fromkeys(names, "v" * MAX_ATTRIBUTE_TEXT)
    check_attributes(most)
    check_attributes({"n": 1})


@pytest.mark.parametrize(
    ("attributes", "field"),
    [
        ({str(number): 1 for number in range(MOST_ATTRIBUTES + 1)}, "attributes"),
        ({"": 1}, "attributes."),
        ({"n" * (MAX_ATTRIBUTE_NAME + 1): 1}, "attributes." + "n" * MAX_ATTRIBUTE_NAME),
        ({"n": "v" * (MAX_ATTRIBUTE_TEXT + 1)}, "attributes.n"),
    ],
)
def test_more_or_longer_ones_are_refused_by_name(attributes: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape("attributes")) as refused:
        check_attributes(attributes)
    assert refused.value.field == field
