"""Results in one paragraph, for whoever reads only that. Pure: made of the JSON that stands beside it."""

from __future__ import annotations

from typing import Any

from services.analytics.trial_words import is_share

Json = dict[str, Any]


def paragraph(results: Json) -> str:
    """Who ran against whom and how long, what is proven, what is not, and what speaks against believing
    it."""
    arms = results["arms"]
    if results["started_at"] is None:
        return _plan(results)
    if not any(arm["requests"] for arm in arms):
        return f"{_title(results)}: no request of it has been seen yet, so there is nothing to say."
    told = [_opening(results)]
    told += [
        sentence
        for metric in results["metrics"]
        for comparison in metric["comparisons"]
        if (sentence := _comparison(metric, comparison))
    ]
    if results["sample_ratio"]["mismatch"]:
        told.insert(
            1, "The split is not what was configured (sample ratio mismatch), so nothing here is proof yet."
        )
    told.append(_advice(results))
    return " ".join(told)


def _plan(results: Json) -> str:
    """What shall be compared with what, by what, and how much of it."""
    control, *others = (f"{arm['name']} ({arm['weight']:.4g} of the units)" for arm in results["arms"])
    metrics = ", ".join(metric["metric"].replace("_", " ") for metric in results["metrics"])
    planned = results["planned_units"]
    told = [
        "It was stopped before it started." if results["status"] == "stopped" else "It is not started.",
        f"{' and '.join(others)} against {control}",
        f"by {metrics}" if metrics else "by no metric yet",
        f"with {planned:,} units an arm" if planned else "for no planned size",
    ]
    return f"{_title(results)}: {told[0]} The plan: {', '.join(told[1:])}, at alpha {results['alpha']:g}."


def _title(results: Json) -> str:
    return str(results["name"] or results["trial_id"])


def _opening(results: Json) -> str:
    control, *others = results["arms"]
    against = " and ".join(f"{arm['name']} ({arm['units']:,} units)" for arm in others)
    end = "It has been stopped." if results["status"] == "stopped" else "It is still running."
    return f"{_title(results)}: {against} against {control['name']} ({control['units']:,} units). {end}"


def _comparison(metric: Json, comparison: Json) -> str:
    """One sentence on one metric and arm."""
    decision = comparison.get("decision")
    name, arm = metric["metric"], comparison["arm"]
    if decision is None or not decision["units"]:
        return f"Nothing has been measured of {name.replace('_', ' ')} for {arm} yet."
    share = is_share(name.split(":")[0])
    gap = _gap(decision["estimate"], share)
    lift = comparison.get("relative_lift")
    change = gap if lift is None else f"{gap} ({lift:+.1%})"
    proven = {
        "harmful": "this is proven to be harm beyond what was allowed",
        "better": "this is proven to be better",
        "safe": "it is proven to be no worse than allowed",
    }.get(decision["finding"])
    if proven is not None:
        return f"{_capital(name)} of {arm} differs by {change}, and {proven}, whenever one looks."
    low, high = decision["interval"]
    span = ""
    if abs(low) < float("inf") and abs(high) < float("inf"):
        span = f"; the truth lies between {_gap(low, share)} and {_gap(high, share)}"
    return (
        f"{_capital(name)} of {arm} differs by {change}, which proves nothing yet{span}.{_chance(comparison)}"
    )


def _chance(comparison: Json) -> str:
    bayesian = comparison.get("bayesian")
    if not bayesian:
        return ""
    chance = bayesian["chance_to_be_better"]
    told = "under 1%" if chance < 0.005 else "over 99%" if chance > 0.995 else f"{chance:.0%}"
    return f" The chance that it is better is {told}."


def _advice(results: Json) -> str:
    findings = {
        (metric["role"], comparison["decision"]["finding"])
        for metric in results["metrics"]
        for comparison in metric["comparisons"]
        if comparison.get("decision")
    }
    if any(finding == "harmful" for _, finding in findings):
        return "Late outcomes may still change this." if results["status"] == "stopped" else "Stop it."
    if results["sample_ratio"]["mismatch"]:
        return "Find out why the split is off before believing any of it."
    if ("success", "better") in findings:
        if ("guardrail", "undecided") in findings:
            return "The gain will hold; that no guardrail suffers is not proven yet."
        return "It may be ended: the result will hold."
    left = [
        days
        for metric in results["metrics"]
        for comparison in metric["comparisons"]
        if (days := comparison.get("time_to_decision", {}).get("always_valid_days_left"))
    ]
    if results["status"] == "stopped":
        return "Late outcomes may still change this."
    if left:
        return f"At this pace a decision takes about {_days(min(left))} more."
    return "Let it run."


def _days(days: float) -> str:
    if days < 1 / 24:
        return f"{max(1, round(days * 1440))} minutes"
    if days < 2:
        return f"{max(1, round(days * 24))} hours"
    return f"{round(days):,} days"


def _gap(value: float, share: bool) -> str:
    return f"{value * 100:+.2f} points" if share else f"{value:+.4g}"


def _capital(text: str) -> str:
    return (text[:1].upper() + text[1:]).replace("_", " ")
