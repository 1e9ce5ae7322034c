"""The REST API of the drift service, behind the gateway's door."""

from __future__ import annotations

import asyncio
from hashlib import sha256
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from fastapi import APIRouter, Header, Query, Request, Response
from sqlalchemy.ext.asyncio import AsyncEngine

from services.common.clock import Clock
from services.common.db import OutboxRelay, transaction
from services.common.errors import FailedPrecondition, NotFound
from services.common.ids import id_text, new_id, parse_id
from services.drift import repository
from services.drift.detectors.sketches import QuantileSketch
from services.drift.evaluation import Severity
from services.drift.recording import alert_json, tell
from services.drift.sample import Sample
from services.drift.schemas import ReferenceBody, Text, WebhookBody
from services.drift.stream import Cadence
from services.drift.tables import StreamRow, WebhookRow, WindowRow

Limit = Annotated[int, Query(ge=1, le=repository.MAX_LISTED)]
State = Literal["open", "acknowledged", "resolved"]
#: What the gateway says that a caller's key may do.
Scopes = Annotated[str, Header(alias="x-headrace-scopes")]
Json = dict[str, Any]

_SHOWN_SHARES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_MAX_WEBHOOKS = 100
#: The scope that changes webhooks.
_WRITES = "admin"
_DIGEST_DIGITS = 8


def routes(engine: AsyncEngine, relay: OutboxRelay, clock: Clock, cadence: Cadence) -> APIRouter:
    """All routes under /v1/drift."""
    router = APIRouter(prefix="/v1/drift", tags=["drift"])
    _add_models(router, engine, cadence)
    _add_references(router, engine, relay, clock)
    _add_alerts(router, engine, clock)
    _add_webhooks(router, engine, clock)
    return router


def _add_models(router: APIRouter, engine: AsyncEngine, cadence: Cadence) -> None:
    @router.get("/models/{model}")
    async def show_model(model: Text) -> Json:
        """Every version that was seen: how far its reference is, and what its newest window says."""
        async with transaction(engine) as session:
            found = await repository.standings(session, model)
        if not found:
            raise NotFound(f"Nothing has been seen of {model} yet.", field="model")
        return {"model": model, "versions": [_version_json(version, cadence) for version in found]}

    @router.get("/models/{model}/versions/{version}/windows")
    async def list_windows(model: Text, version: Text, limit: Limit = 20) -> Json:
        """The newest comparisons, newest first."""
        async with transaction(engine) as session:
            await repository.check_seen(session, model, version)
            found = await repository.windows(session, model, version, limit)
        return {"model": model, "version": version, "windows": [_window_json(row) for row in found]}


def _add_references(router: APIRouter, engine: AsyncEngine, relay: OutboxRelay, clock: Clock) -> None:
    path = "/models/{model}/versions/{version}/reference"

    @router.get(path)
    async def show_reference(model: Text, version: Text) -> Json:
        """What the live stream is compared with."""
        async with transaction(engine) as session:
            row = await repository.find_stream(session, model, version)
        if row.reference is None:
            raise FailedPrecondition(f"The reference of {model}/{version} is still being learned.")
        sample = Sample.from_bytes(row.reference)
        return {
            "model": model,
            "version": version,
            "source": row.reference_source,
            "rows": sample.rows,
            "numeric": {name: _quantiles(sketch) for name, sketch in sample.numeric.items()},
            "categorical": {name: dict(counts) for name, counts in sample.categorical.items()},
        }

    @router.put(path)
    async def upload_reference(model: Text, version: Text, body: ReferenceBody) -> Json:
        """Compare with this sample from now on. What was remembered of the stream so far is dropped."""
        now = clock.now()
        sample = Sample()
        await asyncio.to_thread(sample.add, body.observations(), clock.unix_us())
        async with transaction(engine) as session:
            row = await repository.lock_stream(session, model, version, now)
            _replace(row, sample, "upload")
            row.reference_at = row.updated_at = now
            await tell(session, await repository.forget_signals(session, model, version, now), now)
        relay.wake()
        return {"model": model, "version": version, "source": "upload", "rows": sample.rows}

    @router.delete(path, status_code=204)
    async def relearn_reference(model: Text, version: Text) -> Response:
        """Learn a new reference from the next predictions."""
        now = clock.now()
        async with transaction(engine) as session:
            await repository.check_seen(session, model, version)
            row = await repository.lock_stream(session, model, version, now)
            _replace(row, None, "stream")
            row.reference_at, row.updated_at = None, now
            await tell(session, await repository.forget_signals(session, model, version, now), now)
        relay.wake()
        return Response(status_code=204)


