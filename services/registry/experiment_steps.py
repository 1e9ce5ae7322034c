"""What an experiment does next by itself: starts and stops when it was told to, stops on what is proven,
moves a bandit's weights. Pure; `experiment_control.py` acts on it.

Only always-valid statements decide (`Evidence.finding`), so it does no harm that this looks twice a second. A
split that is not what was configured proves nothing: with one, only a proven rise of errors still stops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from headrace.v1.trials_pb2 import Evidence, TrialMetric, Verdict

from services.registry.buckets import BUCKETS
from services.registry.layers import bounded_weights

#: Outcomes that come later than this after the stop count no more.
CLOSE_AFTER: Final = timedelta(days=1)
_ERRORS: Final = "error_rate"
#: What clocks of two registries may be apart.
_CLOCKS_APART: Final = timedelta(seconds=5)


class Action(StrEnum):
    """What is to be done."""

    START = "start"
    STOP = "stop"
    REWEIGHT = "reweight"
    CLOSE = "close"


@dataclass(frozen=True, slots=True)
class BanditBounds:
    """In 1/10,000."""

    min_weight: int
    max_change: int
    update_every: timedelta


@dataclass(frozen=True, slots=True)
class Standing:
    """An experiment as it stands. `variants`: names, the control first; `weights`: in 1/10,000."""

    status: str
    revision: int
    variants: tuple[str, ...]
    weights: tuple[int, ...]
    start_at: datetime | None
    stop_at: datetime | None
    started_at: datetime | None
    weighted_at: datetime | None
    stopped_at: datetime | None
    closed_at: datetime | None
    auto_stop: bool
    bandit: BanditBounds | None


@dataclass(frozen=True, slots=True)
class Step:
    """What to do, why in words, and of REWEIGHT the new weights."""

    action: Action
    reason: str
    weights: tuple[int, ...] = ()


def next_step(experiment: Standing, verdict: Verdict | None, now: datetime) -> Step | None:
    """What is to be done now; None: nothing."""
    if experiment.status == "scheduled":
        return _scheduled(experiment, now)
    if experiment.status == "running":
        return _running(experiment, verdict, now)
    if experiment.status == "stopped" and experiment.closed_at is None:
        stopped = experiment.stopped_at
        if stopped is not None and now >= stopped + CLOSE_AFTER:
            return Step(Action.CLOSE, "a day has passed since it stopped: later outcomes count no more")
    return None


def _scheduled(experiment: Standing, now: datetime) -> Step | None:
    if experiment.stop_at is not None and experiment.stop_at <= now:
        return Step(Action.STOP, "its time to stop came before it could start")
    if experiment.start_at is None or experiment.start_at <= now:
        return Step(Action.START, "its time to start came" if experiment.start_at else "it was started")
    return None


def _running(experiment: Standing, verdict: Verdict | None, now: datetime) -> Step | None:
    if experiment.stop_at is not None and experiment.stop_at <= now:
        return Step(Action.STOP, "its time to stop came")
    if verdict is None:
        return None
    if experiment.auto_stop:
        reason = proven(verdict, experiment.variants)
        if reason:
            return Step(Action.STOP, reason)
    if experiment.bandit is not None:
        return _reweighted(experiment, experiment.bandit, verdict, now)
    return None


def proven(verdict: Verdict, variants: Sequence[str]) -> str:
    """Why an experiment of these variants, the control first, may stop: what is proven, in words; "":
    nothing.

    A guardrail proven harmful for one variant is enough, and so is a success metric proven better for one; a
    success metric proven worse must be so for every variant, else the others may still be better.
    """
    treatments = set(variants[1:])
    evidence = [one for one in verdict.evidence if one.arm in treatments]
    harmful = [one for one in evidence if one.finding == Evidence.FINDING_HARMFUL]
    if verdict.sample_ratio_mismatch:
        harmful = [one for one in harmful if one.metric == _ERRORS]
    for one in harmful:
        if one.role == TrialMetric.ROLE_GUARDRAIL:
            return f"{one.arm} is proven to harm {one.metric}: {one.reason}"
    if verdict.sample_ratio_mismatch:
        return ""
    for one in evidence:
        if one.finding == Evidence.FINDING_BETTER and one.role == TrialMetric.ROLE_SUCCESS:
            return f"{one.arm} is proven better in {one.metric}: {one.reason}"
    for metric in dict.fromkeys(one.metric for one in harmful):
        worse = [one for one in harmful if one.metric == metric]
        if {one.arm for one in worse} == treatments:
            return f"every variant is proven worse in {metric}: {worse[0].reason}"
    return ""


def _reweighted(experiment: Standing, bandit: BanditBounds, verdict: Verdict, now: datetime) -> Step | None:
    """Weights follow a verdict on the present ones only: one on weights of before would be acted on twice."""
    since = experiment.weighted_at or experiment.started_at
    # What lies ahead of now was so before the clock was set back; the revision holds it to one per verdict.
    if since is None or -_CLOCKS_APART <= now - since < bandit.update_every:
        return None
    if verdict.trial_revision != experiment.revision or verdict.sample_ratio_mismatch:
        return None
    if len(verdict.weights) != len(experiment.weights) or sum(verdict.weights) != BUCKETS:
        return None
    weights = bounded_weights(experiment.weights, list(verdict.weights), bandit.min_weight, bandit.max_change)
    if tuple(weights) == experiment.weights:
        return None
    parts = ", ".join(
        f"{name} {before / 100:g}% to {after / 100:g}%"
        for name, before, after in zip(experiment.variants, experiment.weights, weights, strict=True)
        if before != after
    )
    return Step(Action.REWEIGHT, f"the bandit follows the evidence: {parts}", tuple(weights))
