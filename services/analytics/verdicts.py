"""A verdict from what was observed: findings, the check of the split, counts, words. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from headrace.v1.trials_pb2 import ArmCount, Evidence, Trial, Verdict
from numpy.typing import NDArray
from scipy.special import gammaln, logsumexp, xlogy

from services.analytics import trial_words
from services.analytics.bandit import recommended_weights
from services.analytics.evidence import Observed, metric_key, weigh
from services.analytics.shadow_totals import ShadowTotals
from services.analytics.statistics.counts import SAMPLE_RATIO_LEVEL
from services.analytics.statistics.stratified import FEWEST_UNITS
from services.analytics.trial_queries import Counts, Tally, Visits
from services.analytics.trial_strata import Strata

Floats = NDArray[np.float64]

#: Prior strengths: a split that is badly off shows within dozens of units, one that is slightly off within
#: many.
_CONCENTRATIONS = (10.0, 100.0, 1_000.0, 10_000.0)


@dataclass(frozen=True, slots=True)
class Maxima:
    """The largest log e-values ever seen of one statement."""

    harm: float = 0.0
    safe: float = 0.0
    better: float = 0.0


#: By metric key and arm.
Statements = Mapping[tuple[str, str], Maxima]


def sample_ratio_log_e(strata: Strata, first: Tally) -> float:
    """Log e-value against "units come to the arms with the chances that were logged", each unit once, in the
    stratum it came in: Dirichlet-multinomial Bayes factors (Lindon & Malek, "Anytime-valid inference for
    multinomial count data", 2022) multiplied over strata, and averaged over how strong the prior is. Strata
    in which an arm's chance is not known say nothing; an arm whose chance is 0 takes no part."""
    usable = np.all(np.isfinite(strata.shares), axis=1)
    units, shares = first.units[usable], strata.shares[usable]
    if not units.size:
        return 0.0
    shares = shares / shares.sum(axis=1, keepdims=True)
    given = shares > 0
    logs = []
    for strength in _CONCENTRATIONS:
        prior = strength * shares
        found = (
            gammaln(strength)
            - gammaln(strength + units.sum(axis=1))
            + np.sum(gammaln(np.where(given, prior + units, 1)) - gammaln(np.where(given, prior, 1)), axis=1)
            - np.sum(xlogy(units, shares), axis=1)
        )
        logs.append(float(np.sum(found)))
    return float(logsumexp(logs) - math.log(len(logs)))


def settle(trial: Trial, evidence: Sequence[Evidence], largest: Statements) -> list[Evidence]:
    """The evidence with the largest e-values ever seen, what they prove and why. Harm goes before everything:
    where two findings contradict each other, which the error budget bounds, the careful one stands."""
    metrics = {metric_key(metric): metric for metric in trial.metrics}
    settled = []
    for one in evidence:
        ever = largest.get((one.metric, one.arm), Maxima())
        threshold = math.log(2 / one.alpha)
        made = Evidence()
        made.CopyFrom(one)
        made.log_e_harm = max(one.log_e_harm, ever.harm)
        made.log_e_safe = max(one.log_e_safe, ever.safe)
        made.log_e_better = max(one.log_e_better, ever.better)
        if made.log_e_harm >= threshold:
            made.finding = Evidence.FINDING_HARMFUL
        elif made.log_e_better >= threshold:
            made.finding = Evidence.FINDING_BETTER
        elif made.log_e_safe >= threshold:
            made.finding = Evidence.FINDING_SAFE
        made.reason = trial_words.reason(made, metrics[one.metric], trial.arms[0].name, trial.kind)
        settled.append(made)
    return settled


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at a trial saw, before what was seen earlier is added."""

    evidence: list[Evidence]
    arms: list[ArmCount]
    ratio_log_e: float
    weights: list[int]
    warnings: list[str]
    until_us: int


def look_at(trial: Trial, observed: Observed, counts: Sequence[Counts], until_us: int) -> Look:
    """Weigh everything that was observed before `until_us`."""
    ratio = max(0.0, sample_ratio_log_e(observed.strata, observed.visits.first))
    return Look(
        evidence=weigh(trial, observed),
        arms=[
            ArmCount(
                name=arm.name,
                requests=count.requests,
                units=count.units,
                errors=count.errors,
                requests_since=count.requests_since,
            )
            for arm, count in zip(trial.arms, counts, strict=True)
        ],
        ratio_log_e=ratio,
        weights=recommended_weights(trial, observed.cells, until_us),
        warnings=_warnings(trial, observed, counts),
        until_us=until_us,
    )


def verdict(
    trial: Trial, look: Look, largest: Statements, ratio_log_e: float, *, verdict_id: bytes, now_us: int
) -> Verdict:
    """What the trial's looks so far say; `ratio_log_e` is the largest ever seen."""
    mismatch = ratio_log_e >= math.log(1 / SAMPLE_RATIO_LEVEL)
    warnings = list(look.warnings)
    if mismatch:
        warnings.insert(
            0,
            "Sample ratio mismatch: units do not come to the arms as the weights promise (e-value "
            f"{math.exp(min(50.0, ratio_log_e)):.3g}), so no comparison proves anything before the cause is "
            "found.",
        )
    made = Verdict(
        verdict_id=verdict_id,
        trial_id=trial.trial_id,
        trial_revision=trial.revision,
        model=trial.model,
        computed_at_us=now_us,
        until_us=look.until_us,
        arms=look.arms,
        evidence=settle(trial, look.evidence, largest),
        sample_ratio_log_e=ratio_log_e,
        sample_ratio_mismatch=mismatch,
        weights=look.weights,
        warnings=warnings,
    )
    made.summary = trial_words.summary(trial, made)
    return made


def nothing_observed(trial: Trial, shadows: ShadowTotals) -> Observed:
    """Of a model that has answered nothing yet."""
    arms = len(trial.arms)
    empty = Tally(np.zeros((0, arms)), np.zeros((0, arms)))
    none = Tally(np.zeros(arms), np.zeros(arms))
    return Observed(Strata(np.zeros((0, arms)), -1), Visits(empty, [], none, none), shadows=shadows)


def _warnings(trial: Trial, observed: Observed, counts: Sequence[Counts]) -> list[str]:
    warnings = []
    few = [
        f"{arm.name} has {count.units}"
        for arm, count in zip(trial.arms, counts, strict=True)
        if 0 < count.units < FEWEST_UNITS
    ]
    if few:
        warnings.append(
            f"Few units ({', '.join(few)}): below {FEWEST_UNITS} an arm only error rates and quantiles are "
            "weighed."
        )
    exposed = observed.visits.first.units.sum(axis=0)
    none = [
        f"{arm.name}, whose weight is {arm.weight / 100:g}%"
        for arm, units in zip(trial.arms, exposed, strict=True)
        if 0 < arm.weight < 10_000 and not units
    ]
    if none and exposed.any():
        warnings.append(f"No unit has come to {' nor to '.join(none)}.")
    if len(observed.strata.shares) > 1:
        warnings.append(
            "The weights have changed: arms are compared within each set of weights, and a unit that a "
            "change moved counts with the arm that it had each time."
        )
    if any(arm.weight == 10_000 for arm in trial.arms[1:]) and trial.kind == Trial.KIND_ROLLOUT:
        warnings.append(
            "One arm has all traffic: what comes now is compared with the control's last time, which assumes "
            "that the world stays as it was."
        )
    return warnings
