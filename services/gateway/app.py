"""The gateway, wired."""

from __future__ import annotations

import asyncio
import functools
import os
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import structlog
from prometheus_client import CollectorRegistry

from services.common.bus import Bus, DeadLetters, Follower, KafkaBus, Table, followed
from services.common.bus.admin import ensure_topics
from services.common.clock import Clock
from services.common.errors import Unavailable
from services.common.frames import FrameCalls, Limits, client_tls_of
from services.common.lifecycle import Health, ops_app, serve_asgi
from services.common.telemetry import setup_tracing
from services.common.topics import DEPLOYMENTS, KEYS, Topic
from services.gateway.admission import Admission
from services.gateway.catalogue import Catalogue
from services.gateway.hot.front import HotFront, HttpLimits
from services.gateway.hot.protocol import HotProtocol
from services.gateway.jobs.openai_runtime import openai_running
from services.gateway.jobs.runtime import Around, JobSettings, jobs_running
from services.gateway.keys import KeyRing
from services.gateway.leases import Leases, leased
from services.gateway.metrics import GatewayMetrics
from services.gateway.oip_server import InferenceServicer, serve_oip
from services.gateway.pools import pools_followed
from services.gateway.predict import PredictLimits, PredictService
from services.gateway.regions import Regions
from services.gateway.rest.app import Parts, rest_app
from services.gateway.rest.management import management_client, upstreams
from services.gateway.router_client import RouterClient, WaitingRoom
from services.gateway.settings import Settings

log = structlog.get_logger(__name__)

_ROUTER_WAIT_S = 2.0
_TOPICS_S = 10.0
#: Requests of one turn of the loop that go on to a router without waiting for its end. Fewer make every frame
#: dearer, and more leave router and worker idle meanwhile (benchmarks/PROFILE.md).
_TURN_ITEMS = 48


@dataclass(frozen=True, slots=True)
class Gateway:
    """A running gateway and the ports that it got."""

    http_port: int
    grpc_port: int
    ops_port: int
    health: Health
    admission: Admission


@asynccontextmanager
async def gateway_app(
    cfg: Settings, clock: Clock, bus: Bus | None = None, *, follower: Follower | None = None
) -> AsyncIterator[Gateway]:
    """Serve while the block runs. `bus` replaces Kafka; `follower` reads control topics where another service
    of the process does, too.

    At the end: not ready at once, `drain_notice_s` of answers that close their connection, then no new
    connections, then the rest of `drain_s` for what runs.
    """
    process = f"gateway-{os.getpid()}-{secrets.token_hex(3)}"
    health, registry = Health("ports"), CollectorRegistry()
    catalogue, keys = Catalogue(), KeyRing(clock)
    metrics = GatewayMetrics(registry, lambda model: catalogue.find(model) is not None)
    limits = PredictLimits(
        cfg.max_body_bytes,
        cfg.default_timeout_s,
        cfg.max_timeout_s,
        max_unpacked_json_bytes=cfg.max_unpacked_json_bytes,
        max_held_bytes=cfg.max_held_bytes,
    )
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        tracing = setup_tracing(
            "gateway", cfg.otel_exporter_otlp_endpoint or None, cfg.otel_traces_sample_ratio
        )
        stack.push_async_callback(tracing.close)
        ops = ops_app(health, registry)
        ops_port = await enter(
            serve_asgi(ops, cfg.ops_host or cfg.host, cfg.ops_port, reuse_port=cfg.reuse_port)
        )

        events: Bus = bus if bus is not None else await enter(_kafka(cfg, process, follower))
        folder = cfg.state_dir / "gateway"
        tables = (
            await enter(followed(events, KEYS, keys.apply, folder / "keys.table")),
            await enter(followed(events, DEPLOYMENTS, catalogue.apply, folder / "deployments.table")),
        )
        pools = await enter(pools_followed(events, clock))
        leases = await enter(leased(cfg.redis_url, clock, process, keys.buckets, cfg.limit_sharers))
        waiting = WaitingRoom()
        admission = Admission(cfg.max_platform_delay_ms / 1e3)
        router = RouterClient(await _channels(stack, cfg, process, waiting), waiting, admission)
        services = upstreams(cfg.registry_url, cfg.analytics_url, cfg.drift_url)
        client = await enter(management_client(cfg.internal_token, services))
        around = Around(
            bus=events,
            ensure=functools.partial(_ensure_topics, cfg, is_memory=bus is not None),
            catalogue=catalogue,
            keys=keys,
            registry=registry,
            clock=clock,
            pools=pools,
            is_known=lambda: all(table.caught_up for table in tables),
        )
        jobs = await enter(jobs_running(_job_settings(cfg, process), around))
        openai = await enter(
            openai_running(
                jobs,
                catalogue,
                keys,
                clock,
                folder / "uploads" / process,
                max_file_bytes=cfg.max_file_bytes,
                kept=timedelta(seconds=cfg.batch_retention_s),
            )
        )

        service = PredictService(
            catalogue=catalogue,
            keys=keys,
            router=router,
            tracing=tracing,
            metrics=metrics,
            clock=clock,
            limits=limits,
            regions=Regions(folder / "regions" if cfg.shared_memory else None, cfg.shared_memory_prefix),
        )
        stack.callback(service.close)
        parts = Parts(
            service=service,
            catalogue=catalogue,
            pools=pools,
            keys=keys,
            bus=events,
            health=health,
            metrics=metrics,
            tracing=tracing,
            clock=clock,
            client=client,
            upstreams=services,
            jobs=jobs,
            openai=openai,
            dead_letters=DeadLetters(cfg.kafka_bootstrap_servers, events.publish),
        )
        front = HotFront(service, HttpLimits(max_connections=cfg.max_connections), hot=cfg.hot_routes)
        health.add_check("control", lambda: _unknown(tables, keys))
        health.add_check("router", lambda: None if router.usable else "no router can be reached")
        _gauges(metrics, front, router, admission, catalogue, keys, leases)

        await _control_known(tables, cfg.control_wait_s, bool(len(keys)))
        if cfg.supervised:
            await _router_reached(router)
        oip = await enter(
            serve_oip(
                InferenceServicer(
                    catalogue=catalogue,
                    pools=pools,
                    keys=keys,
                    health=health,
                    clock=clock,
                    regions=service.regions,
                ),
                service,
                cfg.host,
                cfg.grpc_port,
                max_connections=cfg.max_connections,
                drain_s=cfg.drain_s / 2,
                reuse_port=cfg.reuse_port,
            )
        )
        await enter(front.sweeping())
        http_port = await enter(
            serve_asgi(
                rest_app(parts),
                cfg.host,
                cfg.http_port,
                drain_s=cfg.drain_s / 2,
                http=functools.partial(HotProtocol, front),
                reuse_port=cfg.reuse_port,
            )
        )
        ports = Gateway(http_port, oip.port, ops_port, health, admission)
        health.set_ready("ports")
        log.info("serving", http=http_port, grpc=oip.port, ops=ops_port, models=len(catalogue))
        try:
            yield ports
        finally:
            health.start_draining()
            front.draining = True
            jobs.close()
            oip.announce_end()
            await asyncio.sleep(cfg.drain_notice_s)


