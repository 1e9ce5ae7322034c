"""`python -m services.registry`"""

from __future__ import annotations

import structlog

from services.common.clock import SystemClock
from services.common.lifecycle import run, until_stopped
from services.common.starting import configured
from services.registry.app import registry_app
from services.registry.settings import Settings

log = structlog.get_logger(__name__)


async def main(cfg: Settings) -> None:
    """Serve until told to stop."""
    async with registry_app(cfg, SystemClock()) as registry:
        log.info("started", http_port=registry.http_port, grpc_port=registry.grpc_port)
        await until_stopped()


if __name__ == "__main__":
    settings = configured("registry", Settings)
    run(lambda: main(settings), drain_s=settings.drain_s)
