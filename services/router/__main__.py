"""`python -m services.router`: reads the environment, then serves until told to stop."""

from __future__ import annotations

import sys

import structlog

from services.common.clock import SystemClock
from services.common.lifecycle import keep_freed_memory, run, until_stopped
from services.common.settings import ConfigurationError, load
from services.common.telemetry import flush_logs, setup_logging
from services.router.app import router_app
from services.router.settings import Settings


def main() -> None:
    """Run the service; ends the process."""
    setup_logging("router")
    try:
        cfg = load(Settings)
    except ConfigurationError as error:
        structlog.get_logger(__name__).critical("fatal", reason=str(error))
        flush_logs()
        sys.exit(error.exit_code)
    setup_logging("router", cfg.log_level, json=cfg.log_format == "json")

    keep_freed_memory()

    async def service() -> None:
        async with router_app(cfg, SystemClock()):
            await until_stopped()

    run(service, drain_s=cfg.drain_s)


if __name__ == "__main__":
    main()
