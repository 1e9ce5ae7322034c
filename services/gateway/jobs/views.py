"""A job as its callers see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, cast

from headrace.v1.batch_pb2 import InputFormat, OutputFormat
from headrace.v1.dataplane_pb2 import Priority
from headrace.v1.tensor_pb2 import Code

from services.gateway.jobs.progress import rows_per_s, time_left_s
from services.gateway.jobs.specs import INPUT_FORMATS, OUTPUT_FORMATS, PRIORITIES, SHOWN
from services.gateway.jobs.tables import JobRow

State = Literal["validating", "in_progress", "cancelling", "completed", "failed", "cancelled", "expired"]
STATES: tuple[State, ...] = (
    "validating",
    "in_progress",
    "cancelling",
    "completed",
    "failed",
    "cancelled",
    "expired",
)

_INPUT_NAMES = {number: name for name, number in INPUT_FORMATS.items()}
_INPUT_NAMES[InputFormat.INPUT_FORMAT_OPENAI] = "openai"
_OUTPUT_NAMES = {number: name for name, number in OUTPUT_FORMATS.items()}
_PRIORITY_NAMES = {number: name for name, number in PRIORITIES.items()}


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed."""

    code: Code
    message: str
    field: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """One job. `total` is None until the input was read to its end, `rows` are those known so far;
    `completed` and `failed` count rows. `rows_per_s` and `time_left_s` are None while nothing can be said."""

    job_id: str
    key_id: str
    kind: str
    model: str
    version: str
    pool: str
    state: State
    total: int | None
    rows: int
    completed: int
    failed: int
    rows_per_s: float | None
    time_left_s: float | None
    input_uri: str
    input_format: InputFormat
    output_format: OutputFormat
    priority: Priority
    callback_url: str
    metadata: Mapping[str, Any]
    exclude_from: tuple[str, ...]
    error: JobError | None
    created_at: datetime
    in_progress_at: datetime | None
    cancelling_at: datetime | None
    ended_at: datetime | None
    expires_at: datetime
    revision: int

    @property
    def ended(self) -> bool:
        """Whether nothing about it changes any more."""
        return self.ended_at is not None


@dataclass(frozen=True, slots=True)
class JobPage:
    """Some jobs, newest first."""

    jobs: list[Job]
    has_more: bool


def job_of(row: JobRow, now: datetime) -> Job:
    """The job of a row as it stands at `now`."""
    total = row.rows if row.is_split else None
    rate = rows_per_s(row, now)
    return Job(
        job_id=row.job_id,
        key_id=row.key_id,
        kind=row.kind,
        model=row.model,
        version=row.version,
        pool=row.pool,
        state=row.state,  # type: ignore[arg-type]  # only states are written
        total=total,
        rows=row.rows,
        completed=row.completed,
        failed=row.failed,
        rows_per_s=rate,
        time_left_s=None if row.ended_at else time_left_s(total, row.completed + row.failed, rate),
        input_uri=row.input_uri,
        input_format=cast(InputFormat, row.input_format),
        output_format=cast(OutputFormat, row.output_format),
        priority=cast(Priority, row.priority),
        callback_url=row.callback_url,
        metadata=row.job_metadata,
        exclude_from=tuple(
            name
            for name, is_out in (
                ("drift", row.exclude_from_drift),
                ("experiments", row.exclude_from_experiments),
            )
            if is_out
        ),
        error=None if row.error is None else JobError(**row.error),
        created_at=row.created_at,
        in_progress_at=row.in_progress_at,
        cancelling_at=row.cancelling_at,
        ended_at=row.ended_at,
        expires_at=row.expires_at,
        revision=row.revision,
    )


def job_json(job: Job) -> dict[str, Any]:
    """The job as REST, events and callbacks show it. Times are ISO 8601 in UTC; what is not known is null, as
    is a number that another release took for a format or a priority."""
    shown: dict[str, Any] = {
        "batch_id": job.job_id,
        "model": job.model,
        "version": job.version,
        "status": job.state,
        "counts": {"total": job.total, "completed": job.completed, "failed": job.failed},
        "rows_per_s": None if job.rows_per_s is None else round(job.rows_per_s, 1),
        "time_left_s": None if job.time_left_s is None else round(job.time_left_s, 1),
        "priority": _PRIORITY_NAMES.get(job.priority),
        "input_uri": job.input_uri or None,
        "input_format": _INPUT_NAMES.get(job.input_format),
        "output_format": _OUTPUT_NAMES.get(job.output_format),
        "metadata": {name: value for name, value in job.metadata.items() if name != SHOWN},
        "exclude_from": list(job.exclude_from),
        "created_at": _time(job.created_at),
        "in_progress_at": _time(job.in_progress_at),
        "ended_at": _time(job.ended_at),
        "expires_at": _time(job.expires_at),
    }
    if job.callback_url:
        shown["callback_url"] = job.callback_url
    if job.error is not None:
        shown["error"] = error_json(job.error)
    return shown


def error_json(error: JobError) -> dict[str, str]:
    """`{"code", "message", "field"?}` as in problems."""
    shown = {"code": Code.Name(error.code).removeprefix("CODE_"), "message": error.message}
    if error.field:
        shown["field"] = error.field
    return shown


def _time(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