def _gauges(
    metrics: GatewayMetrics,
    front: HotFront,
    router: RouterClient,
    admission: Admission,
    catalogue: Catalogue,
    keys: KeyRing,
    leases: Leases,
) -> None:
    gauge = metrics.gauge
    gauge("headrace_gateway_connections", "Open HTTP connections.", lambda: len(front.connections))
    gauge("headrace_gateway_in_flight", "Requests waiting for a router.", lambda: router.in_flight)
    gauge("headrace_gateway_in_flight_limit", "What may be in flight.", lambda: admission.limit)
    gauge("headrace_gateway_models", "Models in service.", lambda: len(catalogue))
    gauge("headrace_gateway_keys", "API keys that open the door.", lambda: len(keys))
    gauge("headrace_gateway_limits_shared", "Whether Valkey shares the limits.", lambda: leases.available)


def _kafka(cfg: Settings, process: str, follower: Follower | None) -> KafkaBus:
    return KafkaBus(
        cfg.kafka_bootstrap_servers, process, session_timeout=cfg.kafka_session_timeout_s, follower=follower
    )


def _job_settings(cfg: Settings, process: str) -> JobSettings:
    return JobSettings(
        owner=process,
        database_url=cfg.database_url,
        artifact_store_url=cfg.artifact_store_url,
        artifact_store_options=cfg.artifact_store_options(),
        input_allow=cfg.batch_input_allow,
        partitions=cfg.batch_partitions,
        callback_allow=cfg.callback_allow,
        callback_secret=cfg.callback_secret,
        max_jobs_per_key=cfg.batch_max_jobs_per_key,
        retention_s=cfg.batch_retention_s,
    )


async def _ensure_topics(cfg: Settings, topics: Sequence[Topic], *, is_memory: bool) -> None:
    if not is_memory:
        await ensure_topics(
            cfg.kafka_bootstrap_servers, topics, replication=cfg.kafka_replication, timeout=_TOPICS_S
        )


async def _channels(
    stack: AsyncExitStack, cfg: Settings, process: str, waiting: WaitingRoom
) -> list[FrameCalls]:
    channels = []
    ssl = client_tls_of(cfg)
    for address in cfg.routers:
        calls = FrameCalls(
            address,
            credential=cfg.internal_token,
            role="gateway",
            instance=process,
            limits=Limits(turn_items=_TURN_ITEMS),
            on_state=waiting.changed,
            sealed=True,
            ssl=ssl,
        )
        stack.push_async_callback(calls.close)
        calls.start()
        channels.append(calls)
    return channels


async def _router_reached(router: RouterClient) -> None:
    """Where others listen on the same port, wait a moment before taking connections from them."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_ROUTER_WAIT_S):
            while not router.usable:  # noqa: ASYNC110 - one of several, at the start only
                await asyncio.sleep(0.02)


def _unknown(tables: tuple[Table, ...], keys: KeyRing) -> str | None:
    if len(keys) or all(table.caught_up for table in tables):
        return None
    return "keys and deployments are not known yet"


async def _control_known(tables: tuple[Table, ...], wait_s: float, has_snapshot: bool) -> None:
    """Wait until keys and models are known. Kafka away: serve the snapshot at once; without one, after
    `wait_s`, serve nothing until the topics can be read."""
    try:
        async with asyncio.timeout(1.0 if has_snapshot else wait_s):
            for table in tables:
                await table.ready(wait_s)
    except (TimeoutError, Unavailable):
        log.warning("control_topics_away", serving="the snapshot" if has_snapshot else "nobody yet")
