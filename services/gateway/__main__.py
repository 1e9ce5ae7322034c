"""`python -m services.gateway`: read the environment, run until told to stop."""

from __future__ import annotations

import gc

from services.common.clock import SystemClock
from services.common.lifecycle import run, until_stopped
from services.common.settings import load
from services.common.telemetry import setup_logging
from services.gateway.app import gateway_app
from services.gateway.settings import Settings


async def main() -> None:
    """Serve until the first signal."""
    cfg = load(Settings)
    setup_logging("gateway", cfg.log_level, json=cfg.log_format == "json")
    async with gateway_app(cfg, SystemClock()):
        # What the start left lives as long as the process; collections need not walk it again and again.
        gc.collect()
        gc.freeze()
        await until_stopped()


if __name__ == "__main__":
    run(main)
