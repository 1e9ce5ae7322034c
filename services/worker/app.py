"""The worker, wired."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)
from dataclasses import dataclass

import structlog
from headrace.v1.control_pb2 import WorkerStatus
from prometheus_client import CollectorRegistry

from services.common.bus import Bus, KafkaBus, Table, followed
from services.common.clock import Clock
from services.common.errors import Fatal, Unavailable
from services.common.eventlog import EventLog, PredictionJoin, publishing_left
from services.common.frames import FrameServer, server_tls_of
from services.common.lifecycle import Health, ops_app, serve_asgi
from services.common.objects import ArtifactStore
from services.common.tasks import ended, running
from services.common.telemetry import setup_tracing
from services.common.topics import DEPLOYMENTS, PREDICTIONS
from services.common.unary import serve_unary
from services.worker.artifacts import ArtifactCache
from services.worker.backends.port import BackendOptions
from services.worker.batch.app import BatchOptions, BatchWorker, OpenChunks, kafka_chunks
from services.worker.batch.metrics import BatchMetrics
from services.worker.batch.work import WorkOptions
from services.worker.desired import Deployments, defaults_of
from services.worker.grpc_server import BatchedUnary
from services.worker.heartbeat import Heartbeat
from services.worker.loading import LoadOptions, VersionLoader
from services.worker.mapped_objects import MappedObjects
from services.worker.metrics import WorkerMetrics
from services.worker.model_host import HostOptions, ModelHost
from services.worker.servicer import FrameConnection, Servicer
from services.worker.serving import Serving
from services.worker.settings import Settings
from services.worker.shared_inputs import SharedInputs
from services.worker.status import StatusReport

log = structlog.get_logger(__name__)

# Of the time to drain, the share that goes to answering what is queued, and the part of it in which chunks of
# batch jobs end; the rest flushes the prediction log.
_ANSWER_SHARE = 0.6
_CHUNK_SHARE = 0.25
_FLUSH_SHARE = 0.25
# How long one wait for the deployments lasts; it is repeated for as long as the broker is away.
_TABLE_S = 30.0


@dataclass(frozen=True, slots=True)
class Worker:
    """The running service and where it listens."""

    host: ModelHost
    health: Health
    log: EventLog
    frames_port: int
    grpc_port: int
    ops_port: int


@asynccontextmanager
async def worker_app(
    cfg: Settings, clock: Clock, bus: Bus | None = None, open_chunks: OpenChunks | None = None
) -> AsyncIterator[Worker]:
    """Serve while the block runs, then drain: routers are told, what is queued is answered, the prediction
    log is flushed, all within `cfg.drain_s`. `bus` replaces Kafka in tests, `open_chunks` the group of the
    batch jobs; without it such a worker does none."""
    async with AsyncExitStack() as stack:
        if bus is None:
            open_chunks = kafka_chunks(
                cfg.kafka_bootstrap_servers,
                f"worker-{cfg.worker_id}",
                cfg.batch_assignment,
                cfg.kafka_session_timeout_s,
            )
            bus = await stack.enter_async_context(
                KafkaBus(cfg.kafka_bootstrap_servers, f"worker-{cfg.worker_id}")
            )
        tracing = setup_tracing("worker", cfg.otel_exporter_otlp_endpoint, cfg.otel_traces_sample_ratio)
        stack.push_async_callback(tracing.close)

        events = await stack.enter_async_context(_prediction_log(cfg, bus, clock))
        pool = stack.enter_context(_run_threads(cfg))
        store = await stack.enter_async_context(_artifact_store(cfg))
        artifacts = await _artifact_cache(store, cfg)

        serving = Serving(clock, events, tracing, pool, cfg.inline_below_us / 1e6)
        options = LoadOptions(
            cfg.worker_id, BackendOptions(cfg.backend_threads), cfg.memory_limit_bytes, cfg.slots
        )
        heartbeat = Heartbeat(bus, interval=cfg.heartbeat_s)
        host = ModelHost(
            Deployments(cfg.pool, defaults_of(cfg)),
            VersionLoader(artifacts, serving, options),
            artifacts,
            heartbeat.changed,
            clock,
            HostOptions(linger=cfg.linger_s, long_idle=cfg.evict_idle_s),
        )
        stack.push_async_callback(host.close)
        servicer = Servicer(host, events, clock, await stack.enter_async_context(_shared_inputs(cfg, clock)))
        health = Health("deployments")
        health.add_check("versions", host.unready)
        health.add_check("prediction log", lambda: None if events.usable else "full")

        server = FrameServer(
            lambda peer: FrameConnection(servicer, peer),
            credential=cfg.internal_token,
            instance=cfg.worker_id,
            role="worker",
            ssl=server_tls_of(cfg),
            detaches=True,
        )
        stack.push_async_callback(server.close)
        frames_port, frames_address = await _listen(server, cfg)
        grpc_port = await stack.enter_async_context(
            serve_unary(
                BatchedUnary(servicer),
                cfg.host,
                cfg.grpc_port,
                cfg.internal_token,
                drain_s=1.0,
                reuse_port=cfg.reuse_port,
            )
        )
        registry = CollectorRegistry()
        registry.register(WorkerMetrics(host, servicer, events))
        ops_port = await stack.enter_async_context(
            serve_asgi(
                ops_app(health, registry), cfg.host, cfg.ops_port, drain_s=1.0, reuse_port=cfg.reuse_port
            )
        )

        report = StatusReport(
            cfg.worker_id, cfg.pool, (frames_address, f"{cfg.reached_at}:{grpc_port}"),
            host, health, clock, memory_limit=cfg.memory_limit_bytes,
        )  # fmt: skip
        known = cfg.directory / "deployments.table"
        table = await stack.enter_async_context(followed(bus, DEPLOYMENTS, host.apply, known))
        if host.states():
            health.set_ready("deployments")
        beating = await stack.enter_async_context(running(heartbeat.run(report), "heartbeat"))
        await stack.enter_async_context(running(_follow(table, health, heartbeat), "deployments"))
        batch = open_chunks and BatchWorker(
            _batch(cfg), host, store, bus, open_chunks, lambda: health.ready, clock
        )
        await stack.enter_async_context(_batch_work(batch, registry))
        log.info("listening", frames=frames_port, grpc=grpc_port, ops=ops_port, worker=cfg.worker_id)
        try:
            yield Worker(host, health, events, frames_port, grpc_port, ops_port)
        finally:
            health.start_draining()
            report.state = WorkerStatus.STATE_DRAINING
            heartbeat.changed()
            await _drain(server, servicer, host, batch, cfg.drain_s)
            await ended(beating)
            report.state = WorkerStatus.STATE_GONE
            await heartbeat.last(report())


async def _drain(
    server: FrameServer, servicer: Servicer, host: ModelHost, batch: BatchWorker | None, drain_s: float
) -> None:
    """Tell the routers, answer what is queued and end the chunks in work, then take nothing more."""
    seconds = drain_s * _ANSWER_SHARE
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            chunks = [batch.drain(drain_s * _CHUNK_SHARE)] if batch is not None else []
            await asyncio.gather(server.drain(seconds), *chunks)
            servicer.closed = True
            await host.drain()
    servicer.closed = True


@asynccontextmanager
async def _prediction_log(cfg: Settings, bus: Bus, clock: Clock) -> AsyncIterator[EventLog]:
    events = EventLog(
        cfg.directory / "spool", bus, PREDICTIONS.name,
        clock=clock, max_bytes=cfg.log_max_bytes, join=PredictionJoin(),
    )  # fmt: skip
    await events.start()
    try:
        async with _left(cfg, bus, clock):
            yield events
    finally:
        await events.close(clock.monotonic() + cfg.drain_s * _FLUSH_SHARE)
        if events.pending_records:
            log.warning("log_left", records=events.pending_records, reason="the next start publishes them")


def _left(cfg: Settings, bus: Bus, clock: Clock) -> AbstractAsyncContextManager[None]:
    """Publish what the worker that this one takes turns with has left, while the block runs."""
    if cfg.predecessor is None:
        return nullcontext()
    return publishing_left(
        cfg.predecessor / "spool", bus, PREDICTIONS.name, clock=clock, join=PredictionJoin()
    )


@contextmanager
def _run_threads(cfg: Settings) -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(cfg.run_threads, thread_name_prefix="run")
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@asynccontextmanager
async def _shared_inputs(cfg: Settings, clock: Clock) -> AsyncIterator[SharedInputs]:
    if not cfg.shared_memory:
        yield SharedInputs(allowed=False)
        return
    mapped = MappedObjects(clock)
    async with running(mapped.forget_unused(), "mapped objects"):
        yield SharedInputs(allowed=True, mapped=mapped)


async def _artifact_cache(store: ArtifactStore, cfg: Settings) -> ArtifactCache:
    artifacts = ArtifactCache(store, cfg.directory / "artifacts")
    await artifacts.clear_partial()
    return artifacts


@asynccontextmanager
async def _artifact_store(cfg: Settings) -> AsyncIterator[ArtifactStore]:
    store = ArtifactStore(cfg.artifact_store_url, cfg.artifact_store_options())
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def _batch_work(batch: BatchWorker | None, registry: CollectorRegistry) -> AsyncIterator[None]:
    if batch is None:
        yield
        return
    registry.register(BatchMetrics(batch))
    async with running(batch.run(), "batch"):
        yield


async def _follow(table: Table, health: Health, heartbeat: Heartbeat) -> None:
    """Ready once every deployment that the topic held has been seen; where the process before this one left
    some, it serves these already."""
    while not table.caught_up:
        with suppress(Unavailable):
            await table.ready(_TABLE_S)
    health.set_ready("deployments")
    heartbeat.changed()


async def _listen(server: FrameServer, cfg: Settings) -> tuple[int, str]:
    """The port, and the address that routers are told."""
    try:
        port = await server.start(cfg.host, cfg.frames_port, reuse_port=cfg.reuse_port)
    except OSError as error:
        reason = error.strerror or error
        raise Fatal(f"Cannot listen on {cfg.host}:{cfg.frames_port} (FRAMES_PORT): {reason}.") from error
    if cfg.frames_socket is None:
        return port, f"{cfg.reached_at}:{port}"
    try:
        return port, await server.start_unix(cfg.frames_socket)
    except OSError as error:
        reason = error.strerror or error
        raise Fatal(f"Cannot listen at {cfg.frames_socket} (FRAMES_SOCKET): {reason}.") from error


def _batch(cfg: Settings) -> BatchOptions:
    return BatchOptions(
        pool=cfg.pool,
        allow=cfg.batch_input_allow,
        s3_options=cfg.artifact_store_options(),
        directory=cfg.directory,
        work=WorkOptions(cfg.worker_id, cfg.batch_patience_s, payload_rows=cfg.batch_payload_rows),
        partitions=cfg.batch_partitions,
    )
