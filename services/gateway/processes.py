"""Several gateways on the same ports: the kernel spreads the connections, each process is a gateway of its
own.

What is per process stays so: connections and held bytes are bounded in each, limits are leased to each by
Redis (and divided among them without it), metrics are told apart by the label `process`.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import structlog

from services.common.lifecycle import Health, JointOps, ProcessGroup, held_port, serve_asgi
from services.gateway.settings import Settings

log = structlog.get_logger(__name__)

_LOOPBACK = "127.0.0.1"
#: What a process needs beyond its drain before it is killed.
_SLACK_S = 6.0


@asynccontextmanager
async def gateway_processes(
    cfg: Settings,
    count: int,
    *,
    module: str = "services.gateway",
    own: Sequence[Mapping[str, str]] = (),
) -> AsyncIterator[ProcessGroup]:
    """Run `count` gateways while the block does, and answer the ops port for all of them. Each is `module`,
    with its part of `own` as environment beside what all of them share."""
    health = Health()
    async with AsyncExitStack() as stack:
        hold = stack.enter_context
        http, grpc = hold(held_port(cfg.host, cfg.http_port)), hold(held_port(cfg.host, cfg.grpc_port))
        ops = [hold(held_port(_LOOPBACK, 0)).getsockname()[1] for _ in range(count)]
        shared = {
            "GATEWAY_PROCESSES": "1",
            "SUPERVISED": "true",
            "REUSE_PORT": "true",
            "HTTP_PORT": str(http.getsockname()[1]),
            "GRPC_PORT": str(grpc.getsockname()[1]),
            "OPS_HOST": _LOOPBACK,
            "LIMIT_SHARERS": str(cfg.limit_sharers * count),
        }
        group = ProcessGroup(
            [sys.executable, "-m", module],
            [
                {**shared, "OPS_PORT": str(port), **(own[index] if own else {})}
                for index, port in enumerate(ops)
            ],
            stop_s=cfg.drain_notice_s + cfg.drain_s + _SLACK_S,
            hung_after_s=cfg.hung_after_s,
        )
        joint = JointOps(_LOOPBACK, ops, health, lambda: group.restarts)
        ops_port = await stack.enter_async_context(
            serve_asgi(joint, cfg.ops_host or cfg.host, cfg.ops_port, reuse_port=cfg.reuse_port)
        )
        await stack.enter_async_context(group.running())
        log.info(
            "supervising", processes=count, http=shared["HTTP_PORT"], grpc=shared["GRPC_PORT"], ops=ops_port
        )
        try:
            yield group
        finally:
            health.start_draining()
