"""Wires the analytics service."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog
from fastapi import APIRouter, FastAPI
from prometheus_client import CollectorRegistry

from services.analytics.consumers import Consumers
from services.analytics.endpoints import routes, shadow_routes
from services.analytics.experiment_endpoints import experiment_routes
from services.analytics.experiment_schemas import MAX_BODY_BYTES
from services.analytics.flushing import Flusher, SegmentWriter
from services.analytics.looking import Looking
from services.analytics.metrics import Metrics
from services.analytics.placebo_endpoints import placebo_routes
from services.analytics.placebo_looking import Placebos
from services.analytics.reading import Reader
from services.analytics.segments import SegmentFiles
from services.analytics.settings import Settings
from services.analytics.shadows import ShadowConsumer
from services.analytics.signatures import Signatures
from services.analytics.trials import Trials
from services.common.bodies import BoundBodies
from services.common.bus.follower import Follower
from services.common.bus.kafka import KafkaBus
from services.common.bus.port import Table
from services.common.clock import Clock
from services.common.db import check_database, engine, migrate
from services.common.errors import Fatal, HeadraceError, Unavailable
from services.common.internal_auth import InternalAuth
from services.common.lifecycle import Health, OpsEndpoints, serve_asgi, watched
from services.common.objects import ArtifactStore
from services.common.problems import install_problem_handlers
from services.common.tasks import running
from services.common.telemetry import Tracing, setup_tracing
from services.common.telemetry.asgi import TraceRequests
from services.common.topics import (
    DEPLOYMENTS,
    OUTCOMES,
    PREDICTIONS,
    REPLAY,
    SHADOWS,
    TRIALS,
    Topic,
    dead_letters,
)

log = structlog.get_logger(__name__)

SCHEMA = "analytics"
GROUP = "analytics"
_MIGRATIONS = Path(__file__).parent / "migrations"
#: A delivery costs the same for ten records as for a thousand; a count may be this much older.
_COLLECT_S = 0.5
_TABLE_WAIT_S = 15.0
_LAG_PERIOD_S = 15.0
_STORE_WAIT_S = 30.0


@dataclass(frozen=True, slots=True)
class Analytics:
    """The running service."""

    port: int
    health: Health


@asynccontextmanager
async def analytics_app(cfg: Settings, clock: Clock) -> AsyncIterator[Analytics]:
    """Serve and consume while the block runs; on the way out the running batch is finished first."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    health = Health("database", "artifact_store", "deployments", "trials")
    tracing = setup_tracing(
        "analytics", cfg.otel_exporter_otlp_endpoint or None, cfg.otel_traces_sample_ratio
    )
    signatures, sizes = Signatures(), cfg.sizes()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(tracing.close)
        await migrate(cfg.database_url, SCHEMA, _MIGRATIONS)
        database = engine(cfg.database_url, SCHEMA)
        stack.push_async_callback(database.dispose)
        await stack.enter_async_context(watched(health, {"database": lambda: check_database(database)}))
        store = ArtifactStore(cfg.artifact_store_url, cfg.artifact_store_options())
        stack.push_async_callback(store.close)
        await _reach(store)
        health.set_ready("artifact_store")
        bus = await stack.enter_async_context(
            KafkaBus(
                cfg.kafka_bootstrap_servers,
                "headrace-analytics",
                session_timeout=cfg.kafka_session_timeout_s,
                # Records wait for the deployments and trials that they need.
                follower=Follower(cfg.kafka_bootstrap_servers, "headrace-analytics", quiet_wait_ms=1000),
            )
        )

        await signatures.load(database)
        files = SegmentFiles(store, cfg.state_dir / "analytics" / "segments")
        writer = SegmentWriter(database, store, signatures, clock, metrics)
        spill = cfg.state_dir / "analytics" / "spill"
        await asyncio.to_thread(spill.mkdir, parents=True, exist_ok=True)
        reader = Reader(database, files, signatures, metrics, spill)
        trials = Trials()
        looking = Looking(trials, reader, database, bus, clock, metrics, cfg.analytics_looks_share)
        placebos = Placebos(trials, reader, database, clock, metrics, cfg.analytics_placebo_share)
        routers = (
            routes(reader, clock),
            shadow_routes(database, clock),
            placebo_routes(placebos),
            experiment_routes(trials, looking, reader, clock, placebos.of),
        )
        app = _api(routers, cfg.internal_token, tracing, health, registry)
        port = await stack.enter_async_context(serve_asgi(app, cfg.host, cfg.http_port))

        # Which output holds the answer is known once the deployments are.
        await _read(await stack.enter_async_context(bus.table(DEPLOYMENTS, signatures.apply)), DEPLOYMENTS)
        health.set_ready("deployments")
        await stack.enter_async_context(
            Flusher(database, writer, files, signatures, sizes, clock, metrics, cfg.retention())
        )
        await _read(await stack.enter_async_context(bus.table(TRIALS, trials.apply)), TRIALS)
        health.set_ready("trials")
        await stack.enter_async_context(looking)
        await stack.enter_async_context(placebos)
        consumers = Consumers(database, writer, sizes, clock, tracing, metrics, looking.seen)
        shadows = ShadowConsumer(database, clock, metrics, looking.seen)
        for topic, handler, most in (
            (PREDICTIONS, consumers.on_predictions, 2000),
            (OUTCOMES, consumers.on_outcomes, 2000),
            (SHADOWS, shadows.on_comparisons, 500),
        ):
            await stack.enter_async_context(
                bus.consume(topic, GROUP, handler, max_records=most, collect_s=_COLLECT_S)
            )
        await stack.enter_async_context(running(_watch_lag(bus, signatures, metrics), "lag"))
        gc.freeze()  # what is there now stays: every full collection would look through all of it
        stack.callback(gc.unfreeze)
        yield Analytics(port, health)
        health.start_draining()


