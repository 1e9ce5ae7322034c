"""The table of OpenAI batches."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy.orm import Mapped, mapped_column

from services.gateway.jobs.tables import Tables


class OpenAIBatchRow(Tables):
    """One batch. `state` is validating, running (as a job) or finalizing while somebody has to do something
    about it, then failed, completed, expired or cancelled."""

    __tablename__ = "openai_batches"

    batch_id: Mapped[str] = mapped_column(primary_key=True)
    key_id: Mapped[str]
    endpoint: Mapped[str]
    input_file_id: Mapped[str]
    batch_metadata: Mapped[dict[str, Any]] = mapped_column("metadata")
    #: How long output and error files are kept; None: until they are deleted.
    output_expires_s: Mapped[int | None]
    state: Mapped[str]
    #: {"data": […]} as OpenAI lists them.
    errors: Mapped[dict[str, Any] | None]
    #: What the lines ask for; empty until the file was read.
    model: Mapped[str]
    version: Mapped[str]
    #: Lines, and of these the answered and the failed. Until they are counted the job's row has the latter.
    total: Mapped[int]
    completed: Mapped[int]
    failed: Mapped[int]
    #: Rows of the job, 0 where no line has any.
    rows: Mapped[int]
    #: How the model's outputs are shown, kept for when it is no longer served: see `openai_answers.shown_of`.
    shown: Mapped[dict[str, Any] | None]
    job_id: Mapped[str | None]
    output_file_id: Mapped[str | None]
    error_file_id: Mapped[str | None]
    created_at: Mapped[datetime]
    in_progress_at: Mapped[datetime | None]
    finalizing_at: Mapped[datetime | None]
    cancelling_at: Mapped[datetime | None]
    #: When the last state was reached.
    ended_at: Mapped[datetime | None]
    expires_at: Mapped[datetime]
    #: Until when somebody is at it, and until when nobody need be.
    due_at: Mapped[datetime]
    #: Steps that failed in a row.
    attempts: Mapped[int]
