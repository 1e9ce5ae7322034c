"""`python -m services.gateway`: read the environment, run until told to stop."""

from __future__ import annotations

from services.common.clock import SystemClock
from services.common.lifecycle import end_with_parent, keep_freed_memory, run, until_stopped, usable_cores
from services.common.starting import configured
from services.gateway.app import gateway_app
from services.gateway.processes import gateway_processes
from services.gateway.settings import Settings

#: What ending takes beside the drain: snapshots, spans, connections to Kafka and Redis.
_SLACK_S = 5.0


def main() -> None:
    """Run the service; ends the process."""
    cfg = configured("gateway", Settings)
    keep_freed_memory()
    count = max(1, usable_cores() // 4) if cfg.gateway_processes == "auto" else cfg.gateway_processes

    async def service() -> None:
        if cfg.supervised:
            end_with_parent()
        async with gateway_app(cfg, SystemClock()):
            await until_stopped()

    async def processes() -> None:
        async with gateway_processes(cfg, count) as group:
            await group.until_failed(until_stopped())

    drain_s = cfg.drain_notice_s + cfg.drain_s + _SLACK_S
    if count == 1:
        run(service, drain_s=drain_s)
    else:
        run(processes, drain_s=drain_s + _SLACK_S)


if __name__ == "__main__":
    main()
