"""A worker that is the guest of a router's process, for versions that answer sooner than a request gets to
another process.

It takes small, quick versions of its pool only, runs them on the loop that brings the requests, and leaves
everything else to the worker processes, which have these versions, too: they take what is large, whatever
is sent again, mirrored or part of a job, and all of it whenever the guest cannot. Nobody but the router
learns of it, so deployments, rollouts and lists of workers count on worker processes alone; what it counted
is told to all, for the statistics.

A model that ends the process while it is loaded ends it once: the next process finds its mark, and leaves
the version to others. Left to them are also those whose time depends on the values that they are given
(`steadiness.py`), those that turn out to be slow, and those that find no room."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress

from headrace.v1.control_pb2 import ServedVersion, WorkerStatus
from prometheus_client import CollectorRegistry

from services.common.bus import Bus, Record, followed
from services.common.clock import Clock
from services.common.eventlog import EventLog
from services.common.frames import FrameServer
from services.common.lifecycle import Health, roam
from services.common.objects import ArtifactStore
from services.common.tasks import running
from services.common.telemetry import setup_tracing
from services.common.topics import DEPLOYMENTS
from services.worker.artifacts import ArtifactCache
from services.worker.backends.port import BackendOptions
from services.worker.desired import Deployments, defaults_of
from services.worker.heartbeat import Heartbeat
from services.worker.load_mark import LoadMark
from services.worker.loading import LoadOptions, VersionLoader, resident_bytes
from services.worker.metrics import WorkerMetrics
from services.worker.model_host import HostOptions, ModelHost
from services.worker.servicer import FrameConnection, Servicer
from services.worker.serving import Serving
from services.worker.settings import Settings
from services.worker.shared_inputs import SharedInputs
from services.worker.status import StatusReport

#: Takes a worker's id and its serialized status.
Announce = Callable[[bytes, bytes], None]

#: A version of which one batch took longer is left to others.
_SLOW_S = 0.25
#: Of the time to drain, the share in which it answers what is queued. Its host's callers had theirs before,
#: and its router needs some for the log after it: what is left then is refused, and asked of another worker.
_ANSWER_SHARE = 0.25
#: Kinds of artifacts that are run by one library call on a processor.
_BACKENDS = frozenset({"onnx"})


@asynccontextmanager
async def guest_worker(
    cfg: Settings, clock: Clock, bus: Bus, events: EventLog, metrics: CollectorRegistry, announce: Announce
) -> AsyncIterator[ModelHost]:
    """Serve as `local:<worker id>` while the block runs, then answer what is queued. `bus` brings the
    deployments, `events` is the host's prediction log, `metrics` what the host exports, `announce` tells its
    router."""
    async with AsyncExitStack() as stack:
        tracing = setup_tracing("worker", cfg.otel_exporter_otlp_endpoint, cfg.otel_traces_sample_ratio)
        stack.push_async_callback(tracing.close)
        store = ArtifactStore(cfg.artifact_store_url, cfg.artifact_store_options())
        stack.push_async_callback(store.close)
        artifacts = ArtifactCache(store, cfg.directory / "artifacts")
        await artifacts.clear_partial()
        pool = ThreadPoolExecutor(1, thread_name_prefix="guest", initializer=roam)
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)

        limit = resident_bytes() + cfg.guest_memory_bytes if cfg.guest_memory_bytes else 0
        options = LoadOptions(
            cfg.worker_id, BackendOptions(1), limit, slots=1, slowest_row=cfg.guest_row_us / 1e6
        )
        serving = Serving(clock, events, tracing, pool, cfg.inline_below_us / 1e6)
        mark = await asyncio.to_thread(LoadMark, cfg.directory / "loading")
        heartbeat = Heartbeat(_Told(announce), interval=cfg.heartbeat_s)
        host = ModelHost(
            Deployments(cfg.pool, defaults_of(cfg), lambda served: _fits(served, cfg.guest_artifact_bytes)),
            VersionLoader(artifacts, serving, options, mark),
            artifacts,
            heartbeat.changed,
            clock,
            HostOptions(linger=cfg.linger_s, long_idle=cfg.evict_idle_s, slow=_SLOW_S, returns=True),
        )
        stack.push_async_callback(host.close)
        # Copied, not mapped: such a request comes here only while no worker process can answer.
        servicer = Servicer(host, events, clock, SharedInputs(allowed=cfg.shared_memory))
        server = FrameServer(
            lambda peer: FrameConnection(servicer, peer),
            credential=cfg.internal_token,
            instance=cfg.worker_id,
            role="worker",
            detaches=True,
        )
        stack.push_async_callback(server.close)
        server.start_local(cfg.worker_id)
        collector = WorkerMetrics(host, servicer, None)  # its host says what there is to say of the log
        metrics.register(collector)
        stack.callback(metrics.unregister, collector)

        report = StatusReport(
            cfg.worker_id, cfg.pool, (f"local:{cfg.worker_id}", ""), host, Health(), clock,
            memory_limit=limit,
        )  # fmt: skip
        known = cfg.directory / "deployments.table"
        await stack.enter_async_context(followed(bus, DEPLOYMENTS, host.apply, known))
        await stack.enter_async_context(running(heartbeat.run(report), "guest's heartbeat"))
        counting = Heartbeat(bus, interval=cfg.heartbeat_s)
        await stack.enter_async_context(running(counting.run(report.counts), "guest's counts"))
        try:
            yield host
        finally:
            report.state = WorkerStatus.STATE_DRAINING
            await heartbeat.last(report())
            with suppress(TimeoutError):
                async with asyncio.timeout(cfg.drain_s * _ANSWER_SHARE):
                    await host.drain()


def _fits(served: ServedVersion, most_bytes: int) -> bool:
    return served.backend in _BACKENDS and served.artifact_bytes <= most_bytes


class _Told:
    """Gives statuses to the router of this process."""

    def __init__(self, announce: Announce) -> None:
        self._announce = announce

    async def publish(self, records: Sequence[Record]) -> None:
        for record in records:
            self._announce(record.key or b"", record.value or b"")
