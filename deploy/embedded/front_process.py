"""What one process of gateway and router runs: both apps, and the guest, on one event loop. Apart from
`front`, whose parent process needs none of it."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress

from structlog.contextvars import bound_contextvars

from services.common.bus import Follower, KafkaBus
from services.common.clock import Clock
from services.common.lifecycle import Health, end_with_parent, roam, stay_on, until_stopped
from services.gateway.app import gateway_app
from services.gateway.settings import Settings as GatewaySettings
from services.router.app import Router, router_app
from services.router.settings import Settings as RouterSettings
from services.worker.guest import guest_worker
from services.worker.settings import Settings as WorkerSettings


async def serve(
    gateway: GatewaySettings,
    router: RouterSettings,
    guest: WorkerSettings | None,
    clock: Clock,
    core: int | None = None,
) -> None:
    """Serve until told to stop, the event loop on `core` only, if that is given. Without `guest` all versions
    are the worker processes'."""
    if gateway.supervised:
        end_with_parent()
    asyncio.get_running_loop().set_default_executor(
        ThreadPoolExecutor(thread_name_prefix="asyncio", initializer=roam)
    )
    follower = Follower(gateway.kafka_bootstrap_servers, "front")
    # The caller ends before the called: what the gateway still answers needs the router, and that its guest.
    async with AsyncExitStack() as stack:
        with bound_contextvars(service="router"):  # of its tasks, and so of their lines in the log
            inner = await stack.enter_async_context(router_app(router, clock, follower=follower, guest=True))
        if guest is not None:
            with bound_contextvars(service="worker"):
                await _take_in(stack, guest, inner, clock, follower)
        await _known(inner.health, 2 * router.table_wait_s)
        await stack.enter_async_context(gateway_app(gateway, clock, follower=follower))
        if core is not None:
            stay_on(core)
        await until_stopped()


async def _take_in(
    stack: AsyncExitStack, cfg: WorkerSettings, router: Router, clock: Clock, follower: Follower
) -> None:
    bus = await stack.enter_async_context(
        KafkaBus(cfg.kafka_bootstrap_servers, f"worker-{cfg.worker_id}", follower=follower)
    )
    await stack.enter_async_context(
        guest_worker(cfg, clock, bus, router.log, router.metrics, router.dispatcher.endpoints.apply)
    )


async def _known(health: Health, patience_s: float) -> None:
    """Wait until the router knows its routes: a process that takes over from another shares its port, and
    would refuse what that one answers."""
    with suppress(TimeoutError):
        async with asyncio.timeout(patience_s):
            while not health.ready:  # noqa: ASYNC110 - one of several parts, at the start only
                await asyncio.sleep(0.02)
