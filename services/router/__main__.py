"""`python -m services.router`: reads the environment, then serves until told to stop."""

from __future__ import annotations

from services.common.clock import SystemClock
from services.common.lifecycle import keep_freed_memory, run, until_stopped
from services.common.starting import configured
from services.router.app import router_app
from services.router.settings import Settings


def main() -> None:
    """Run the service; ends the process."""
    cfg = configured("router", Settings)
    keep_freed_memory()

    async def service() -> None:
        async with router_app(cfg, SystemClock()):
            await until_stopped()

    run(service, drain_s=cfg.drain_s)


if __name__ == "__main__":
    main()
