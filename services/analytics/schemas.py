"""How answers look in JSON."""

from __future__ import annotations

import base64
import math
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from headrace.v1.tensor_pb2 import Code, DataType

from services.analytics.reading import Found
from services.analytics.tables import OutcomeRow
from services.common.ids import id_text

if TYPE_CHECKING:  # they import SciPy, which takes most of a second
    from services.analytics.comparison import ArmEstimate, Comparison, QuantileComparison
    from services.analytics.statistics.counts import CountTest
    from services.analytics.statistics.fixed_horizon import Inference

Json = dict[str, Any]

_ORIGINS = {1: "online", 2: "shadow", 3: "batch"}
#: The last second that a datetime can hold; one of another zone may be later.
_LATEST_US = 253_402_300_799_000_000


def instant(unix_us: int) -> str:
    """RFC 3339 in UTC."""
    return datetime.fromtimestamp(unix_us / 1e6, UTC).isoformat()


def unix_us(moment: datetime) -> int:
    """Unix microseconds, within what `instant` can show: nothing was logged before 1970."""
    return min(max(round(moment.timestamp() * 1e6), 0), _LATEST_US)


def period_json(since_us: int, until_us: int | None) -> Json:
    """What the answer is about; `until` null: up to now."""
    return {"since": instant(since_us), "until": None if until_us is None else instant(until_us)}


def code_name(code: int) -> str:
    """`INTERNAL`; the number where it has no name."""
    return Code.Name(code).removeprefix("CODE_") if code in Code.values() else str(code)


def version_json(row: Json, outcomes: list[Json], accuracy: Json | None) -> Json:
    """One version and variant of the summary."""
    from services.analytics.statistics.proportions import wilson  # noqa: PLC0415 - see above

    decided = row["requests"] - row["cancelled"]
    quantiles = row["latency_quantiles"] or [None] * 3
    shown: Json = {
        metric["metric"]: {"n": metric["n"], "mean": metric["mean"], "sd": metric["sd"]}
        for metric in outcomes
        if metric["metric"] != "label"
    }
    if accuracy is not None:
        correct, n = float(accuracy["correct"] or 0), int(accuracy["n"])
        shown["accuracy"] = {
            "n": n,
            "mean": correct / n if n else None,
            "interval": list(wilson(correct, n)) if n else None,
            "unmapped": accuracy["unmapped"],
        }
    return {
        "version": row["version"],
        "variant": row["variant"],
        "experiment": row["experiment"],
        "artifact_digest": row["artifact_digest"],
        "requests": row["requests"],
        "units": row["units"],
        "errors": row["errors"],
        "cancelled": row["cancelled"],
        "error_rate": row["errors"] / decided if decided else None,
        "error_rate_interval": list(wilson(row["errors"], decided)) if decided else None,
        "errors_by_code": {code_name(code): n for code, n in row["codes"].items()},
        "cached": row["cached"],
        "latency_ms": {
            "mean": row["latency_mean"],
            "sd": row["latency_sd"],
            **{
                name: None if value is None else value / 1000
                for name, value in zip(("p50", "p95", "p99"), quantiles, strict=True)
            },
        },
        "outcomes": shown,
        "first_at": instant(row["first_at_us"]),
        "last_at": instant(row["last_at_us"]),
    }


def unmapped_warnings(accuracies: list[Json]) -> list[str]:
    """One sentence for each version with labels that accuracy leaves out."""
    return [
        f"{one['unmapped']} labels of version {one['version']} are left out of accuracy: they name none of "
        "its classes, or what it predicted is not in the log."
        for one in accuracies
        if one["unmapped"]
    ]


def comparison_json(model: str, metric: str, found: Comparison) -> Json:
    """Every number a person needs, and one sentence."""
    return {
        "model": model,
        "metric": metric,
        "a": _arm_json(found.a),
        "b": _arm_json(found.b),
        "method": found.fixed.method if found.fixed else None,
        "absolute": _inference_json(found.fixed),
        "relative": _inference_json(found.relative),
        "sequential": _inference_json(found.sequential),
        "sample_ratio": _count_json(found.sample_ratio),
        "assumptions": found.assumptions,
        "warnings": found.warnings,
        "summary": sentence(metric, found),
    }


def quantile_json(found: QuantileComparison) -> Json:
    """One quantile of both arms and their difference, in the unit of the metric."""
    return {
        "share": found.a.share,
        **{
            name: {"value": side.value, "interval": [side.low, side.high]}
            for name, side in (("a", found.a), ("b", found.b))
        },
        "difference": _inference_json(found.difference),
    }


