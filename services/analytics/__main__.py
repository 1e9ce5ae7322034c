"""`python -m services.analytics`"""

import pyarrow as pa

from services.analytics.app import analytics_app
from services.analytics.settings import Settings
from services.common.clock import SystemClock
from services.common.lifecycle import give_freed_memory_back, run, until_stopped
from services.common.settings import load
from services.common.telemetry import setup_logging


async def main() -> None:
    """Serve until told to stop."""
    give_freed_memory_back()
    pa.set_memory_pool(pa.system_memory_pool())  # its own keeps what a backlog once took
    cfg = load(Settings)
    setup_logging("analytics", cfg.log_level, json=cfg.log_format == "json")
    async with analytics_app(cfg, SystemClock()):
        await until_stopped()


if __name__ == "__main__":
    setup_logging("analytics")
    run(main)
