"""Session and attributes in bodies: what is taken, and how what is not is named."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest

from services.common.errors import InvalidArgument
from services.common.targeting import attribute, check_attributes
from services.gateway.codecs import native, v2
from services.gateway.codecs.attributes import fill_attributes, session_of
from services.registry.experiment_schemas import NewExperimentIn
from services.registry.schemas import checked


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


@pytest.mark.parametrize(
    ("name", "text", "user", "taken"),
    [(64, 256, 512, True), (65, 256, 512, False), (64, 257, 512, False), (64, 256, 513, False)],
)
def test_what_a_request_may_carry_is_what_an_experiment_may_be_about(
    name: int, text: int, user: int, taken: bool
) -> None:
    """To the gateway, to the registry, and to the registry where it explains."""
    given = {"n" * name: "x" * text}
    condition = {"attribute": "n" * name, "operator": "in", "values": ["x" * text]}
    wanted = {
        "model": "m",
        "variants": [{"name": "a", "version": "1"}, {"name": "b", "version": "2"}],
        "metrics": [{"name": "accuracy"}],
        "targeting": [condition],
        "overrides": [{"unit": "u" * user, "variant": "a"}],
    }

    def asked() -> None:
        fill_attributes(PredictRequest(), given)
        session_of("u" * user)

    def created() -> None:
        checked(NewExperimentIn, wanted)

    def explained() -> None:
        check_attributes(given, "attribute")
        session_of("u" * user)

    for take in (asked, created, explained):
        if taken:
            take()
        else:
            with pytest.raises(InvalidArgument) as caught:
                take()
            assert caught.value.field
