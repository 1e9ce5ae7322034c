"""What an entry (a route, an rpc) works with. Transactions begin and end here, not in what they call."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import structlog
from headrace.v1.registry_pb2 import ModelVersion
from sqlalchemy.ext.asyncio import AsyncEngine

from services.common.clock import Clock
from services.common.db import OutboxRelay, enqueue, transaction
from services.common.objects import ArtifactStore
from services.common.topics import TRIALS
from services.registry import service
from services.registry.artifacts import Artifacts, ReceivedFile
from services.registry.metrics import Metrics
from services.registry.repository import Repository
from services.registry.schemas import VersionIn
from services.registry.tables import ControlOutbox
from services.registry.uploads import Uploads

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Edge:
    """Shared by REST, gRPC and the republisher."""

    engine: AsyncEngine
    relay: OutboxRelay
    store: ArtifactStore
    artifacts: Artifacts
    uploads: Uploads
    metrics: Metrics
    clock: Clock
    #: Called after each commit that changed a trial.
    on_trials: list[Callable[[], None]] = field(default_factory=list)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Repository]:
        """Commit at the end of the block, with what it published in the outbox; roll back when it raises."""
        async with transaction(self.engine) as session:
            tx = Repository(session)
            yield tx
            await session.flush()
            await enqueue(session, ControlOutbox, tx.records)
        if tx.records:
            self.relay.wake()
            changed = [f"{record.topic}/{(record.key or b'').decode()}" for record in tx.records]
            log.info("control_state_changed", records=changed)
        if any(record.topic == TRIALS.name for record in tx.records):
            for told in self.on_trials:
                told()

    async def add_version(
        self, model: str, wanted: VersionIn, files: Sequence[ReceivedFile]
    ) -> tuple[ModelVersion, bool]:
        """Store what was received and make it a version: the version, and whether it is new.

        Blobs of an upload that is refused in the end stay in the store: they are addressed by content, and
        whoever sends them again finds them there.
        """
        stored = await self.artifacts.store(files, wanted.backend, wanted.signature)
        async with self.transaction() as tx:
            version, created = await service.create_version(tx, model, wanted, stored, self.clock)
        if created:
            self.metrics.versions_created.inc()
            self.metrics.uploaded_bytes.inc(sum(file.size for file in files))
        return version, created