def sentence(metric: str, found: Comparison) -> str:
    """What the comparison says, plainly; only the sequential result decides."""
    if found.fixed is None:
        return f"There is too little data to compare {metric} of {found.a.name} and {found.b.name}."
    if found.sequential is None:
        return (
            f"{metric}: {found.a.mean:.5g} for {found.a.name} ({found.a.units} units), {found.b.mean:.5g} "
            f"for {found.b.name} ({found.b.units} units); no difference is shown at any time of looking yet."
        )
    low, high = found.sequential.ci
    verdict = "no difference is shown yet"
    if found.sequential.p_value < found.sequential.alpha:
        verdict = "the difference is real at any time of looking"
    elif found.fixed.p_value < found.fixed.alpha:
        verdict = "a difference shows only if this look was the one planned"
    return (
        f"{metric}: {found.a.mean:.5g} for {found.a.name} ({found.a.units} units), {found.b.mean:.5g} for "
        f"{found.b.name} ({found.b.units} units); {verdict} (difference {found.fixed.estimate:+.5g}, "
        f"always-valid interval {low:+.5g} to {high:+.5g})."
    )


def prediction_json(found: Found) -> Json:
    """What answered a request, and what was said about it. `attempts` holds every row it left."""
    answer = found.rows[0]
    return row_json(answer) | {
        "rows": answer["rows"],
        "source": answer["source"],
        "queue_ms": answer["queue_us"] / 1000,
        "compute_ms": answer["compute_us"] / 1000,
        "inputs": _tensors_json(answer, "input:"),
        "outputs": _tensors_json(answer, "output:"),
        "predicted": [_element(one) for one in answer["predicted_text"] or answer["predicted"] or []] or None,
        "outcomes": [outcome_json(outcome) for outcome in found.outcomes],
        "attempts": [row_json(row) for row in found.rows],
    }


def row_json(row: Json) -> Json:
    """One logged row, without its payload."""
    return {
        "request_id": id_text(row["request_id"]),
        "model": row["model"],
        "version": row["version"],
        "artifact_digest": row["artifact_digest"] or None,
        "variant": row["variant"],
        "experiment": row.get("experiment"),
        "answered_at": instant(row["answered_at_us"]),
        "code": code_name(row["code"]),
        "latency_ms": row["latency_us"] / 1000,
        "cached": row["cached"],
        "origin": _ORIGINS.get(row["origin"], str(row["origin"])),
        "attempt": row["attempt"],
        "propensity": row["propensity"] if math.isfinite(row["propensity"]) else None,
        "revision": row["revision"],
        "unit_hash": f"{row['unit_hash']:016x}",
    }


def outcome_json(outcome: OutcomeRow) -> Json:
    """One outcome."""
    return {
        "event_id": id_text(outcome.event_id),
        "metric": outcome.metric,
        "value": outcome.number if outcome.number is not None else outcome.text,
        "row": outcome.row,
        "observed_at": instant(outcome.observed_at_us),
    }


def _arm_json(arm: ArmEstimate) -> Json:
    return asdict(arm)


def _inference_json(result: Inference | None) -> Json | None:
    if result is None:
        return None
    finite = math.isfinite(result.degrees_of_freedom)
    return {
        "estimate": result.estimate,
        "std_error": result.std_error,
        "interval": list(result.ci),
        "p_value": result.p_value,
        "statistic": result.statistic if math.isfinite(result.statistic) else None,
        "degrees_of_freedom": result.degrees_of_freedom if finite else None,
        "alpha": result.alpha,
        "method": result.method,
        "always_valid": result.always_valid,
    }


def _count_json(test: CountTest | None) -> Json | None:
    return None if test is None else {"chi2": test.chi2, "p_value": test.p_value}


def _tensors_json(row: Json, prefix: str) -> Json | None:
    tensors = {}
    for name, value in row.items():
        if name.startswith(prefix) and value is not None:
            elements, datatype, row_shape = value
            tensors[name.removeprefix(prefix)] = {
                "datatype": DataType.Name(datatype).removeprefix("DATA_TYPE_"),
                "row_shape": row_shape,
                "data": [_element(element) for element in elements],
            }
    return tensors or None


def _element(element: Any) -> Any:
    if isinstance(element, bytes):
        try:
            return element.decode()
        except UnicodeDecodeError:
            return {"base64": base64.b64encode(element).decode()}
    if isinstance(element, float) and not math.isfinite(element):
        return str(element)
    return element
