"""`python -m deploy.embedded.front`: the gateway and its router in one process, on one event loop, where
cores are few, with a guest of the worker's that runs quick models there. Each is the service that it is
elsewhere, with its own settings, metrics and files; requests cross between them without a socket.

The environment is the gateway's. FRONTS is a JSON list, for each process what its router and its guest read
otherwise; of several, this process is the parent, which takes no requests, and tells each the FRONT_CORE that
its event loop stays on where every core has one of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack

from deploy.embedded.configuration import FRONT
from deploy.embedded.server import LOOPBACK
from services.common.clock import SystemClock
from services.common.lifecycle import (
    Health,
    JointOps,
    cores_for,
    held_port,
    keep_freed_memory,
    run,
    serve_asgi,
    until_stopped,
)
from services.common.starting import configured
from services.gateway.processes import gateway_processes
from services.gateway.settings import Settings as GatewaySettings
from services.router.settings import Settings as RouterSettings
from services.worker.settings import Settings as WorkerSettings

#: What ending takes beside the gateway's drain: the router's log, snapshots, spans, connections to Kafka and
#: Redis, of two services.
_SLACK_S = 10.0


def main() -> None:
    """Run them; ends the process."""
    fronts: list[dict[str, dict[str, str]]] = json.loads(os.environ["FRONTS"])
    gateway = configured("gateway", GatewaySettings)
    router = configured("gateway", RouterSettings, fronts[0]["router"])
    guest = None
    if "guest" in fronts[0]:
        guest = configured("gateway", WorkerSettings, fronts[0]["guest"])
        # What the guest answers is logged by the router.
        most = max(router.log_max_bytes, guest.log_max_bytes)
        router = router.model_copy(update={"log_max_bytes": most})
    keep_freed_memory()
    # The gateway has drained before the router begins to, which has nothing to answer any more.
    drain_s = gateway.drain_notice_s + gateway.drain_s + _SLACK_S
    if len(fronts) == 1:
        from deploy.embedded.front_process import serve  # noqa: PLC0415 - not in the parent

        core = int(os.environ["FRONT_CORE"]) if "FRONT_CORE" in os.environ else None
        run(lambda: serve(gateway, router, guest, SystemClock(), core), drain_s=drain_s)
    else:
        run(lambda: _supervise(gateway, router, fronts), drain_s=drain_s + _SLACK_S)


async def _supervise(
    gateway: GatewaySettings, router: RouterSettings, fronts: Sequence[Mapping[str, Mapping[str, str]]]
) -> None:
    """Run a process for each of `fronts`, and answer the routers' ops port for all of them; the gateways'
    answers for itself."""
    async with AsyncExitStack() as stack:
        held = [stack.enter_context(held_port(LOOPBACK, 0)).getsockname()[1] for _ in fronts]
        cores = cores_for(len(fronts))
        own = [
            {
                "FRONTS": json.dumps([{**front, "router": {**front["router"], "OPS_PORT": str(port)}}]),
                "ROUTER_ADDRESSES": f"local:{front['router']['FRAMES_NAME']}",
            }
            for front, port in zip(fronts, held, strict=True)
        ]
        for environment, core in zip(own, cores or (), strict=False):  # none where there is no such choice
            environment["FRONT_CORE"] = str(core)
        group = await stack.enter_async_context(
            gateway_processes(gateway, len(fronts), module=FRONT, own=own)
        )
        joint = JointOps(LOOPBACK, held, Health(), lambda: group.restarts)
        await stack.enter_async_context(
            serve_asgi(joint, router.host, router.ops_port, reuse_port=router.reuse_port)
        )
        await group.until_failed(until_stopped())


if __name__ == "__main__":
    main()
