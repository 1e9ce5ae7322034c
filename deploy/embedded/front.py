"""`python -m deploy.embedded.front`: the gateway and its router in one process, on one event loop, where
cores are few. Each is the service that it is elsewhere, with its own settings, ports, metrics and files;
requests cross between them without a socket.

The environment is the gateway's; ROUTER holds, as a JSON object, what the router reads otherwise.
"""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import AsyncExitStack, suppress

from structlog.contextvars import bound_contextvars

from services.common.bus import Follower
from services.common.clock import SystemClock
from services.common.lifecycle import Health, keep_freed_memory, run, until_stopped
from services.common.starting import configured
from services.gateway.app import gateway_app
from services.gateway.settings import Settings as GatewaySettings
from services.router.app import router_app
from services.router.settings import Settings as RouterSettings

#: What ending takes beside the gateway's drain: the router's log, snapshots, spans, connections to Kafka and
#: Redis, of two services.
_SLACK_S = 10.0


def main() -> None:
    """Run both; ends the process."""
    gateway = configured("gateway", GatewaySettings)
    router = configured("gateway", RouterSettings, json.loads(os.environ["ROUTER"]))
    keep_freed_memory()
    clock = SystemClock()

    async def service() -> None:
        # The caller ends before the called: what the gateway still answers needs the router.
        follower = Follower(gateway.kafka_bootstrap_servers, "front")
        async with AsyncExitStack() as stack:
            with bound_contextvars(service="router"):  # of its tasks, and so of their lines in the log
                inner = await stack.enter_async_context(
                    router_app(router, clock, follower=follower, guest=True)
                )
            await _known(inner.health, 2 * router.table_wait_s)
            await stack.enter_async_context(gateway_app(gateway, clock, follower=follower))
            await until_stopped()

    # The gateway has drained before the router begins to, which has nothing to answer any more.
    run(service, drain_s=gateway.drain_notice_s + gateway.drain_s + _SLACK_S)


async def _known(health: Health, patience_s: float) -> None:
    """Wait until the router knows its routes: a process that takes over from another shares its port, and
    would refuse what that one answers."""
    with suppress(TimeoutError):
        async with asyncio.timeout(patience_s):
            while not health.ready:  # noqa: ASYNC110 - one of several parts, at the start only
                await asyncio.sleep(0.02)


if __name__ == "__main__":
    main()
