"""How large an experiment has to be, and how long that takes. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from scipy import stats

from services.analytics.statistics import group_sequential, power
from services.analytics.statistics.boundaries import normal_mixture
from services.common.errors import InvalidArgument

Json = dict[str, Any]
Metric = Literal["proportion", "mean"]
Bounds = Literal["obrien_fleming", "pocock"]

SPENDING: dict[Bounds, group_sequential.Spending] = {
    "obrien_fleming": group_sequential.obrien_fleming_spending,
    "pocock": group_sequential.pocock_spending,
}

_LOOK_WALKS = 100_000
_WALKS, _STEPS, _HORIZON, _SEED = 10_000, 400, 4.0, 20_260
#: The normal law's sizes hold from about this many expected events of a kind on.
_FEW_EVENTS = 10


@dataclass(frozen=True, slots=True)
class Question:
    """`base` is the control's share or mean; `effect` the absolute change to find, or None with `units`: the
    least change that so many units of the control find. `sd` is for means. `ratio`: units of a treatment per
    unit of the control. `metrics`: how many the experiment decides by, this one included."""

    metric: Metric
    base: float
    effect: float | None = None
    sd: float = 1.0
    alpha: float = 0.05
    power: float = 0.8
    variants: int = 2
    ratio: float = 1.0
    sequential: bool = True
    units_per_day: float | None = None
    units: int | None = None
    looks: int = 5
    metrics: int = 1

    @property
    def alpha_per_comparison(self) -> float:
        """Of this metric in one variant: what a fixed-horizon test of it may err by."""
        return self.alpha / (self.variants - 1)

    @property
    def alpha_per_statement(self) -> float:
        """What the deciding path gives each statement, one per metric and variant (`evidence`)."""
        return self.alpha_per_comparison / self.metrics


@dataclass(frozen=True, slots=True)
class SequentialCost:
    """What looking whenever one wants costs, in multiples of the fixed-horizon size: `at_most` has the same
    power, `on_average` is where it ends if the effect is the planned one, `without_effect` if there is none
    and it is given up at `at_most`."""

    at_most: float
    on_average: float


def plan(question: Question) -> Json:
    """Units for a fixed-horizon test, an always-valid one and a few planned looks, or the least effect that
    given units find. Comparisons of several variants share alpha equally; of what is looked at whenever one
    wants, which is what decides, metrics share it as well."""
    alpha = question.alpha_per_comparison
    shown: Json = {
        "metric": question.metric,
        "baseline": question.base,
        "sd": question.sd if question.metric == "mean" else None,
        "alpha": question.alpha,
        "alpha_per_comparison": alpha,
        "alpha_per_statement": question.alpha_per_statement,
        "metrics": question.metrics,
        "power": question.power,
        "variants": question.variants,
        "ratio": question.ratio,
    }
    if question.effect is None:
        return shown | _detectable(question, alpha, question.units or 0)
    units = math.ceil(_units(question, alpha) - 1e-9)
    shown |= {
        "effect": question.effect,
        "relative_effect": question.effect / question.base if question.base else None,
        **_sizes(question, units),
        "method": _method(question),
        "warnings": _warnings(question, units),
    }
    if question.sequential:
        shared = question.alpha_per_statement
        cost = sequential_cost(shared, question.power)
        base = math.ceil(_units(question, shared) - 1e-9)
        at_most, on_average = (math.ceil(base * factor) for factor in (cost.at_most, cost.on_average))
        shown["always_valid"] = {
            "at_most": _sizes(question, at_most),
            "on_average": _sizes(question, on_average),
            # Of the fixed-horizon size above, which knows nothing of other metrics.
            "factor_at_most": round(at_most / units, 2),
            "factor_on_average": round(on_average / units, 2),
            "alpha": shared,
            "method": (
                "asymptotic confidence sequence tuned to the fixed-horizon size, looked at all the time, at "
                f"{_share_of(question)}; factors simulated"
            ),
        }
        shown["planned_looks"] = {
            bounds: {
                "looks": question.looks,
                "factor": (factor := planned_looks_cost(bounds, question.looks, alpha, question.power)),
                **_sizes(question, math.ceil(units * factor)),
            }
            for bounds in SPENDING
        }
    shown["summary"] = _words(question, shown)
    return shown


@lru_cache(maxsize=64)
def sequential_cost(alpha: float, wanted: float) -> SequentialCost:
    """By `_WALKS` seeded random walks with the drift that gives the fixed-horizon test its power, looked at
    `_STEPS` times up to `_HORIZON` times its size, against the boundary that decides "better" (alpha / 2 on
    that side)."""
    times = np.linspace(_HORIZON / _STEPS, _HORIZON, _STEPS)
    bound = np.array([normal_mixture(t, alpha / 2, v_opt=1.0, one_sided=True) for t in times])
    drift = float(stats.norm.isf(alpha / 2) + stats.norm.ppf(wanted))
    rng = np.random.default_rng(_SEED)
    steps = rng.standard_normal((_WALKS, _STEPS), dtype=np.float32) * math.sqrt(times[0])
    crossed = np.cumsum(steps, axis=1) + drift * times >= bound
    found = crossed.any(axis=1)
    when = np.where(found, times[np.argmax(crossed, axis=1)], np.inf)
    most = float(np.quantile(when, wanted, method="higher"))
    if not math.isfinite(most):
        most = _HORIZON
    return SequentialCost(round(most, 2), round(float(np.minimum(when, most).mean()), 2))


@lru_cache(maxsize=64)
def planned_looks_cost(bounds: Bounds, looks: int, alpha: float, wanted: float) -> float:
    """The size at which that many even looks with group-sequential bounds have the power, in multiples of the
    fixed-horizon size: by seeded random walks."""
    times = np.arange(1, looks + 1) / looks
    limits = np.array(group_sequential.bounds(times.tolist(), alpha=alpha, spending=SPENDING[bounds]))
    rng = np.random.default_rng(_SEED)
    walks = np.cumsum(rng.standard_normal((_LOOK_WALKS, looks)), axis=1) / np.sqrt(np.arange(1, looks + 1))
    drift = float(stats.norm.isf(alpha / 2) + stats.norm.ppf(wanted)) * np.sqrt(times)
    # Of each walk the least root of the factor that carries it over some bound.
    needed = np.min((limits - walks) / drift, axis=1)
    return round(float(np.quantile(np.maximum(needed, 0.0), wanted)) ** 2, 3)


def _units(question: Question, alpha: float) -> float:
    effect = question.effect or 0.0
    options: dict[str, Any] = {"power": question.power, "alpha": alpha, "ratio": question.ratio}
    if question.metric == "mean":
        return power.sample_size_mean(effect, question.sd, **options)
    return power.sample_size_two_proportions(question.base, question.base + effect, **options)


def _sizes(question: Question, units: int) -> Json:
    treated = math.ceil(units * question.ratio)
    total = units + treated * (question.variants - 1)
    shown: Json = {
        "units_per_variant": units if question.ratio == 1 else None,
        "units": {"control": units, "treatment": treated},
        "total_units": total,
    }
    if question.units_per_day is not None:
        shown["days"] = total / question.units_per_day
    return shown


def _detectable(question: Question, alpha: float, units: int) -> Json:
    def effects(size: float, alpha: float) -> Json:
        options: dict[str, Any] = {"power": question.power, "alpha": alpha, "ratio": question.ratio}
        if question.metric == "mean":
            least = power.detectable_mean(size, question.sd, **options)
            found: dict[str, float | None] = {"rise": least, "fall": -least}
        else:
            found = {
                name: power.detectable_proportion(size, question.base, rise=rise, **options)
                for name, rise in (("rise", True), ("fall", False))
            }
        shown: Json = dict(found)
        for name, effect in found.items():
            shown[f"relative_{name}"] = (
                effect / question.base if effect is not None and question.base else None
            )
        return shown

    shown: Json = {
        **_sizes(question, units),
        "detectable": effects(units, alpha),
        "method": _method(question),
    }
    if question.sequential:
        shared = question.alpha_per_statement
        cost = sequential_cost(shared, question.power)
        shown["always_valid"] = {
            "detectable": effects(max(2.0, units / cost.at_most), shared),
            "factor_at_most": cost.at_most,
            "alpha": shared,
        }
    rise = shown["detectable"]["rise"]
    shown["warnings"] = []
    shown["summary"] = (
        f"{units:,} units of the control find no change of that share at all; plan for more."
        if rise is None
        else f"{units:,} units of the control find a change of {rise:.4g} or more with "
        f"{question.power:.0%} power."
    )
    return shown


def _method(question: Question) -> str:
    if question.metric == "mean":
        return "two-sided t-test, noncentral t"
    return "two-sided two-proportion z-test, pooled variance under the null"


def _share_of(question: Question) -> str:
    """The part of alpha that the deciding statement has, in words."""
    statements = question.metrics * (question.variants - 1)
    if statements == 1:
        return f"alpha {question.alpha:g}"
    return (
        f"alpha {question.alpha_per_statement:.4g}, one of {statements} equal shares (metrics × variants) of "
        f"{question.alpha:g}"
    )


def _warnings(question: Question, units: int) -> list[str]:
    if question.metric == "mean":
        return []
    shares = (question.base, question.base + (question.effect or 0.0))
    fewest = min(units * min(share, 1 - share) for share in shares)
    if fewest >= _FEW_EVENTS:
        return []
    return [f"Fewer than {_FEW_EVENTS} events of a kind are expected in an arm, so the size is a rough one."]


def _words(question: Question, shown: Json) -> str:
    units, relative = shown["units"], shown["relative_effect"]
    change = f"{shown['effect']:+.4g}" + (f" ({relative:+.1%})" if relative is not None else "")
    each = (
        f"{units['control']:,} units in each variant"
        if shown["units_per_variant"]
        else f"{units['control']:,} units of the control and {units['treatment']:,} of each treatment"
    )
    told = (
        f"To find a change of {change} from {shown['baseline']:.4g} with {shown['power']:.0%} power at "
        f"alpha {shown['alpha']:g}: {each}, looked at once at the end"
    )
    told += f", about {shown['days']:.3g} days." if "days" in shown else "."
    sequential = shown.get("always_valid")
    if sequential:
        most, mean = (sequential[name]["units"]["control"] for name in ("at_most", "on_average"))
        told += (
            f" Looked at whenever one wants, as decisions are made, at {_share_of(question)}: {most:,} of "
            f"the control for the same power, {mean:,} on average if the effect is there."
        )
    return told


def effect_of(effect: float | None, relative_effect: float | None, base: float) -> float:
    """The absolute effect; exactly one of the two is given."""
    if (effect is None) == (relative_effect is None):
        field = "effect" if effect is None else "relative_effect"
        raise InvalidArgument("Give either effect or relative_effect.", field=field)
    if effect is None:
        assert relative_effect is not None  # noqa: S101 - for the type checker
        if base == 0:
            raise InvalidArgument(
                "Nothing is relative to a baseline of 0; give effect.", field="relative_effect"
            )
        effect = relative_effect * base
    if effect == 0:
        name = "effect" if relative_effect is None else "relative_effect"
        raise InvalidArgument("No sample finds an effect of zero.", field=name)
    return effect
