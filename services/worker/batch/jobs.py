"""Which jobs are still wanted, as control.jobs.v1 says."""

from __future__ import annotations

from google.protobuf.message import DecodeError
from headrace.v1.batch_pb2 import BatchChunk, BatchControl

from services.common.clock import Clock
from services.common.errors import Cancelled, DeadlineExceeded, HeadraceError, InvalidArgument


class Jobs:
    """The jobs that were told to stop. A job that is not known is under way."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._stopped: dict[str, HeadraceError] = {}

    def apply(self, key: bytes, value: bytes | None) -> None:
        """Take in one record. Raises InvalidArgument for one that cannot be read."""
        job_id = key.decode(errors="replace")
        try:
            state = BatchControl.FromString(value).state if value is not None else None
        except DecodeError as error:
            raise InvalidArgument(f"what is said of job {job_id} cannot be read: {error}") from error
        if state == BatchControl.STATE_CANCELLED:
            self._stopped[job_id] = Cancelled("the job was cancelled")
        elif state == BatchControl.STATE_EXPIRED:
            self._stopped[job_id] = _expired()
        else:
            self._stopped.pop(job_id, None)

    def stop(self, chunk: BatchChunk) -> HeadraceError | None:
        """Why `chunk` is not wanted any more; None where it is. From any thread."""
        if chunk.expires_at_us and self._clock.unix_us() >= chunk.expires_at_us:
            return _expired()
        return self._stopped.get(chunk.job_id)


def _expired() -> DeadlineExceeded:
    return DeadlineExceeded("the job expired")
