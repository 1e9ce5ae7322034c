"""`python -m services.drift`"""

from services.common.clock import SystemClock
from services.common.lifecycle import run, until_stopped
from services.common.starting import configured
from services.drift.app import drift_app
from services.drift.settings import Settings


async def main(cfg: Settings) -> None:
    """Serve until told to stop."""
    async with drift_app(cfg, SystemClock()):
        await until_stopped()


if __name__ == "__main__":
    settings = configured("drift", Settings)
    run(lambda: main(settings), drain_s=settings.drain_s)
