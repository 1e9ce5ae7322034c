"""What speaks against believing a trial's numbers, and what they assume. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from headrace.v1.trials_pb2 import Trial

from services.analytics.evidence import Observed, metric_key
from services.analytics.shadow_evidence import SHADOW_METRICS
from services.analytics.statistics import counts
from services.analytics.trial_queries import Counts
from services.analytics.trial_strata import BEFORE

_FEW_UNITS = 100


def warnings(trial: Trial, observed: Observed, arms: Sequence[Counts], *, tested: bool) -> list[str]:
    """Beside those of the verdict. `tested`: fixed-horizon numbers are shown."""
    found = []
    if not trial.started_at_us:
        return []
    if not any(count.requests for count in arms):
        return ["No request of it has been seen yet: there is nothing to say so far."]
    if tested:
        if not trial.planned_units:
            found.append(
                "Peeking: fixed-horizon numbers hold at one look planned beforehand, and no size was "
                "planned. Decide by the always-valid ones."
            )
        elif min(count.units for count in arms) < trial.planned_units:
            found.append(
                f"Peeking: fixed-horizon numbers are shown before the planned {trial.planned_units} units "
                "an arm; whoever decides by them now is wrong more often than they say."
            )
    return found + _outcome_warnings(trial, observed)


def _outcome_warnings(trial: Trial, observed: Observed) -> list[str]:
    """What the values themselves give away: units without one, units with several arms, rare events."""
    found = []
    exposed = observed.visits.first.units.sum(axis=0)
    for metric in trial.metrics:
        if metric.quantile and exposed.any() and not observed.histograms.get(metric_key(metric)):
            found.append(
                f"{metric_key(metric)}: no value has come yet, or some lie below zero; quantiles are of "
                "values above it."
            )
        bounded = observed.bounded.get(metric.name)
        if bounded is not None and bounded.outside:
            found.append(
                f"{metric.name}: {bounded.outside} units have a value beyond the range {metric.low:g} to "
                f"{metric.high:g} that was said to hold all; exact statements take it for the range's end."
            )
        cells = observed.cells.get(metric.name)
        if cells is None or metric.quantile:
            continue
        chosen = cells.where(cells.strata < BEFORE)
        arms = [np.unique(chosen.units[chosen.arms == arm]) for arm in range(len(trial.arms))]
        sizes = np.array([side.size for side in arms])
        few = [arm.name for arm, size in zip(trial.arms, sizes, strict=True) if 0 < size < _FEW_UNITS]
        if few:
            found.append(
                f"{metric.name}: fewer than {_FEW_UNITS} units have a value in {', '.join(few)}; "
                "fixed-horizon numbers are rough."
            )
        if sizes.sum() == 0:
            found.append(f"{metric.name}: no value has come yet.")
            continue
        crossed = int(sizes.sum() - np.unique(chosen.units).size)
        if crossed and np.unique(chosen.strata).size < 2:
            found.append(
                f"{metric.name}: {crossed} units met more than one arm although the weights never changed."
            )
        missing = np.maximum(exposed - sizes, 0)
        if not metric.missing_is_zero and metric.name not in ("error_rate", "latency_ms") and exposed.all():
            table = np.vstack((sizes, missing))
            if counts.contingency(table).p_value < counts.SAMPLE_RATIO_LEVEL:
                shares = ", ".join(
                    f"{arm.name} {lost / n:.1%}"
                    for arm, lost, n in zip(trial.arms, missing, exposed, strict=True)
                )
                found.append(
                    f"{metric.name}: units lack a value more often in one arm than in the other ({shares}); "
                    "those who have one may be other people in either arm."
                )
    return found


def assumptions(trial: Trial) -> list[str]:
    """What every number of the results rests on."""
    shadows = (
        "Of shadows the first compared request of each unit is weighed; requests that name no unit are taken "
        "for independent of one another."
    )
    return [
        *([shadows] if any(metric.name in SHADOW_METRICS for metric in trial.metrics) else []),
        "Units are independent of each other; all requests and outcomes of one unit count together.",
        "A unit counts by the arm that chance gave it; overrides and requests naming a version are left out.",
        "Fixed-horizon numbers hold at one look, at the size planned for; always-valid ones at any look.",
        (
            f"Of the error budget of {trial.alpha:g}, each statement of the decision has an equal part; the "
            "always-valid interval beside it is of this metric and arm alone."
        ),
        "Means need about 100 units an arm for the normal law; error rates and quantiles need none.",
    ]
