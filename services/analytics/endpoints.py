"""The REST API of the analytics service, behind the gateway's door."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

import duckdb
from fastapi import APIRouter, Path, Query
from sqlalchemy.ext.asyncio import AsyncEngine

from services.analytics import arm_queries, queries, schemas, shadows
from services.analytics.arm_queries import Arms
from services.analytics.reading import Reader
from services.analytics.schemas import Json
from services.analytics.shadow_report import report
from services.common.clock import Clock
from services.common.errors import InvalidArgument, NotFound
from services.common.ids import parse_id

if TYPE_CHECKING:
    from services.analytics.comparison import Comparison

#: As `comparison.Missing`.
Missing = Literal["zero", "exclude"]
#: PostgreSQL takes no zeros within text.
_TEXT = r"^[^\x00]*$"
Name = Annotated[str, Query(min_length=1, max_length=64, pattern=_TEXT)]
Model = Annotated[str, Path(pattern=_TEXT)]
Instant = Annotated[datetime | None, Query()]
#: Quantiles at less than this have no digits left.
Alpha = Annotated[float, Query(ge=1e-12, lt=0.5)]

_BUILT_IN = {"error_rate": None, "latency_ms": None, "accuracy": "label"}
_MAX_RECENT = 1000
_SHARES = (0.5, 0.95, 0.99)
_Quantiles = list[list[arm_queries.Quantile]]
_USUAL_US = 30 * 86_400 * 1_000_000


def routes(reader: Reader, clock: Clock) -> APIRouter:
    """All routes under /v1/analytics. Without `since` they are about the last 30 days before `until`."""
    router = APIRouter(prefix="/v1/analytics", tags=["analytics"])

    @router.get("/models/{model}")
    async def show_model(model: Model, since: Instant = None, until: Instant = None) -> Json:
        """Per version, variant and experiment of the requests that callers sent: counts, error rate with its
        Wilson interval, latency quantiles, outcome means. Shadow and batch requests are counted apart."""
        since_us, until_us = _period(since, until, clock)
        rows, means, accuracies, others = await reader.ask(
            model, _overview, since_us=since_us, until_us=until_us
        )
        versions = [
            schemas.version_json(
                row,
                [mean for mean in means if _arm_of(mean) == _arm_of(row)],
                next((one for one in accuracies if _arm_of(one) == _arm_of(row)), None),
            )
            for row in rows
        ]
        return {
            "model": model,
            **schemas.period_json(since_us, until_us),
            "requests": sum(row["requests"] for row in rows),
            "other_origins": others,
            "versions": versions,
            "warnings": schemas.unmapped_warnings(accuracies),
        }

    @router.get("/models/{model}/compare")
    async def compare_versions(
        model: Model,
        a: Name,
        b: Name,
        metric: Name = "error_rate",
        alpha: Alpha = 0.05,
        missing: Missing | None = None,
        since: Instant = None,
        until: Instant = None,
    ) -> Json:
        """b against a (versions or variants) on error_rate, latency_ms, accuracy or the name of an outcome,
        per user or session where requests name them. `missing` says what a user without an outcome counts as:
        `zero` (its values are summed per user; what is meant where none is not for nothing, as of revenue) or
        `exclude`, as built-in metrics and labels do."""
        if a == b:
            raise InvalidArgument("a and b are the same version.", field="b")
        if metric in _BUILT_IN and missing == "zero":
            raise InvalidArgument(f"What has no {metric} is not zero.", field="missing")
        since_us, until_us = _period(since, until, clock)
        without: Missing = missing or ("exclude" if metric in (*_BUILT_IN, "label") else "zero")

        def question(
            connection: duckdb.DuckDBPyConnection,
        ) -> tuple[Arms, list[Json], _Quantiles]:
            arms = arm_queries.arms(connection, metric, a, b)
            wanted = _SHARES if metric == "latency_ms" else ()
            of_arms = [arm_queries.arm_quantiles(connection, arm, wanted) for arm in ("a", "b") if wanted]
            return arms, queries.summary(connection), of_arms

        arms, rows, quantiles = await reader.ask(
            model,
            question,
            metric=_BUILT_IN.get(metric, metric),
            outcomes=metric not in ("error_rate", "latency_ms"),
            since_us=since_us,
            until_us=until_us,
        )
        seen = {name for row in rows for name in _arm_of(row)}
        for field, name in (("a", a), ("b", b)):
            if name not in seen:
                raise NotFound(f"No prediction of {model} by {name} has been seen in this time.", field=field)
        if metric not in _BUILT_IN and not arms.a.counts.any() and not arms.b.counts.any():
            raise NotFound(f"There is no outcome named {metric} of these versions yet.", field="metric")
        found = await asyncio.to_thread(_compared, arms, metric, (a, b), without, alpha)
        shown = schemas.comparison_json(model, metric, found) | schemas.period_json(since_us, until_us)
        if quantiles:
            shown["quantiles"] = await asyncio.to_thread(_quantiles_json, quantiles, alpha)
        return shown

    @router.get("/predictions/{request_id}")
    async def show_prediction(request_id: str, model: Name | None = None) -> Json:
        """What answered a request: model, version, artifact, variant, time, inputs and outputs where they are
        logged; the outcomes that came for it; and every attempt it took. With `model`, only of that one."""
        return schemas.prediction_json(await reader.find(parse_id(request_id), model))

    @router.get("/query")
    async def recent_predictions(
        model: Name, limit: Annotated[int, Query(ge=1, le=_MAX_RECENT)] = 100
    ) -> Json:
        """The newest requests of a model, of every origin, without their payload."""
        rows = await reader.recent(model, limit)
        return {"model": model, "predictions": [schemas.row_json(row) for row in rows]}

    return router


def shadow_routes(engine: AsyncEngine, clock: Clock) -> APIRouter:
    """What shadow versions said."""
    router = APIRouter(prefix="/v1/shadows", tags=["analytics"])

    @router.get("/{model}")
    async def show_shadows(
        model: Model,
        version: Name | None = None,
        shadow_version: Name | None = None,
        alpha: Alpha = 0.05,
        since: Instant = None,
        until: Instant = None,
    ) -> Json:
        """Per version and shadow version: how often they agree, how far their numbers lie apart, and what the
        shadow does to latency and errors, with intervals. Time counts in whole hours."""
        since_us, until_us = _period(since, until, clock)
        found = await shadows.totals_of(
            engine,
            model,
            version,
            shadow_version,
            datetime.fromtimestamp(since_us / 1e6, UTC),
            None if until_us is None else datetime.fromtimestamp(until_us / 1e6, UTC),
        )
        if not found:
            raise NotFound(f"No shadow of {model} has been compared in this time.", field="model")

        def reports() -> list[Json]:
            return [report(model, *versions, totals, alpha) for versions, totals in found.items()]

        return {
            "model": model,
            **schemas.period_json(since_us, until_us),
            "shadows": await asyncio.to_thread(reports),
        }

    return router


def _compared(
    arms: arm_queries.Arms, metric: str, names: tuple[str, str], missing: Missing, alpha: float
) -> Comparison:
    # SciPy takes most of a second to import; who consumes only need not wait for it.
    from services.analytics.comparison import compare  # noqa: PLC0415

    return compare(arms, metric, names, missing=missing, alpha=alpha)


def _quantiles_json(of_arms: _Quantiles, alpha: float) -> list[Json]:
    from services.analytics.comparison import compare_quantiles  # noqa: PLC0415 - see above

    return [schemas.quantile_json(one) for one in compare_quantiles(*of_arms, alpha=alpha)]


def _overview(
    connection: duckdb.DuckDBPyConnection,
) -> tuple[list[Json], list[Json], list[Json], dict[str, int]]:
    return (
        queries.summary(connection),
        queries.outcome_means(connection),
        queries.accuracies(connection),
        queries.other_origins(connection),
    )


def _arm_of(row: dict[str, Any]) -> tuple[str, str, str | None]:
    return row["version"], row["variant"], row["experiment"]


def _period(since: datetime | None, until: datetime | None, clock: Clock) -> tuple[int, int | None]:
    """Bounds in Unix microseconds; no upper one where none is given, so that what comes in now counts."""
    until_us = None if until is None else _us(until, "until")
    if since is not None:
        return _us(since, "since"), until_us
    return (clock.unix_us() if until_us is None else until_us) - _USUAL_US, until_us


def _us(moment: datetime, field: str) -> int:
    if moment.tzinfo is None:
        raise InvalidArgument("A time needs its zone, as in 2026-01-31T12:00:00Z.", field=field)
    return schemas.unix_us(moment)
