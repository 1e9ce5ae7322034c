"""Which requests an experiment is about: conditions on their attributes. Pure.

Attributes are those that the gateway was told, and the request's own parameters where they have other names.
Text is compared with text, numbers and truth values (1 and 0) with numbers. What is not there or of another
kind fulfils NOT_IN and, where it is not there, ABSENT.

The bounds below are those of requests and of what experiments say of them: a condition on what no request can
carry would hold for nobody.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from headrace.v1.control_pb2 import Condition
from headrace.v1.dataplane_pb2 import PredictRequest
from headrace.v1.tensor_pb2 import Parameter

from services.common.errors import InvalidArgument

#: Of one request.
MOST_ATTRIBUTES: Final = 32
#: Characters of an attribute's name, of a text as its value, and of a user or a session.
MAX_ATTRIBUTE_NAME: Final = 64
MAX_ATTRIBUTE_TEXT: Final = 256
MAX_UNIT: Final = 512

Value = str | int | float
_Test = Callable[[Value | None], bool]

_ORDER: Final[dict[int, Callable[[Any, Any], bool]]] = {
    Condition.OPERATOR_LESS: operator.lt,
    Condition.OPERATOR_LESS_OR_EQUAL: operator.le,
    Condition.OPERATOR_GREATER: operator.gt,
    Condition.OPERATOR_GREATER_OR_EQUAL: operator.ge,
}


class Targeting:
    """Every one of some conditions."""

    __slots__ = ("_conditions",)

    def __init__(self, conditions: Iterable[Condition]) -> None:
        """Raises ValueError where a condition says what cannot be tested."""
        self._conditions = tuple((one.attribute, _test(one), one) for one in conditions)

    def holds(self, request: PredictRequest) -> bool:
        """Whether every condition holds."""
        for name, test, _ in self._conditions:  # noqa: SIM110 - every request asks; a generator costs as much again
            if not test(attribute(request, name)):
                return False
        return True

    def unmet(self, request: PredictRequest) -> Iterator[Condition]:
        """The conditions that do not hold."""
        return (one for name, test, one in self._conditions if not test(attribute(request, name)))


def check_attributes(attributes: Mapping[str, object], field: str = "attributes") -> None:
    """Raises InvalidArgument where they are too many, or naming the one whose name or text is too long as
    "`field`.name"."""
    if len(attributes) > MOST_ATTRIBUTES:
        raise InvalidArgument(f"There are more than {MOST_ATTRIBUTES} attributes.", field=field)
    for name, value in attributes.items():
        where = f"{field}.{name[:MAX_ATTRIBUTE_NAME]}"
        if not 1 <= len(name) <= MAX_ATTRIBUTE_NAME:
            raise InvalidArgument(
                f"{where}: the name of an attribute has 1 to {MAX_ATTRIBUTE_NAME} characters.", field=where
            )
        if isinstance(value, str) and len(value) > MAX_ATTRIBUTE_TEXT:
            raise InvalidArgument(f"{where} is longer than {MAX_ATTRIBUTE_TEXT} characters.", field=where)


def attribute(request: PredictRequest, name: str) -> Value | None:
    """The attribute `name` of `request`; None where it has none."""
    parameter = request.attributes.get(name)
    if parameter is None:
        parameter = request.parameters.get(name)
    return None if parameter is None else _value(parameter)


def _value(parameter: Parameter) -> Value | None:
    kind = parameter.WhichOneof("value")
    return None if kind is None else getattr(parameter, kind)


def _test(condition: Condition) -> _Test:
    """Whether a value fulfils `condition`. Raises ValueError."""
    if not condition.attribute:
        raise ValueError("a condition names no attribute")
    values = [_value(one) for one in condition.values]
    said = condition.operator
    if said in (Condition.OPERATOR_PRESENT, Condition.OPERATOR_ABSENT):
        if values:
            raise ValueError(f"the condition on {condition.attribute!r} takes no value")
        present = said == Condition.OPERATOR_PRESENT
        return lambda value: (value is not None) is present
    if not values or None in values:
        raise ValueError(f"the condition on {condition.attribute!r} lacks a value")
    if said in (Condition.OPERATOR_IN, Condition.OPERATOR_NOT_IN):
        known = frozenset(values)
        among = said == Condition.OPERATOR_IN
        return lambda value: (value in known) is among
    bound = values[0]
    if len(values) > 1 or bound is None:
        raise ValueError(f"the condition on {condition.attribute!r} takes one value")
    if said == Condition.OPERATOR_STARTS_WITH:
        if not isinstance(bound, str):
            raise ValueError(f"the condition on {condition.attribute!r} takes text")
        return lambda value: isinstance(value, str) and value.startswith(bound)
    compare = _ORDER.get(said)
    if compare is None:
        raise ValueError(f"the condition on {condition.attribute!r} has an unknown operator")
    text = isinstance(bound, str)
    return lambda value: value is not None and isinstance(value, str) is text and compare(value, bound)
