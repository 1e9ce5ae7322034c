"""What shadow totals say, with intervals: how often a shadow version agrees, how far its numbers lie away,
and what it does to latency and errors. Pure."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

from headrace.v1.events_pb2 import OutputComparison

from services.analytics.shadow_totals import OutputTotals, ShadowTotals

Json = dict[str, Any]

#: Below so many requests, intervals are rough.
_FEW = 100
_SHARES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}


def report(model: str, version: str, shadow_version: str, totals: ShadowTotals, alpha: float) -> Json:
    """Every number a person or a rollout needs of one version and its shadow. Differences are shadow minus
    version, over the same requests (paired)."""
    compared = totals.equal + totals.different
    return {
        "version": version,
        "shadow_version": shadow_version,
        "requests": totals.requests,
        "verdicts": {
            "equal": totals.equal,
            "different": totals.different,
            "failed": totals.failed,
            "incomparable": totals.incomparable,
        },
        "match": _share(totals.equal, compared, alpha, totals.units.design_effect()),
        "rows_match": _share(totals.rows_equal, totals.rows, alpha, totals.units.design_effect()),
        "units": _units(totals),
        "errors": _errors(totals, alpha),
        "latency_ms": _latency(totals, alpha),
        "outputs": {name: _output(output, alpha) for name, output in sorted(totals.outputs.items())},
        "slices": {name: _slice(part, alpha) for name, part in sorted(totals.slices.items())},
        "alpha": alpha,
        "assumptions": [
            "Both versions answered the same requests.",
            _independence(totals),
            "The intervals hold at one look at a time chosen beforehand.",
            "Quantiles are within 1% of their value.",
        ],
        "warnings": _warnings(totals, compared),
        "summary": _sentence(model, version, shadow_version, totals, compared, alpha),
    }


def _slice(totals: ShadowTotals, alpha: float) -> Json:
    """What a report says, of the requests with one value of an attribute. Each interval is by itself: among
    many slices one misses by chance."""
    return {
        "requests": totals.requests,
        "match": _share(totals.equal, totals.equal + totals.different, alpha),
        "errors": _errors(totals, alpha),
        "latency_ms": _latency(totals, alpha),
    }


def _units(totals: ShadowTotals) -> Json | None:
    """The units that are known, of which the design effect is estimated."""
    sample = totals.units
    if not len(sample.units):
        return None
    return {
        "sampled": len(sample.units),
        "of_all": 0.5**sample.level,
        "requests_without_one": sample.unnamed,
        "design_effect": sample.design_effect(),
    }


def _independence(totals: ShadowTotals) -> str:
    if not len(totals.units.units):
        return "Requests are independent of one another: the log does not say whose they are."
    return (
        "Units are independent of each other; that requests of one unit are alike widens the intervals of "
        "what matches (design effect). Intervals of errors, latency and slices take requests for independent."
    )


def _share(count: int, n: int, alpha: float, design_effect: float = 1.0) -> Json:
    """A share with Wilson's score interval, of as many independent requests as these are worth."""
    from services.analytics.statistics.proportions import wilson  # noqa: PLC0415 - SciPy takes a second

    return {
        "n": n,
        "rate": count / n if n else None,
        "interval": list(wilson(count / design_effect, n / design_effect, alpha=alpha)) if n else None,
    }


def _errors(totals: ShadowTotals, alpha: float) -> Json:
    """Error rates and their paired difference (b - c) / n over the pairs that disagree; its variance is that
    of a mean of -1, 0 and 1, with half a pair added on either side so that no disagreement is not certainty
    (Agresti & Min, "Simple improved confidence intervals for comparing matched proportions", 2005)."""
    n = totals.requests
    shown: Json = {
        "version": _share(totals.errors, n, alpha),
        "shadow_version": _share(totals.shadow_errors, n, alpha),
        "difference": None,
        "interval": None,
    }
    if n:
        more, less = totals.only_shadow_errors + 0.5, totals.only_errors + 0.5
        size = n + 2
        centre = (more - less) / size
        spread = _z(alpha) * ((more + less) - (more - less) ** 2 / size) ** 0.5 / size
        shown["difference"] = (totals.only_shadow_errors - totals.only_errors) / n
        shown["interval"] = [max(-1.0, centre - spread), min(1.0, centre + spread)]
    return shown


def _latency(totals: ShadowTotals, alpha: float) -> Json:
    shown: Json = {
        "n": totals.answered,
        "version": _quantiles(totals.latency, 1e-3),
        "shadow_version": _quantiles(totals.shadow_latency, 1e-3),
        "mean_difference": None,
        "interval": None,
    }
    n = totals.answered
    if n > 1:
        mean = totals.latency_gaps / n
        variance = max(0.0, totals.latency_squares - n * mean * mean) / (n - 1)
        spread = _z(alpha) * (variance / n) ** 0.5
        shown["mean_difference"] = mean / 1000
        shown["interval"] = [(mean - spread) / 1000, (mean + spread) / 1000]
    return shown


def _output(output: OutputTotals, alpha: float) -> Json:
    kind = (
        OutputComparison.Kind.Name(OutputComparison.Kind.ValueType(output.kind)).removeprefix("KIND_").lower()
    )
    shown: Json = {"kind": kind, "rows_match": _share(output.rows_equal, output.rows, alpha)}
    if output.kind == OutputComparison.KIND_NUMBER:
        shown["largest_difference"] = {
            **_quantiles(output.differences, 1.0),
            "max": output.largest if output.requests else None,
        }
        shown["mean_difference"] = output.sum_of_means / output.requests if output.requests else None
    if output.scored:
        shown["same_top"] = _share(output.rows_same_top, output.scored, alpha)
    if output.ranked:
        shown["same_top_five"] = _share(output.rows_same_top_five, output.ranked, alpha)
    return shown


def _quantiles(histogram: Any, scale: float) -> Json:
    found = {name: histogram.quantile(share) for name, share in _SHARES.items()}
    return {name: None if value is None else value * scale for name, value in found.items()}


def _warnings(totals: ShadowTotals, compared: int) -> list[str]:
    warnings = []
    if compared < _FEW:
        warnings.append(f"Only {compared} answers were compared: intervals are rough below {_FEW}.")
    if totals.incomparable:
        warnings.append(
            f"{totals.incomparable} answers could not be compared: names, types or shapes of the outputs "
            "differ, or they are too large."
        )
    return warnings


def _sentence(
    model: str, version: str, shadow_version: str, totals: ShadowTotals, compared: int, alpha: float
) -> str:
    who = f"{shadow_version}, the shadow of {model}/{version},"
    if not compared:
        return f"{who} has given no answer that could be compared yet."
    match = _share(totals.equal, compared, alpha, totals.units.design_effect())
    low, high = match["interval"]
    errors = _errors(totals, alpha)
    said = (
        f"{who} gave the same answer to {match['rate']:.2%} of {compared} requests "
        f"({1 - alpha:.0%} interval {low:.2%} to {high:.2%}); its error rate differs by "
        f"{errors['difference']:+.3%} ({errors['interval'][0]:+.3%} to {errors['interval'][1]:+.3%})"
    )
    latency = _latency(totals, alpha)
    if latency["interval"] is None:
        return f"{said}."
    return (
        f"{said} and its mean latency by {latency['mean_difference']:+.3f} ms "
        f"({latency['interval'][0]:+.3f} to {latency['interval'][1]:+.3f})."
    )


def _z(alpha: float) -> float:
    return NormalDist().inv_cdf(1 - alpha / 2)
