"""What the worker says of itself."""

from __future__ import annotations

from uuid import uuid4

from headrace.v1.control_pb2 import WorkerStatus

from services.common.clock import Clock
from services.common.lifecycle import Health
from services.common.topics import GUEST
from services.worker.loading import resident_bytes
from services.worker.model_host import ModelHost


class StatusReport:
    """Makes a WorkerStatus each time it is called. `addresses` are those of the frame stream and of gRPC."""

    def __init__(
        self, worker_id: str, pool: str, addresses: tuple[str, str],
        host: ModelHost, health: Health, clock: Clock, *, memory_limit: int,
    ) -> None:  # fmt: skip
        self._fixed = WorkerStatus(
            worker_id=worker_id,
            incarnation=uuid4().hex,
            frames_address=addresses[0],
            grpc_address=addresses[1],
            pool=pool,
            memory_limit_bytes=memory_limit,
        )
        self._host = host
        self._health = health
        self._clock = clock
        #: Set when the worker leaves; before that its health decides.
        self.state: WorkerStatus.State | None = None

    def __call__(self) -> WorkerStatus:
        """The status now."""
        models = [model for _, model in self._host.serving()]
        status = WorkerStatus()
        status.CopyFrom(self._fixed)
        status.state = self.state or self._by_health()
        if status.state != WorkerStatus.STATE_GONE:  # the last words are kept for ever, and nobody asks
            status.versions.extend(self._host.states())
        status.queued_rows = sum(model.queued_rows for model in models)
        status.running_rows = sum(model.running_rows for model in models)
        status.memory_bytes = resident_bytes()
        status.device = models[0].device if models else "cpu"
        status.sent_at_us = self._clock.unix_us()
        return status

    def counts(self) -> WorkerStatus:
        """Of a guest, for everybody: what it counted. They take it for gone, so nobody sends it anything."""
        status = WorkerStatus(
            worker_id=f"{GUEST}{self._fixed.worker_id}",
            incarnation=self._fixed.incarnation,
            state=WorkerStatus.STATE_GONE,
            sent_at_us=self._clock.unix_us(),
        )
        for one in self._host.states():
            if one.HasField("totals"):
                status.versions.add(
                    model=one.model,
                    version=one.version,
                    artifact_digest=one.artifact_digest,
                    totals=one.totals,
                )
        return status

    def _by_health(self) -> WorkerStatus.State:
        return WorkerStatus.STATE_READY if self._health.ready else WorkerStatus.STATE_STARTING
