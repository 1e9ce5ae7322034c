"""What jobs need beside Kafka, and whether it is there: PostgreSQL and the artifact store."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncEngine

from services.common.errors import Unavailable, Unimplemented
from services.common.objects import ArtifactStore, InputSources

_RETRY_MS = 2000


@dataclass(frozen=True, slots=True)
class Backend:
    """PostgreSQL with its schema in place, the artifact store, and what may be read of inputs."""

    engine: AsyncEngine
    store: ArtifactStore
    sources: InputSources


class Availability:
    """Whether jobs can be taken. Real-time serving never asks."""

    def __init__(self, *, is_configured: bool) -> None:
        self._is_configured = is_configured
        self._backend: Backend | None = None

    def ready(self) -> Backend:
        """Raises Unimplemented where this gateway is not set up for jobs, Unavailable while the database was
        not reached yet."""
        if self._backend is not None:
            return self._backend
        if not self._is_configured:
            raise Unimplemented(
                "This installation takes no jobs: DATABASE_URL or ARTIFACT_STORE_URL is not set."
            )
        raise Unavailable("Jobs cannot be taken now: the database is away.", retry_after_ms=_RETRY_MS)

    def open(self, backend: Backend) -> None:
        """From now on `backend` is there."""
        self._backend = backend

    def close(self) -> None:
        """It is not any more."""
        self._backend = None
