"""`python -m services.analytics`"""

import pyarrow as pa

from services.analytics.app import analytics_app
from services.analytics.settings import Settings
from services.common.clock import SystemClock
from services.common.lifecycle import give_freed_memory_back, run, until_stopped
from services.common.starting import configured


async def main(cfg: Settings) -> None:
    """Serve until told to stop."""
    async with analytics_app(cfg, SystemClock()):
        await until_stopped()


if __name__ == "__main__":
    give_freed_memory_back()
    pa.set_memory_pool(pa.system_memory_pool())  # its own keeps what a backlog once took
    settings = configured("analytics", Settings)
    run(lambda: main(settings), drain_s=settings.drain_s)
