"""What a deployment may still change while a rollout runs, and the names that would hide its failures."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

import pytest
from headrace.v1.control_pb2 import Fallback, ServedVersion, ServingConfig, Shadow

from services.common.errors import FailedPrecondition
from services.registry.rollout_guard import check_unmasked, guard_rollout
from services.registry.tables import RolloutRow

ROW = RolloutRow(rollout_id="r-1", model="cancer", version="2", shadow_since=None)
SHADOWING = RolloutRow(
    rollout_id="r-1", model="cancer", version="2", shadow_since=datetime(2026, 11, 21, tzinfo=UTC)
)


def config(weights: tuple[int, int] = (9000, 1000), **changes: Any) -> ServingConfig:
    versions = [ServedVersion(version=str(n), weight=weight) for n, weight in enumerate(weights, 1)]
    return ServingConfig(model="cancer", versions=versions, **changes)


def called(variant: str, **changes: Any) -> ServingConfig:
    """Version 1 is called `variant`."""
    made = config(**changes)
    made.versions[0].variant = variant
    return made


def test_what_versions_are_there_for_stays() -> None:
    old, new = config(), config()
    old.versions[1].held = True
    guard_rollout(ROW, old, new)
    assert [version.held for version in new.versions] == [False, True]


@pytest.mark.parametrize("weights", [(8000, 2000), (9000, 0)])
def test_weights_are_the_rollouts(weights: tuple[int, int]) -> None:
    with pytest.raises(FailedPrecondition, match=re.escape("1 90%, 2 10%")) as refused:
        guard_rollout(ROW, config(), config(weights))
    assert refused.value.field == "versions"


def test_no_version_comes_or_goes() -> None:
    new = config()
    new.versions.add(version="3", weight=0)
    for old, later in ((config(), new), (new, config())):
        with pytest.raises(FailedPrecondition, match="abort it to set versions"):
            guard_rollout(ROW, old, later)


@pytest.mark.parametrize("new", [config(), config(shadow=Shadow(version="2", share=500))])
def test_the_shadow_of_a_shadow_step_stays(new: ServingConfig) -> None:
    old = config(shadow=Shadow(version="2", share=500))
    guard_rollout(SHADOWING, old, new)
    assert new.shadow == old.shadow


def test_a_shadow_step_takes_no_other_shadow() -> None:
    old, new = (config(shadow=Shadow(version="2", share=share)) for share in (500, 600))
    with pytest.raises(FailedPrecondition, match="be the shadow") as refused:
        guard_rollout(SHADOWING, old, new)
    assert refused.value.field == "shadow"


def test_beside_a_shadow_step_any_shadow_may_be_set_and_taken_away() -> None:
    old, new = config(shadow=Shadow(version="2", share=500)), config()
    guard_rollout(ROW, old, new)
    assert not new.HasField("shadow")


@pytest.mark.parametrize("variant", ["", "1", "control"])
def test_names_that_hide_nothing(variant: str) -> None:
    check_unmasked(called(variant), "2", "model")
    guard_rollout(ROW, called(variant), called(variant))
    fallback = Fallback(version="1")
    if variant != "control":
        check_unmasked(called(variant, fallback=fallback), "2", "model")


@pytest.mark.parametrize(
    ("new", "field"),
    [(called("2"), "versions"), (called("control", fallback=Fallback(version="1")), "fallback")],
)
def test_names_that_would_hide_failures_are_refused(new: ServingConfig, field: str) -> None:
    with pytest.raises(FailedPrecondition, match="is called"):
        check_unmasked(new, "2", "model")
    with pytest.raises(FailedPrecondition) as refused:
        guard_rollout(ROW, called(""), new)
    assert refused.value.field == field