def _add_alerts(router: APIRouter, engine: AsyncEngine, clock: Clock) -> None:
    @router.get("/alerts")
    async def list_alerts(model: Text | None = None, state: State | None = None, limit: Limit = 100) -> Json:
        """The newest first."""
        async with transaction(engine) as session:
            found = await repository.alerts(session, model, state, limit)
        return {"alerts": [alert_json(row) for row in found]}

    @router.post("/alerts/{alert_id}/acknowledge")
    async def acknowledge(alert_id: str) -> Json:
        """Somebody looks at it. It still ends by itself when the feature is calm again."""
        async with transaction(engine) as session:
            row = await repository.find_alert(session, parse_id(alert_id, "alert_id"))
            row.acknowledged_at = row.acknowledged_at or clock.now()
        return alert_json(row)


def _add_webhooks(router: APIRouter, engine: AsyncEngine, clock: Clock) -> None:
    @router.get("/webhooks")
    async def list_webhooks(scopes: Scopes = "") -> Json:
        """Where alerts are posted. Of an address, the path or the query is often the secret that lets one
        post there: who may only read is shown the rest of it, and what tells it from others."""
        whole = _WRITES in scopes.split(",")
        async with transaction(engine) as session:
            found = await repository.webhooks(session)
        return {"webhooks": [_webhook_json(row, whole=whole) for row in found]}

    @router.post("/webhooks", status_code=201)
    async def add_webhook(body: WebhookBody, request: Request) -> Json:
        """Post every change of an alert there: opened, grown louder, resolved."""
        row = WebhookRow(webhook_id=new_id(), url=str(body.url), model=body.model, created_at=clock.now())
        async with transaction(engine) as session:
            if len(await repository.webhooks(session)) >= _MAX_WEBHOOKS:
                raise FailedPrecondition(f"There are {_MAX_WEBHOOKS} webhooks already.")
            session.add(row)
        return _webhook_json(row, whole=True)

    @router.delete("/webhooks/{webhook_id}", status_code=204)
    async def remove_webhook(webhook_id: str) -> Response:
        """Stop posting there; what is still on its way is dropped."""
        async with transaction(engine) as session:
            row = await session.get(WebhookRow, parse_id(webhook_id, "webhook_id"))
            if row is None:
                raise NotFound("There is no webhook of this id.", field="webhook_id")
            await session.delete(row)
        return Response(status_code=204)


def _replace(row: StreamRow, reference: Sample | None, source: str) -> None:
    stream = repository.to_stream(row)
    stream.replace_reference(reference)
    row.reference = reference.to_bytes() if reference else None
    row.reference_source = source
    row.learning, row.pane, row.panes = stream.learning.to_bytes(), stream.pane.to_bytes(), []


def _version_json(seen: repository.Standing, cadence: Cadence) -> Json:
    return {
        "version": seen.version,
        "reference": {
            "source": seen.reference_source,
            "ready": seen.reference_rows is not None,
            "rows": seen.reference_rows or seen.learned_rows,
            "rows_wanted": seen.reference_rows or cadence.reference_rows,
        },
        "updated_at": seen.updated_at.isoformat(),
        "window": _window_json(seen.window) if seen.window else None,
        "open_alerts": seen.open_alerts,
    }


def _window_json(row: WindowRow) -> Json:
    return {
        "start_us": row.start_us,
        "end_us": row.end_us,
        "rows": row.rows,
        "sampled_rows": row.rows_seen,
        "reference_rows": row.reference_rows,
        "severity": Severity(row.severity).name.lower(),
        "features": row.features,
    }


def _webhook_json(row: WebhookRow, *, whole: bool) -> Json:
    return {
        "webhook_id": id_text(row.webhook_id),
        "url": row.url if whole else _origin(row.url),
        "url_digest": sha256(row.url.encode()).hexdigest()[:_DIGEST_DIGITS],
        "model": row.model,
    }


def _origin(url: str) -> str:
    """Scheme, host and port, without anybody's name and password."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _quantiles(sketch: QuantileSketch) -> Json:
    if not sketch.count:  # no row of the reference had a number there
        return {f"p{share * 100:g}": None for share in _SHOWN_SHARES}
    values = sketch.quantiles(_SHOWN_SHARES)
    return {f"p{share * 100:g}": float(value) for share, value in zip(_SHOWN_SHARES, values, strict=True)}
