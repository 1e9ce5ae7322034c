"""Session and attributes at the gateway and at the registry: the same bounds."""

from __future__ import annotations

import pytest
from headrace.v1.dataplane_pb2 import PredictRequest

from services.common.errors import InvalidArgument
from services.common.targeting import check_attributes
from services.gateway.codecs.attributes import fill_attributes, session_of
from services.registry.experiment_schemas import NewExperimentIn
from services.registry.schemas import checked


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
