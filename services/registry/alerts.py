"""Drift alerts beside their models: read from `drift.alerts.v1`, the newest of each model kept."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager

from google.protobuf.message import DecodeError
from headrace.v1.events_pb2 import DriftAlert

from services.common.bus import Bus, Malformed, Record
from services.common.topics import ALERTS
from services.registry.deployments import no_model
from services.registry.edge import Edge
from services.registry.repository import Repository

GROUP = "registry"
#: Alerts kept of each model; the drift service has them all.
KEPT = 100


def alerts_followed(edge: Edge, bus: Bus) -> AbstractAsyncContextManager[None]:
    """Store alerts while the context is open. One that comes again says how it stands now: drift publishes an
    alert anew when it changes, all of a model's in order."""

    async def on_alerts(records: Sequence[Record]) -> None:
        alerts = [parse(index, record) for index, record in enumerate(records)]
        async with edge.transaction() as tx:
            for alert in alerts:
                await tx.put_alert(alert.alert_id, alert.model, alert.SerializeToString(), edge.clock.now())
            for model in sorted({alert.model for alert in alerts}):
                await tx.prune_alerts(model, KEPT)

    return bus.consume(ALERTS, GROUP, on_alerts)


def parse(index: int, record: Record) -> DriftAlert:
    """The alert in `record`. Raises Malformed."""
    try:
        alert = DriftAlert.FromString(record.value or b"")
    except DecodeError as error:
        raise Malformed(index, "not a DriftAlert") from error
    if len(alert.alert_id) != 16 or not alert.model or "\0" in alert.model:
        raise Malformed(index, "an alert has an id of 16 bytes and a model")
    return alert


async def list_alerts(tx: Repository, model: str, limit: int) -> list[DriftAlert]:
    """The newest alerts of `model`, newest first. Raises NotFound for an unknown model."""
    if await tx.model(model) is None:
        raise no_model(model)
    return [DriftAlert.FromString(row.alert) for row in await tx.alerts(model, limit)]