def _api(
    routers: Sequence[APIRouter],
    token: str,
    tracing: Tracing,
    health: Health,
    registry: CollectorRegistry,
) -> FastAPI:
    app = FastAPI(title="Headrace analytics", version="1")
    for router in routers:
        app.include_router(router)
    install_problem_handlers(app)
    app.add_middleware(BoundBodies, max_bytes=MAX_BODY_BYTES)
    app.add_middleware(InternalAuth, token=token)
    app.add_middleware(TraceRequests, tracing=tracing)
    app.add_middleware(OpsEndpoints, health=health, registry=registry)
    return app


async def _reach(store: ArtifactStore) -> None:
    """Wait for the store; services of an installation start together."""
    deadline = asyncio.get_running_loop().time() + _STORE_WAIT_S
    while True:
        try:
            return await store.check()
        except Unavailable as error:
            if asyncio.get_running_loop().time() > deadline:
                raise Fatal(f"The artifact store was not reached in {_STORE_WAIT_S:g} s.") from error
            await asyncio.sleep(0.5)


async def _read(table: Table, topic: Topic) -> None:
    """Wait until the topic was read, for a while; without a broker the service starts all the same."""
    try:
        await table.ready(_TABLE_WAIT_S)
    except Unavailable as error:
        log.warning("topic_late", topic=topic.name, reason=error.message)


async def _watch_lag(bus: KafkaBus, signatures: Signatures, metrics: Metrics) -> None:
    topics = (PREDICTIONS, OUTCOMES, SHADOWS)
    asked = [(topic, GROUP) for topic in topics] + [(dead_letters(topic, GROUP), REPLAY) for topic in topics]
    gauges = [metrics.lag.labels(topic.name) for topic in topics]
    gauges += [metrics.dead_letters.labels(topic.name) for topic in topics]
    while True:
        if signatures.served:  # a broker that lost its topics is told of them again
            metrics.keep_models(signatures.served)
        try:
            for gauge, standing in zip(gauges, await bus.standings(asked), strict=True):
                if standing is not None:
                    gauge.set(standing.lag)
        except HeadraceError as error:
            log.info("lag_unknown", reason=error.message)
        except Exception:
            # The broker's client raises of its own, too; without lag the service goes on.
            log.exception("lag_failed")
        await asyncio.sleep(_LAG_PERIOD_S)
