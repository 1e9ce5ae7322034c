"""What is told in words where the numbers alone would mislead."""

from __future__ import annotations

from typing import Any

import pytest

from services.analytics.words import paragraph


def results(status: str, finding: str, chance: float) -> dict[str, Any]:
    decision = {"units": 100, "estimate": -0.02, "finding": finding, "interval": [-0.04, 0.003]}
    compared = {"arm": "b", "decision": decision, "bayesian": {"chance_to_be_better": chance}}
    return {
        "name": "",
        "trial_id": "exp_1",
        "started_at": "2026-11-22T22:00:00Z",
        "status": status,
        "arms": [{"name": arm, "units": 100, "requests": 100} for arm in "ab"],
        "metrics": [{"metric": "accuracy", "role": "success", "comparisons": [compared]}],
        "sample_ratio": {"mismatch": False},
    }


@pytest.mark.parametrize(
    ("chance", "told"),
    [(0.0, "under 1%"), (0.004, "under 1%"), (0.006, "1%"), (0.5, "50%"), (0.994, "99%"), (1.0, "over 99%")],
)
def test_a_chance_is_never_told_as_certain(chance: float, told: str) -> None:
    assert f"The chance that it is better is {told}." in paragraph(results("running", "undecided", chance))


def test_what_is_stopped_is_not_to_be_stopped() -> None:
    assert paragraph(results("running", "harmful", 0.0)).endswith("Stop it.")
    assert "Stop it" not in paragraph(results("stopped", "harmful", 0.0))
