"""Wires the registry: database, bus, outbox, republisher, REST, gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from fastapi import FastAPI

from services.common.bodies import BoundBodies
from services.common.bus import KafkaBus
from services.common.bus.lag_gauges import show_lag
from services.common.clock import Clock
from services.common.db import OutboxRelay, engine, migrate
from services.common.errors import Fatal, InvalidArgument
from services.common.internal_auth import InternalAuth
from services.common.lifecycle import Health, OpsEndpoints, serve_asgi
from services.common.objects import ArtifactStore
from services.common.problems import install_problem_handlers
from services.common.tasks import running
from services.common.telemetry import Tracing, setup_tracing
from services.common.telemetry.asgi import TraceRequests
from services.common.topics import ALERTS, VERDICTS
from services.registry import alerts, verdicts
from services.registry.alerts import alerts_followed
from services.registry.artifacts import Artifacts
from services.registry.bodies import MAX_BODY_BYTES, is_upload
from services.registry.controller import Actor, Controller
from services.registry.edge import Edge
from services.registry.endpoints import model_routes, version_routes
from services.registry.experiment_control import ExperimentActor
from services.registry.experiment_endpoints import (
    experiment_action_routes,
    experiment_routes,
    holdout_routes,
)
from services.registry.grpc_server import serve_grpc
from services.registry.http_metrics import MeasureRequests
from services.registry.keys import ensure_admin_key
from services.registry.metrics import Metrics
from services.registry.publishing import Republisher
from services.registry.readiness import edge_watched
from services.registry.retention import RetentionActor
from services.registry.rollout_control import RolloutActor
from services.registry.rollout_endpoints import rollout_routes
from services.registry.servicer import RegistryServicer
from services.registry.serving_endpoints import deployment_routes, key_routes
from services.registry.settings import Settings
from services.registry.tables import ControlOutbox
from services.registry.uploads import Uploads
from services.registry.verdicts import verdicts_followed
from services.registry.workers import Workers, workers_followed

SCHEMA = "registry"
MIGRATIONS = Path(__file__).parent / "migrations"


@dataclass(frozen=True, slots=True)
class Registry:
    """The running service: the ports it listens on, and what a test may want to reach."""

    http_port: int
    grpc_port: int
    edge: Edge
    republisher: Republisher


@asynccontextmanager
async def registry_app(cfg: Settings, clock: Clock) -> AsyncIterator[Registry]:
    """Run the registry while the block runs. It needs PostgreSQL and the artifact store, not the broker."""
    await migrate(cfg.database_url, SCHEMA, MIGRATIONS)
    async with AsyncExitStack() as stack:
        database = engine(cfg.database_url, SCHEMA)
        stack.push_async_callback(database.dispose)
        tracing = setup_tracing("registry", cfg.otel_exporter_otlp_endpoint, cfg.otel_traces_sample_ratio)
        stack.push_async_callback(tracing.close)
        bus = await stack.enter_async_context(
            KafkaBus(cfg.kafka_bootstrap_servers, "registry", session_timeout=cfg.kafka_session_timeout_s)
        )
        relay = await stack.enter_async_context(OutboxRelay(database, ControlOutbox, bus, clock))
        store = ArtifactStore(cfg.artifact_store_url, cfg.artifact_store_options())
        stack.push_async_callback(store.close)
        uploads = Uploads(
            cfg.state_dir / "registry" / "uploads",
            at_once=cfg.max_uploads,
            max_bytes=cfg.max_upload_bytes,
            within_s=cfg.upload_timeout_s,
        )
        await asyncio.to_thread(uploads.clear)
        edge = Edge(database, relay, store, Artifacts(store), uploads, Metrics(), clock)
        await _let_admin_in(edge, cfg.bootstrap_admin_key)
        republisher = await stack.enter_async_context(Republisher(edge, bus, cfg.republish_check_s))
        workers = await stack.enter_async_context(workers_followed(bus, clock))
        actors: list[Actor] = [
            ExperimentActor(edge, workers.is_ready),
            RolloutActor(edge, workers),
            RetentionActor(timedelta(days=cfg.registry_keep_trials_days)),
        ]
        controller = await stack.enter_async_context(Controller(edge, actors))
        edge.on_trials.append(controller.wake)
        # One after the other, with nothing between: the group is joined once for both.
        await stack.enter_async_context(alerts_followed(edge, bus))
        await stack.enter_async_context(verdicts_followed(edge, bus, controller.wake))
        reads = [(ALERTS, alerts.GROUP), (VERDICTS, verdicts.GROUP)]
        lag = show_lag(bus, lambda: reads, edge.metrics.lag, edge.metrics.dead_letters)
        await stack.enter_async_context(running(lag, "lag"))
        health = Health()
        await stack.enter_async_context(edge_watched(edge, health))
        grpc_port = await stack.enter_async_context(
            serve_grpc(
                RegistryServicer(edge),
                cfg.host,
                cfg.grpc_port,
                token=cfg.internal_token,
                metrics=edge.metrics,
                drain_s=cfg.drain_s / 2,
            )
        )
        app = rest_app(edge, workers, health, tracing, cfg.internal_token)
        http_port = await stack.enter_async_context(
            serve_asgi(app, cfg.host, cfg.http_port, drain_s=cfg.drain_s / 2)
        )
        try:
            yield Registry(http_port, grpc_port, edge, republisher)
        finally:
            health.start_draining()


def rest_app(edge: Edge, workers: Workers, health: Health, tracing: Tracing, token: str) -> FastAPI:
    """REST with its middleware: health and metrics outermost, then the credential, then traces."""
    app = FastAPI(title="Headrace registry", version="1", redoc_url=None)
    install_problem_handlers(app)
    for routes in (
        model_routes(edge),
        version_routes(edge),
        deployment_routes(edge),
        key_routes(edge),
        rollout_routes(edge, workers),
        experiment_routes(edge, workers.is_ready),
        experiment_action_routes(edge, workers.is_ready),
        holdout_routes(edge),
    ):
        app.include_router(routes)
    app.add_middleware(BoundBodies, max_bytes=MAX_BODY_BYTES, passes=is_upload)
    app.add_middleware(MeasureRequests, metrics=edge.metrics)
    app.add_middleware(TraceRequests, tracing=tracing)
    app.add_middleware(InternalAuth, token=token)
    app.add_middleware(OpsEndpoints, health=health, registry=edge.metrics.registry)
    return app


async def _let_admin_in(edge: Edge, key: str) -> None:
    if not key:
        return
    try:
        async with edge.transaction() as tx:
            await ensure_admin_key(tx, key, edge.clock)
    except InvalidArgument as error:
        raise Fatal(error.message) from None
