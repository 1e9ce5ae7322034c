"""`python -m services.drift`"""

from services.common.clock import SystemClock
from services.common.lifecycle import run, until_stopped
from services.common.settings import load
from services.common.telemetry import setup_logging
from services.drift.app import drift_app
from services.drift.settings import Settings


async def main() -> None:
    """Serve until told to stop."""
    cfg = load(Settings)
    setup_logging("drift", cfg.log_level, json=cfg.log_format == "json")
    async with drift_app(cfg, SystemClock()):
        await until_stopped()


if __name__ == "__main__":
    setup_logging("drift")
    run(main)
