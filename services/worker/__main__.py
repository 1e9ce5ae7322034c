"""`python -m services.worker`: reads the environment, then serves until told to stop."""

from __future__ import annotations

from services.common.clock import SystemClock
from services.common.lifecycle import keep_freed_memory, run, until_stopped
from services.common.starting import configured
from services.worker.app import worker_app
from services.worker.settings import Settings


def main() -> None:
    """Run the service; ends the process."""
    cfg = configured("worker", Settings)
    keep_freed_memory()

    async def service() -> None:
        async with worker_app(cfg, SystemClock()):
            await until_stopped()

    run(service, drain_s=cfg.drain_s)


if __name__ == "__main__":
    main()
