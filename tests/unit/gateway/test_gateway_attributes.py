"""Session and attributes in bodies: what is taken, and how what is not is named."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest

from services.common.errors import InvalidArgument
from services.common.targeting import attribute
from services.gateway.codecs import native, v2
from services.gateway.codecs.attributes import fill_attributes, session_of


def read(body: dict[str, Any]) -> PredictRequest:
    """What the native route makes of it."""
    request = PredictRequest()
    decoded = native.decode_body(orjson.dumps(body))
    request.session = session_of(decoded.session_id)
    fill_attributes(request, decoded.attributes or {})
    return request


def test_text_numbers_and_truth_values_are_kept_as_they_are() -> None:
    given: dict[str, Any] = {"country": "DE", "age": 41, "score": 0.5, "member": True}
    request = PredictRequest()
    fill_attributes(request, given)
    found = {name: attribute(request, name) for name in given}
    assert found == given
    assert [type(value) for value in found.values()] == [str, int, float, bool]


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"attributes": {"a": None}}, "attributes.a"),
        ({"attributes": {"a": [1]}}, "attributes.a"),
        ({"attributes": {"a": {"b": 1}}}, "attributes.a"),
        ({"attributes": {"a": "x" * 257}}, "attributes.a"),
        ({"attributes": {"n" * 65: 1}}, "attributes." + "n" * 64),
        ({"attributes": {"": 1}}, "attributes."),
        ({"attributes": {"a": 1 << 63}}, "attributes.a"),
        ({"attributes": {str(n): n for n in range(33)}}, "attributes"),
        ({"attributes": [1]}, "attributes"),
        ({"session_id": "s" * 513}, "session_id"),
        ({"session_id": 1.5}, "session_id"),
    ],
)
def test_what_is_wrong_is_named(wrong: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read(wrong)
    assert caught.value.field == field


def test_the_largest_that_is_taken() -> None:
    request = PredictRequest()
    fill_attributes(request, {f"{n:064}": "x" * 256 for n in range(32)})
    assert len(request.attributes) == 32
    assert session_of("s" * 512) == "s" * 512
    assert session_of(7) == "7"


def test_v2_parameters_name_session_and_user_and_the_others_can_be_targeted() -> None:
    request = PredictRequest()
    v2.fill_parameters(request, {"user_id": "u", "session_id": 5, "country": "DE", "absent": None})
    assert (request.unit, request.session) == ("u", "5")
    assert dict(request.attributes) == {}
    assert list(request.parameters) == ["country"]
    assert attribute(request, "country") == "DE"
    with pytest.raises(InvalidArgument) as caught:
        v2.fill_parameters(request, {"session_id": "s" * 513})
    assert caught.value.field == "parameters.session_id"


def test_v2_parameters_that_are_null_name_nobody() -> None:
    request = PredictRequest()
    v2.fill_parameters(request, {"user_id": None, "session_id": None})
    assert (request.unit, request.session) == ("", "")


def test_an_attribute_hides_the_parameter_of_its_name() -> None:
    request = PredictRequest()
    v2.fill_parameters(request, {"country": "DE"})
    fill_attributes(request, {"country": "FR"})
    assert attribute(request, "country") == "FR"


def test_v2_answers_say_which_experiment_assigned_which_variant() -> None:
    plain = PredictReply(version="1", variant="1")
    assert v2.answer_parameters(plain) == {}
    assigned = PredictReply(version="1", variant="1", experiment="exp_1")
    assert v2.answer_parameters(assigned) == {"variant": "1", "experiment": "exp_1"}
