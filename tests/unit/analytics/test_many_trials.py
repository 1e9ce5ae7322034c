"""Hundreds of trials: a delivery has those looked at whose models are in it, and no others."""

from __future__ import annotations

from typing import Any

from headrace.v1.trials_pb2 import Trial, TrialArm
from prometheus_client import CollectorRegistry

from services.analytics.looking import Looking
from services.analytics.metrics import Metrics
from services.analytics.trials import Trials
from services.common.clock import ManualClock


class Asked(Trials):
    """Remembers about which models it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.models: list[str] = []

    def open(self, model: str = "") -> list[Trial]:
        self.models.append(model)
        return super().open(model)


def say(trials: Trials, name: str, model: str, revision: int = 1, **fields: Any) -> None:
    arms = [TrialArm(name="a"), TrialArm(name="b")]
    said: dict[str, Any] = {"arms": arms, "started_at_us": 1, "revision": revision} | fields
    trials.apply(name.encode(), Trial(trial_id=name, model=model, **said).SerializeToString())


def names(found: list[Trial]) -> list[str]:
    return [trial.trial_id for trial in found]


def test_what_is_new_of_a_model_has_only_its_own_trials_looked_at() -> None:
    trials = Asked()
    nothing: Any = None
    looking = Looking(trials, nothing, nothing, nothing, ManualClock(), Metrics(CollectorRegistry()), 0.5)
    for number in range(3):
        say(trials, f"t{number}", f"m{number}")
    looking.seen("m1")
    looking.seen("")
    assert trials.models == ["m0", "m1", "m2", "m1", ""]


def test_trials_by_model_follow_the_topic() -> None:
    trials = Trials()
    say(trials, "t1", "m")
    say(trials, "t2", "m", started_at_us=0)
    say(trials, "t3", "other")
    assert names(trials.open("m")) == ["t1"]
    assert names(trials.of("m")) == ["t1", "t2"]
    say(trials, "t1", "m", 2, closed=True)
    say(trials, "t2", "other", 2)
    assert trials.open("m") == []
    assert names(trials.of("m")) == ["t1"]
    assert names(trials.open("other")) == ["t3", "t2"]
    trials.apply(b"t1", None)
    trials.apply(b"t3", None)
    assert trials.of("m") == []
    assert names(trials.open()) == names(trials.of("other")) == ["t2"]
    assert trials.ended == {"t1", "t3"}
