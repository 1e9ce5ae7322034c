"""The router, wired."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass

import structlog
from prometheus_client import CollectorRegistry

from services.common.bus import Bus, Follower, KafkaBus, Table
from services.common.clock import Clock
from services.common.errors import Fatal, Unavailable
from services.common.eventlog import EventLog, PredictionJoin, publishing_left
from services.common.frames import FrameCalls, FrameServer, client_tls_of, server_tls_of
from services.common.lifecycle import Health, ops_app, serve_asgi
from services.common.tasks import ended
from services.common.telemetry import setup_tracing
from services.common.topics import DEPLOYMENTS, PREDICTIONS, WORKERS
from services.common.unary import serve_unary
from services.router.dispatch import Dispatcher, GatewayConnection
from services.router.endpoints import Endpoints
from services.router.grpc_server import RoutedUnary
from services.router.metrics import RouterMetrics
from services.router.prediction_log import HitLog, RefusalLog
from services.router.result_cache import ResultCache
from services.router.result_store import result_store
from services.router.retry_budget import RetryBudget
from services.router.routing_table import RoutingTable
from services.router.settings import Settings
from services.router.shadow import Mirror
from services.router.snapshot import Snapshot
from services.router.stats import Stats

log = structlog.get_logger(__name__)

# Of the time to drain, the share that goes to answering what is in flight; the rest flushes the log.
_ANSWER_SHARE = 0.6
_FLUSH_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Router:
    """The running service and where it listens."""

    dispatcher: Dispatcher
    health: Health
    log: EventLog
    frames_port: int
    grpc_port: int
    ops_port: int
    #: Exported at its ops port.
    metrics: CollectorRegistry


@asynccontextmanager
async def router_app(  # noqa: PLR0915 - the parts of a router, wired once
    cfg: Settings,
    clock: Clock,
    bus: Bus | None = None,
    *,
    follower: Follower | None = None,
    guest: bool = False,
) -> AsyncIterator[Router]:
    """Serve while the block runs, then drain: gateways are told, what is in flight is answered, the log is
    flushed, all within `cfg.drain_s`. `bus` replaces Kafka in tests. `follower` reads control topics where
    another service of the process does, too. `guest`: the process is that service's, which exports what it
    uses."""
    async with AsyncExitStack() as stack:
        if bus is None:
            bus = await stack.enter_async_context(
                KafkaBus(cfg.kafka_bootstrap_servers, f"router-{cfg.router_id}", follower=follower)
            )
        tracing = setup_tracing("router", cfg.otel_exporter_otlp_endpoint, cfg.otel_traces_sample_ratio)
        stack.push_async_callback(tracing.close)
        events = EventLog(
            cfg.directory / "spool", bus, PREDICTIONS.name,
            clock=clock, max_bytes=cfg.log_max_bytes, join=PredictionJoin(),
        )  # fmt: skip
        await events.start()
        stack.push_async_callback(_close_log, events, clock, cfg.drain_s * _FLUSH_SHARE)
        for left in cfg.left_logs:
            await stack.enter_async_context(
                publishing_left(left, bus, PREDICTIONS.name, clock=clock, join=PredictionJoin())
            )

        client_tls = client_tls_of(cfg)

        def connect(address: str, on_state: Callable[[bool], None]) -> FrameCalls:
            return FrameCalls(
                address,
                credential=cfg.internal_token,
                role="router",
                instance=cfg.router_id,
                on_state=on_state,
                forwards=True,
                ssl=client_tls,
            )

        def table_changed() -> None:
            snapshot.changed()
            dispatcher.table_changed()

        def workers_changed() -> None:
            snapshot.changed()
            dispatcher.waiting.wake()

        table = RoutingTable(cfg.default_timeout_s, table_changed)
        endpoints = Endpoints(
            connect,
            clock,
            expiry_s=cfg.worker_expiry_s,
            outliers=cfg.outliers,
            on_change=workers_changed,
        )
        snapshot = Snapshot(
            cfg.directory / "routing.json", {"deployments": table.records, "workers": endpoints.records}
        )
        stack.push_async_callback(endpoints.close)
        stats = Stats()
        store = cache = None
        if cfg.redis_url:
            store = await stack.enter_async_context(result_store(cfg.redis_url, cfg.cache_budget_ms / 1e3))
            cache = ResultCache(store, HitLog(events, cfg.router_id, clock), stats)
        mirror = Mirror(endpoints, bus, stats, clock, cfg.router_id, limit=cfg.shadow_limit)
        await _own(stack, mirror.run(), "compare shadows")
        dispatcher = Dispatcher(
            table,
            endpoints,
            RefusalLog(events, cfg.router_id, clock),
            stats,
            tracing,
            RetryBudget(cfg.retry_share, cfg.retry_floor),
            max_attempts=cfg.max_attempts,
            endpoint_wait_s=cfg.endpoint_wait_s,
            max_waiting=cfg.max_waiting,
            cache=cache,
            mirror=mirror,
            shared_memory=cfg.shared_memory,
        )
        stack.callback(dispatcher.close)
        health = Health("routing table")
        await _own(stack, endpoints.expire(), "expire workers")
        restored = await snapshot.restore({"deployments": table.restore, "workers": endpoints.restore})
        await _own(stack, snapshot.run(), "write the snapshot")
        workers = await stack.enter_async_context(bus.table(WORKERS, endpoints.apply))
        deployments = await stack.enter_async_context(bus.table(DEPLOYMENTS, table.apply))
        await _own(
            stack,
            _know((deployments, workers), table, health, cfg.table_wait_s if restored else None),
            "read the routing table",
        )

        server = FrameServer(
            lambda peer: GatewayConnection(dispatcher, peer),
            credential=cfg.internal_token,
            instance=cfg.router_id,
            role="router",
            ssl=server_tls_of(cfg),
            detaches=True,
        )
        stack.push_async_callback(server.close)
        frames_port = await _listen(server, cfg)
        grpc_port = await stack.enter_async_context(
            serve_unary(
                RoutedUnary(dispatcher, clock),
                cfg.host,
                cfg.grpc_port,
                cfg.internal_token,
                drain_s=1.0,
                reuse_port=cfg.reuse_port,
            )
        )
        registry = CollectorRegistry()
        registry.register(RouterMetrics(dispatcher, server, events, store))
        ops = ops_app(health, registry, guest=guest)
        ops_port = await stack.enter_async_context(
            serve_asgi(ops, cfg.host, cfg.ops_port, drain_s=1.0, reuse_port=cfg.reuse_port)
        )
        log.info("listening", frames=frames_port, grpc=grpc_port, ops=ops_port, router=cfg.router_id)
        try:
            yield Router(dispatcher, health, events, frames_port, grpc_port, ops_port, registry)
        finally:
            health.start_draining()
            await server.drain(cfg.drain_s * _ANSWER_SHARE)


async def _know(
    tables: tuple[Table, ...], table: RoutingTable, health: Health, patience_s: float | None
) -> None:
    """Ready once both topics were read, or, where an earlier table was restored, after `patience_s`."""
    for topic in tables:
        while not topic.caught_up:
            with suppress(Unavailable):
                await topic.ready(30.0 if patience_s is None else patience_s)
            if patience_s is not None and not topic.caught_up:
                log.warning("serving_restored_table", models=len(table), reason="the broker is away")
                table.known = True
                health.set_ready("routing table")
                patience_s = None
    table.confirm()
    table.known = True
    health.set_ready("routing table")


async def _listen(server: FrameServer, cfg: Settings) -> int:
    try:
        port = await server.start(cfg.host, cfg.frames_port, reuse_port=cfg.reuse_port)
    except OSError as error:
        reason = error.strerror or error
        raise Fatal(f"Cannot listen on {cfg.host}:{cfg.frames_port} (FRAMES_PORT): {reason}.") from error
    if cfg.frames_socket is not None:
        try:
            await server.start_unix(cfg.frames_socket)
        except OSError as error:
            reason = error.strerror or error
            raise Fatal(f"Cannot listen at {cfg.frames_socket} (FRAMES_SOCKET): {reason}.") from error
    if cfg.frames_name:
        try:
            server.start_local(cfg.frames_name)
        except (OSError, ValueError) as error:
            raise Fatal(f"Cannot listen as {cfg.frames_name} (FRAMES_NAME): {error}.") from error
    return port


async def _own(stack: AsyncExitStack, work: Coroutine[None, None, None], name: str) -> None:
    """Run `work` until the stack unwinds."""
    stack.push_async_callback(ended, asyncio.create_task(work, name=name))


async def _close_log(events: EventLog, clock: Clock, seconds: float) -> None:
    await events.close(clock.monotonic() + seconds)
    if events.pending_records:
        log.warning("log_left", records=events.pending_records, reason="the next start publishes them")
