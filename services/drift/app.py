"""Wires the drift service."""

from __future__ import annotations

import asyncio
import gc
import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import structlog
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from sqlalchemy.ext.asyncio import AsyncEngine

from services.common.bodies import BoundBodies
from services.common.bus.follower import Follower
from services.common.bus.kafka import KafkaBus
from services.common.bus.port import Table
from services.common.clock import Clock
from services.common.db import OutboxRelay, check_database, engine, migrate, transaction
from services.common.errors import HeadraceError, Unavailable
from services.common.internal_auth import InternalAuth
from services.common.lifecycle import Health, OpsEndpoints, serve_asgi, watched
from services.common.problems import install_problem_handlers
from services.common.tasks import running
from services.common.telemetry import setup_tracing
from services.common.telemetry.asgi import TraceRequests
from services.common.topics import DEPLOYMENTS, PREDICTIONS, REPLAY, dead_letters
from services.drift import repository
from services.drift.consumers import PredictionConsumer
from services.drift.endpoints import routes
from services.drift.metrics import Metrics
from services.drift.recording import tell
from services.drift.schemas import MAX_BODY_BYTES
from services.drift.settings import Settings
from services.drift.signatures import Signatures
from services.drift.tables import Outbox
from services.drift.webhooks import WebhookSender

log = structlog.get_logger(__name__)

SCHEMA = "drift"
GROUP = "drift"
_MIGRATIONS = Path(__file__).parent / "migrations"
_TABLE_WAIT_S = 15.0
#: A delivery costs the same for ten records as for a thousand; an alert may come this much later.
_COLLECT_S = 1.0
_HOUSEKEEPING = timedelta(seconds=15)
#: After the first deployment that is heard of, all are known.
_TOLD_S = 3600.0


@dataclass(frozen=True, slots=True)
class Drift:
    """The running service."""

    port: int
    health: Health


@asynccontextmanager
async def drift_app(cfg: Settings, clock: Clock) -> AsyncIterator[Drift]:
    """Serve and consume while the block runs; on the way out the running batch is finished first."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    health = Health("database", "deployments")
    tracing = setup_tracing("drift", cfg.otel_exporter_otlp_endpoint or None, cfg.otel_traces_sample_ratio)
    limits = cfg.limits()
    signatures = Signatures(metrics.keep_psi)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(tracing.close)
        await migrate(cfg.database_url, SCHEMA, _MIGRATIONS)
        database = engine(cfg.database_url, SCHEMA)
        stack.push_async_callback(database.dispose)
        async with transaction(database) as session:
            signatures.restore(await repository.signatures(session))
        await stack.enter_async_context(watched(health, {"database": lambda: check_database(database)}))
        bus = await stack.enter_async_context(
            KafkaBus(
                cfg.kafka_bootstrap_servers,
                "headrace-drift",
                session_timeout=cfg.kafka_session_timeout_s,
                # Records wait for the deployments and trials that they need.
                follower=Follower(cfg.kafka_bootstrap_servers, "headrace-drift", quiet_wait_ms=1000),
            )
        )
        relay = await stack.enter_async_context(OutboxRelay(database, Outbox, bus, clock))
        await stack.enter_async_context(WebhookSender(database, clock, metrics))

        app = FastAPI(title="Headrace drift", version="1")
        app.include_router(routes(database, relay, clock, limits.cadence))
        install_problem_handlers(app)
        app.add_middleware(BoundBodies, max_bytes=MAX_BODY_BYTES)
        app.add_middleware(InternalAuth, token=cfg.internal_token)
        app.add_middleware(TraceRequests, tracing=tracing)
        app.add_middleware(OpsEndpoints, health=health, registry=registry)
        port = await stack.enter_async_context(serve_asgi(app, cfg.host, cfg.http_port))

        table = await stack.enter_async_context(bus.table(DEPLOYMENTS, signatures.apply))
        try:
            # Columns have names once the deployments are known; a record is not read before.
            await table.ready(_TABLE_WAIT_S)
        except Unavailable as error:
            log.warning("deployments_late", reason=error.message)
        health.set_ready("deployments")
        consumer = PredictionConsumer(database, signatures, relay, limits, clock, tracing, metrics)
        await stack.enter_async_context(
            bus.consume(PREDICTIONS, GROUP, consumer.on_predictions, max_records=2000, collect_s=_COLLECT_S)
        )
        housekeeping = _keep_house(database, bus, relay, clock, metrics, signatures, table)
        await stack.enter_async_context(running(housekeeping, "housekeeping"))
        gc.freeze()  # what is there now stays: every full collection would look through all of it
        stack.callback(gc.unfreeze)
        yield Drift(port, health)
        health.start_draining()


async def _keep_house(
    database: AsyncEngine,
    bus: KafkaBus,
    relay: OutboxRelay,
    clock: Clock,
    metrics: Metrics,
    signatures: Signatures,
    table: Table,
) -> None:
    asked = [(PREDICTIONS, GROUP), (dead_letters(PREDICTIONS, GROUP), REPLAY)]
    known_at = math.inf
    while True:
        metrics.outbox_age.set(relay.oldest_pending_s)
        try:
            standings = await bus.standings(asked)
            for gauge, standing in zip((metrics.lag, metrics.dead_letters), standings, strict=True):
                if standing is not None:
                    gauge.set(standing.lag)
            while await _forget_some(database, clock):
                pass
            # Before the deployments are known, every version would be one that is served no more. A broker
            # that lost its topics is told of them one by one.
            if table.caught_up and signatures.served():
                known_at = min(known_at, clock.monotonic())
            if clock.monotonic() >= known_at + _TOLD_S:
                metrics.keep_models({model for model, _ in signatures.served()})
                while await forget_gone(database, signatures, relay, clock):
                    pass
        except HeadraceError as error:
            log.info("housekeeping_later", reason=error.message)
        except Exception:
            log.exception("housekeeping_failed")
        await asyncio.sleep(_HOUSEKEEPING.total_seconds())


async def _forget_some(database: AsyncEngine, clock: Clock) -> int:
    async with transaction(database) as session:
        return await repository.forget_old(session, clock.now())


async def forget_gone(
    database: AsyncEngine, signatures: Signatures, relay: OutboxRelay, clock: Clock
) -> bool:
    """Whether there was a version that is gone for good, of which nothing is kept any more."""
    served = signatures.served()
    if not served:
        return False  # a broker that lost its topics is told of them again
    now = clock.now()
    async with transaction(database) as session:
        ended = await repository.forget_gone(session, served, now)
        await tell(session, list(ended or ()), now)
    if ended:
        relay.wake()
    return ended is not None
