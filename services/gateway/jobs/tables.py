"""Tables of the schema `gateway`. `migrations/` creates them; nothing else does."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, DateTime, ForeignKey, LargeBinary, Text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from services.common.db import OutboxRow


class Tables(DeclarativeBase):
    """Every table of the gateway."""

    type_annotation_map = {  # noqa: RUF012 - read by the declarative scan, never changed
        str: Text,
        int: BigInteger,
        bytes: LargeBinary,
        datetime: DateTime(timezone=True),
        dict[str, Any]: JSONB,
    }


class JobRow(Tables):
    """One job. Whatever changes it holds its row's lock, so its counts follow from its chunks."""

    __tablename__ = "jobs"

    job_id: Mapped[str] = mapped_column(primary_key=True)
    #: API key id of its owner; empty: a producer on Kafka without one.
    key_id: Mapped[str]
    kind: Mapped[str]
    model: Mapped[str]
    version: Mapped[str]
    artifact_digest: Mapped[str]
    pool: Mapped[str]
    #: A State.
    state: Mapped[str]
    #: What a job that is cancelling will be.
    ending: Mapped[str | None]
    input_uri: Mapped[str]
    input_format: Mapped[int]
    #: JSON Lines of few rows, instead of an address.
    inline_input: Mapped[bytes | None]
    etag: Mapped[str]
    output_format: Mapped[int]
    callback_url: Mapped[str]
    priority: Mapped[int]
    job_metadata: Mapped[dict[str, Any]] = mapped_column("metadata")
    exclude_from_drift: Mapped[bool]
    exclude_from_experiments: Mapped[bool]
    #: Rows of one run, decided when the job is accepted: a chunk done again must give the same bytes. 0: the
    #: worker's rule.
    run_rows: Mapped[int]
    #: Where the cutting goes on; None: at the start.
    cursor: Mapped[dict[str, Any] | None]
    #: Whether the input was cut to its end, so that `rows` is its number of rows.
    is_split: Mapped[bool]
    rows: Mapped[int]
    chunks: Mapped[int]
    #: Chunks that nobody knows of yet, that are with the workers, and the rest.
    open_chunks: Mapped[int]
    flying_chunks: Mapped[int]
    completed: Mapped[int]
    failed: Mapped[int]
    #: Rows per second, and when that was so.
    rate: Mapped[float | None]
    rate_at: Mapped[datetime | None]
    error: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime]
    in_progress_at: Mapped[datetime | None]
    cancelling_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]
    expires_at: Mapped[datetime]
    lease_owner: Mapped[str | None]
    lease_until: Mapped[datetime | None]
    #: Grows with every change that a follower would like to see.
    revision: Mapped[int]
    #: Whether workers may forget it, and its objects were removed.
    is_forgotten: Mapped[bool]


class ChunkRow(Tables):
    """One chunk. `state`: open, flying (published), done, dropped (the job ended without it)."""

    __tablename__ = "job_chunks"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id", ondelete="CASCADE"), primary_key=True)
    index: Mapped[int] = mapped_column(primary_key=True)
    state: Mapped[str]
    first_row: Mapped[int]
    rows: Mapped[int]
    #: Serialized headrace.v1.InputRange.
    input: Mapped[bytes]
    attempt: Mapped[int]
    #: How often workers said that they cannot do it now.
    refusals: Mapped[int]
    published_at: Mapped[datetime | None]
    done_at: Mapped[datetime | None]
    code: Mapped[int]
    message: Mapped[str]
    field: Mapped[str]
    rows_done: Mapped[int]
    rows_failed: Mapped[int]
    results_object: Mapped[str]
    errors_object: Mapped[str]
    results_inline: Mapped[bytes | None]
    errors_inline: Mapped[bytes | None]


class IdempotencyKeyRow(Tables):
    """What a caller's key was used for, for a day."""

    __tablename__ = "idempotency_keys"

    key_id: Mapped[str] = mapped_column(primary_key=True)
    idempotency_key: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[bytes]
    job_id: Mapped[str]
    created_at: Mapped[datetime]


class DeliveryRow(Tables):
    """One callback that was not acknowledged yet; rows go when it was, or when nobody tries any more."""

    __tablename__ = "deliveries"

    delivery_id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str]
    url: Mapped[str]
    host: Mapped[str]
    body: Mapped[bytes]
    attempts: Mapped[int]
    due_at: Mapped[datetime]
    created_at: Mapped[datetime]
    last_error: Mapped[str]


class FileRow(Tables):
    """An uploaded file, the object `files/<file_id>/<filename>` of the artifact store. Until `stored_at` is
    set, the object may not be there, and nobody is told of the file."""

    __tablename__ = "files"

    file_id: Mapped[str] = mapped_column(primary_key=True)
    key_id: Mapped[str]
    purpose: Mapped[str]
    filename: Mapped[str]
    bytes: Mapped[int] = mapped_column("bytes", BigInteger)
    created_at: Mapped[datetime]
    stored_at: Mapped[datetime | None]
    expires_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]

    def readable(self, now: datetime) -> bool:
        """Whether it is there, and neither deleted nor expired."""
        is_kept = self.expires_at is None or self.expires_at > now
        return self.stored_at is not None and self.deleted_at is None and is_kept


class Outbox(OutboxRow, Tables):
    """Records of control.jobs.v1 on their way."""
