"""`python -m services.gateway`: read the environment, run until told to stop."""

from __future__ import annotations

import sys

import structlog

from services.common.clock import SystemClock
from services.common.lifecycle import run, until_stopped
from services.common.settings import ConfigurationError, load
from services.common.telemetry import flush_logs, setup_logging
from services.gateway.app import gateway_app
from services.gateway.settings import Settings

#: What ending takes beside the drain: snapshots, spans, connections to Kafka and Redis.
_SLACK_S = 5.0


def main() -> None:
    """Run the service; ends the process."""
    setup_logging("gateway")
    try:
        cfg = load(Settings)
    except ConfigurationError as error:
        structlog.get_logger(__name__).critical("fatal", reason=str(error))
        flush_logs()
        sys.exit(error.exit_code)
    setup_logging("gateway", cfg.log_level, json=cfg.log_format == "json")

    async def service() -> None:
        async with gateway_app(cfg, SystemClock()):
            await until_stopped()

    run(service, drain_s=cfg.drain_notice_s + cfg.drain_s + _SLACK_S)


if __name__ == "__main__":
    main()
