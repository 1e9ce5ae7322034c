"""Everything about jobs, wired and kept going beside real-time serving, which never waits for any of it."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import structlog
from prometheus_client import CollectorRegistry

from services.common.bus import Bus
from services.common.bus.lag_gauges import show_lag
from services.common.clock import Clock
from services.common.db import OutboxRelay, engine, migrate
from services.common.errors import Fatal, HeadraceError
from services.common.objects import ArtifactStore, InputSources
from services.common.objects.sources import check_prefixes
from services.common.tasks import running
from services.common.topics import JOB_RESULTS, JOBS, Topic, chunks
from services.gateway.catalogue import Catalogue
from services.gateway.jobs.addresses import CallbackRules
from services.gateway.jobs.backend import Availability, Backend
from services.gateway.jobs.callbacks import CallbackSender
from services.gateway.jobs.consumers import ChunkResults, SubmittedJobs
from services.gateway.jobs.controller import Controller
from services.gateway.jobs.losses import Losses
from services.gateway.jobs.metrics import JobMetrics
from services.gateway.jobs.publishing import ChunkPublisher, EnsureTopics
from services.gateway.jobs.retention import Retention
from services.gateway.jobs.service import JobLimits, JobService
from services.gateway.jobs.tables import Outbox
from services.gateway.jobs.watching import Watching
from services.gateway.keys import KeyRing
from services.gateway.pools import Pools

log = structlog.get_logger(__name__)

_SCHEMA = "gateway"
_GROUP = "gateway"
_MIGRATIONS = Path(__file__).resolve().parent.parent / "migrations"
_CONNECTIONS = 8
_RETRY_S = 2.0
_CLOSE_S = 15.0
_RESULTS_AT_ONCE = 200
_JOBS_AT_ONCE = 50


@dataclass(frozen=True, slots=True)
class JobSettings:
    """What jobs need of the environment. Without `database_url` or `artifact_store_url` there are none."""

    owner: str
    database_url: str
    artifact_store_url: str
    artifact_store_options: dict[str, str]
    input_allow: tuple[str, ...]
    partitions: int
    callback_allow: tuple[str, ...]
    callback_secret: str
    max_jobs_per_key: int
    retention_s: float


class _Wakes:
    """Who wants to know of a change; the controller joins once the database is there."""

    def __init__(self) -> None:
        self.watching: Watching | None = None
        self.controller: Controller | None = None
        self.sender: CallbackSender | None = None
        self.relay: OutboxRelay | None = None

    def changed(self, job_id: str) -> None:
        """A job changed."""
        if self.watching is not None:
            self.watching.changed(job_id)
        for one in (self.controller, self.relay, self.sender):
            if one is not None:
                one.wake()

    def ended(self) -> None:
        """Some jobs have ended."""
        if self.sender is not None:
            self.sender.wake()


@dataclass(frozen=True, slots=True)
class Around:
    """Parts of the gateway that jobs use. `is_known`: whether models and keys were read."""

    bus: Bus
    ensure: EnsureTopics
    catalogue: Catalogue
    keys: KeyRing
    registry: CollectorRegistry
    clock: Clock
    pools: Pools
    is_known: Callable[[], bool]


@asynccontextmanager
async def jobs_running(cfg: JobSettings, around: Around) -> AsyncIterator[JobService]:
    """The service of jobs, at once; what it needs is reached for in the background for as long as the block
    runs. Raises Fatal where nothing could ever be read as the settings are."""
    check_prefixes(cfg.input_allow)
    is_configured = bool(cfg.database_url and cfg.artifact_store_url)
    availability = Availability(is_configured=is_configured)
    wakes = _Wakes()
    async with AsyncExitStack() as stack:
        wakes.watching = await stack.enter_async_context(Watching(availability, around.clock))
        running = _Running(cfg, around, availability, wakes)
        if is_configured:
            await stack.enter_async_context(running.background())
        yield running.service


class _Running:
    """What runs once the database was reached."""

    def __init__(self, cfg: JobSettings, around: Around, availability: Availability, wakes: _Wakes) -> None:
        assert wakes.watching is not None  # noqa: S101 - made just before
        self._cfg = cfg
        self._around = around
        self._availability = availability
        self._wakes = wakes
        self._metrics = JobMetrics(around.registry)
        self._rules = CallbackRules(cfg.callback_allow, is_signed=bool(cfg.callback_secret))
        self.service = JobService(
            availability=availability,
            catalogue=around.catalogue,
            pools=around.pools,
            rules=self._rules,
            watching=wakes.watching,
            changed=wakes.changed,
            clock=around.clock,
            limits=JobLimits(cfg.max_jobs_per_key),
            committed=self._metrics.committed,
        )

    @asynccontextmanager
    async def background(self) -> AsyncIterator[None]:
        """Reach for what is needed and run, beside the block."""
        stop = asyncio.Event()
        task = asyncio.create_task(self._run(stop), name="jobs")
        try:
            yield
        finally:
            stop.set()
            _done, late = await asyncio.wait({task}, timeout=_CLOSE_S)
            for one in late:
                one.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self._rules.close()

    async def _run(self, stop: asyncio.Event) -> None:
        """Until `stop`: prepare, then run; what fails is tried again."""
        ending = asyncio.create_task(stop.wait())
        try:
            while not stop.is_set():
                preparing = asyncio.create_task(self._prepared())
                await asyncio.wait({preparing, ending}, return_when=asyncio.FIRST_COMPLETED)
                if not preparing.done():
                    preparing.cancel()
                    await asyncio.gather(preparing, return_exceptions=True)
                    return
                try:
                    backend = preparing.result()
                    async with self._open(backend):
                        await ending
                except (Fatal, HeadraceError) as error:
                    log.warning("jobs_not_ready", reason=str(error))
                except Exception:
                    log.exception("jobs_not_ready")
                with suppress(TimeoutError):
                    async with asyncio.timeout(_RETRY_S):
                        await stop.wait()
        finally:
            ending.cancel()
            await asyncio.gather(ending, return_exceptions=True)

    async def _prepared(self) -> Backend:
        """The database with its schema, and the store. Raises Fatal."""
        cfg = self._cfg
        await migrate(cfg.database_url, _SCHEMA, _MIGRATIONS)
        store = await asyncio.to_thread(ArtifactStore, cfg.artifact_store_url, cfg.artifact_store_options)
        try:
            sources = InputSources(store, cfg.input_allow, cfg.artifact_store_options)
            return Backend(engine(cfg.database_url, _SCHEMA, pool_size=_CONNECTIONS), store, sources)
        except BaseException:
            await store.close()
            raise

    @asynccontextmanager
    async def _open(self, backend: Backend) -> AsyncIterator[None]:
        cfg, around, wakes = self._cfg, self._around, self._wakes
        clock, bus = around.clock, around.bus
        async with AsyncExitStack() as stack:
            enter = stack.enter_async_context
            stack.push_async_callback(backend.store.close)
            stack.push_async_callback(backend.sources.close)
            stack.push_async_callback(backend.engine.dispose)
            publisher = ChunkPublisher(bus, around.ensure, cfg.partitions, clock)
            wakes.relay = await enter(OutboxRelay(backend.engine, Outbox, bus, clock))
            wakes.sender = await enter(
                CallbackSender(backend.engine, self._rules, cfg.callback_secret, clock, self._metrics)
            )
            controller = Controller(
                cfg.owner, backend, publisher, self._around.pools, clock, self._metrics, wakes.changed
            )
            wakes.controller = await enter(controller)
            await enter(Losses(backend, publisher, controller, clock, self._metrics, wakes.changed))
            await enter(Retention(backend, clock, timedelta(seconds=cfg.retention_s)))
            self._availability.open(backend)
            stack.callback(self._availability.close)
            results = ChunkResults(self._availability, clock, self._metrics, wakes.changed, wakes.ended)
            await enter(bus.consume(JOB_RESULTS, _GROUP, results, max_records=_RESULTS_AT_ONCE))
            submitted = SubmittedJobs(self.service, around.keys, around.is_known)
            await enter(bus.consume(JOBS, _GROUP, submitted, max_records=_JOBS_AT_ONCE))
            groups = functools.partial(_groups, around.pools, cfg.partitions, set())
            lag = show_lag(bus, groups, self._metrics.lag, self._metrics.dead_letters)
            await enter(running(lag, "jobs:lag"))
            log.info("jobs_ready", owner=cfg.owner)
            yield


def _groups(pools: Pools, partitions: int, known: set[str]) -> list[tuple[Topic, str]]:
    """Who reads what of jobs: gateways, and the workers of each pool, whose records gateways look after.
    Pools are kept in `known`: of one whose workers have gone, what they left is still there."""
    known.update(pools.names())
    ours = [(JOBS, _GROUP), (JOB_RESULTS, _GROUP)]
    return ours + [(chunks(pool, partitions), pool) for pool in sorted(known)]
