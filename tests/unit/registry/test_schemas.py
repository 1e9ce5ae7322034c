"""What callers may send."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from services.common.errors import InvalidArgument, MalformedBody
from services.registry.experiment_schemas import ConditionIn
from services.registry.schemas import DeployIn, KeyIn, ModelIn, Share, VersionIn, checked

ALL = {"version": "1", "weight": 100}


@pytest.mark.parametrize(
    ("weight", "ten_thousandths"),
    [(100, 10_000), (33.33, 3333), (0, 0), (0.01, 1), ("12.5", 1250), (66.67, 6667)],
)
def test_percent_becomes_exact_ten_thousandths(weight: Any, ten_thousandths: int) -> None:
    share = checked(Share, {"version": "1", "weight": weight})
    assert share.ten_thousandths == ten_thousandths


@pytest.mark.parametrize(
    ("kind", "values", "field"),
    [
        (Share, {"version": "1", "weight": 0.001}, "weight"),
        (Share, {"version": "1", "weight": 100.01}, "weight"),
        (Share, {"version": "1", "weight": float("nan")}, "weight"),
        (Share, {"version": "-1", "weight": 1}, "version"),
        (ModelIn, {"name": "UPPER"}, "name"),
        (ModelIn, {"name": "a" * 64}, "name"),
        (ModelIn, {"name": "a\n"}, "name"),
        (ModelIn, {"name": "a", "tags": {"k": 1}}, "tags.k"),
        (VersionIn, {"metrics": {"auc": float("inf")}}, "metrics.auc"),
        (VersionIn, {"metrics": {"auc": "high"}}, "metrics.auc"),
        (VersionIn, {"lineage": {"author": "me"}}, "lineage.author"),
        (
            VersionIn,
            {"signature": {"inputs": [{"name": "x", "datatype": "FLOAT"}]}},
            "signature.inputs[0].datatype",
        ),
        (
            VersionIn,
            {"signature": {"inputs": [{"name": "x", "shape": [-1, 0]}]}},
            "signature.inputs[0].shape[1]",
        ),
        (
            DeployIn,
            {"versions": [{"version": "1", "weight": 100}], "expected_revision": 0},
            "expected_revision",
        ),
        (
            DeployIn,
            {"versions": [ALL], "batching": {"max_queue_ms": -1}},
            "batching.max_queue_ms",
        ),
        (
            DeployIn,
            {"versions": [ALL], "batching": {"preferred_rows": [8, 8]}},
            "batching.preferred_rows",
        ),
        (KeyIn, {"name": "k", "scopes": []}, "scopes"),
        (KeyIn, {"name": "k", "rate_per_second": -1}, "rate_per_second"),
        (KeyIn, {"name": "k", "expires_at": "2027-01-01T00:00:00"}, "expires_at"),
        (KeyIn, {"name": "k", "expires_at": "9999-12-31T23:59:59-01:00"}, "expires_at"),
        (KeyIn, {"name": ""}, "name"),
        (KeyIn, {"name": "k\0"}, "name"),
        # A database of JSON gives 1e300 back as an integer of 301 digits.
        (ConditionIn, {"attribute": "a", "operator": "lt", "values": [1e300]}, "values[0]"),
        (ConditionIn, {"attribute": "a", "operator": "in", "values": [1, -1e19]}, "values[1]"),
    ],
)
def test_the_first_wrong_field_is_named(kind: type[BaseModel], values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        checked(kind, values)
    assert caught.value.field == field


def test_a_wrong_name_is_told_how_names_are_spelt() -> None:
    with pytest.raises(InvalidArgument, match="'Churn Model' is no name: at most 63 lower-case letters"):
        checked(ModelIn, {"name": "Churn Model"})
    assert ModelIn.model_json_schema()["properties"]["name"]["pattern"] == "^[a-z0-9][a-z0-9._-]{0,62}$"


def test_json_that_is_none_is_another_error() -> None:
    with pytest.raises(MalformedBody) as caught:
        checked(VersionIn, b"{")
    assert caught.value.field == "metadata"


def test_everything_of_a_version_is_optional() -> None:
    assert checked(VersionIn, b"{}") == VersionIn()
