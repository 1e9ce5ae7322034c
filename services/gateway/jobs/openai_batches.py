"""OpenAI batches as their callers see them: created, looked at, listed, cancelled. What becomes of them is
`openai_steps.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, cast

import msgspec
from sqlalchemy import CursorResult, and_, delete, or_, select

from services.common.clock import Clock
from services.common.db import transaction
from services.common.errors import FailedPrecondition, InvalidArgument, NotFound
from services.common.ids import id_text, new_id
from services.gateway.codecs.native import wrong_field
from services.gateway.codecs.tensors import PARSE_ERRORS, malformed
from services.gateway.jobs.backend import Backend
from services.gateway.jobs.openai_files import Files, Reader, check_kept, known_id
from services.gateway.jobs.openai_lines import GENERATING, model_of_endpoint
from services.gateway.jobs.openai_tables import OpenAIBatchRow

WINDOW_S = 24 * 3600
OPEN = ("validating", "running", "finalizing")
FORGOTTEN_AT_ONCE = 500
_MAX_METADATA, _MAX_KEY, _MAX_VALUE = 16, 64, 512


class OutputExpiry(msgspec.Struct, forbid_unknown_fields=True):
    anchor: Literal["created_at"]
    seconds: int


class BatchRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /v1/batches`."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: OutputExpiry | None = None


_request = msgspec.json.Decoder(BatchRequest)


@dataclass(frozen=True, slots=True)
class JobCounts:
    """How far the job of a batch is, in rows."""

    total: int | None
    completed: int
    failed: int


def decode_batch(raw: bytes) -> BatchRequest:
    """Raises InvalidArgument naming the field, or MalformedBody."""
    try:
        request = _request.decode(raw)
    except msgspec.ValidationError as error:
        raise wrong_field(error) from None
    except PARSE_ERRORS as error:
        raise malformed(error) from None
    if request.completion_window != "24h":
        raise InvalidArgument("completion_window must be 24h.", field="completion_window")
    if request.endpoint in GENERATING:
        raise InvalidArgument(
            f"No model here generates text, so {request.endpoint} takes no batches; /v1/embeddings, "
            "/v1/predict and /v1/models/{model}/predict do.",
            field="endpoint",
        )
    if model_of_endpoint(request.endpoint) is None:
        raise InvalidArgument(
            "endpoint must be /v1/embeddings, /v1/predict or /v1/models/{model}/predict.", field="endpoint"
        )
    _check_metadata(request.metadata or {})
    if request.output_expires_after is not None:
        check_kept(request.output_expires_after.seconds, "output_expires_after.seconds")
    return request


class OpenAIBatches:
    """The batches of all keys. Methods raise Unavailable while the database is away, NotFound for what is
    not the reader's."""

    def __init__(
        self, backend: Callable[[], Backend], files: Files, clock: Clock, changed: Callable[[], None]
    ) -> None:
        """`changed` is called when somebody should look at the batches."""
        self._backend = backend
        self._files = files
        self._clock = clock
        self._changed = changed

    async def create(self, request: BatchRequest, reader: Reader) -> OpenAIBatchRow:
        """A new batch; its file is read later. Raises InvalidArgument where it can be none."""
        try:
            file = await self._files.get(request.input_file_id, reader)
        except NotFound as error:
            raise InvalidArgument(error.message, field="input_file_id") from None
        if file.purpose != "batch":
            raise InvalidArgument(
                f"The file has the purpose {file.purpose}, not batch.", field="input_file_id"
            )
        now = self._clock.now()
        keep = request.output_expires_after
        row = OpenAIBatchRow(
            batch_id=f"batch_{id_text(new_id())}",
            key_id=reader.key_id,
            endpoint=request.endpoint,
            input_file_id=file.file_id,
            batch_metadata=request.metadata or {},
            output_expires_s=None if keep is None else keep.seconds,
            state="validating",
            errors=None,
            model="",
            version="",
            total=0,
            completed=0,
            failed=0,
            rows=0,
            shown=None,
            attempts=0,
            created_at=now,
            expires_at=now + timedelta(seconds=WINDOW_S),
            due_at=now,
        )
        async with transaction(self._backend().engine) as session:
            session.add(row)
        self._changed()
        return row

    async def get(self, batch_id: str, reader: Reader) -> OpenAIBatchRow:
        batch_id = known_id(batch_id, "batch")
        async with transaction(self._backend().engine) as session:
            row = await session.get(OpenAIBatchRow, batch_id)
        return _owned(row, batch_id, reader)

    async def list(
        self, reader: Reader, *, limit: int, after: str | None
    ) -> tuple[list[OpenAIBatchRow], bool]:
        """A page, newest first, and whether more follow."""
        after = None if after is None else known_id(after, "batch", "after")
        query = select(OpenAIBatchRow)
        if not reader.everything:
            query = query.where(OpenAIBatchRow.key_id == reader.key_id)
        async with transaction(self._backend().engine) as session:
            if after is not None:
                last = _owned(await session.get(OpenAIBatchRow, after), after, reader)
                query = query.where(
                    or_(
                        OpenAIBatchRow.created_at < last.created_at,
                        and_(
                            OpenAIBatchRow.created_at == last.created_at,
                            OpenAIBatchRow.batch_id < last.batch_id,
                        ),
                    )
                )
            newest_first = OpenAIBatchRow.created_at.desc(), OpenAIBatchRow.batch_id.desc()
            rows = (await session.scalars(query.order_by(*newest_first).limit(limit + 1))).all()
        return list(rows[:limit]), len(rows) > limit

    async def cancel(self, batch_id: str, reader: Reader) -> OpenAIBatchRow:
        """Do no more of it. Raises FailedPrecondition where it has ended."""
        now = self._clock.now()
        batch_id = known_id(batch_id, "batch")
        async with transaction(self._backend().engine) as session:
            row = _owned(await session.get(OpenAIBatchRow, batch_id, with_for_update=True), batch_id, reader)
            if row.state not in OPEN:
                raise FailedPrecondition(f"The batch is {row.state} and cannot be cancelled.")
            if row.cancelling_at is None:
                row.cancelling_at = now
                if row.state == "running":
                    row.due_at = now
        self._changed()
        return row

    async def forget(self, ended_before: datetime) -> int:
        """Remove batches that ended before, oldest first and a bounded number; how many. Their files are kept
        for as long as files are."""
        old = (
            select(OpenAIBatchRow.batch_id)
            .where(OpenAIBatchRow.ended_at < ended_before, OpenAIBatchRow.state.not_in(OPEN))
            .order_by(OpenAIBatchRow.ended_at)
            .limit(FORGOTTEN_AT_ONCE)
        )
        removed = delete(OpenAIBatchRow).where(OpenAIBatchRow.batch_id.in_(old.scalar_subquery()))
        async with transaction(self._backend().engine) as session:
            return cast("CursorResult[Any]", await session.execute(removed)).rowcount


def batch_json(row: OpenAIBatchRow, counts: JobCounts | None = None) -> dict[str, Any]:
    """The batch as OpenAI's clients read it. `counts` are those of its job until its lines are counted."""
    ended = _seconds(row.ended_at)
    completed, failed = row.completed, row.failed
    if counts is not None:
        # Lines hold one row mostly; where not, progress is told in proportion until the lines are counted.
        scale = row.total / counts.total if counts.total else 1.0
        completed, failed = int(counts.completed * scale), int(counts.failed * scale)
    return {
        "id": row.batch_id,
        "object": "batch",
        "endpoint": row.endpoint,
        "model": row.model or None,
        "errors": None if row.errors is None else {"object": "list", **row.errors},
        "input_file_id": row.input_file_id,
        "completion_window": "24h",
        "status": status_of(row.state, cancelling=row.cancelling_at is not None),
        "output_file_id": row.output_file_id,
        "error_file_id": row.error_file_id,
        "created_at": _seconds(row.created_at),
        "in_progress_at": _seconds(row.in_progress_at),
        "expires_at": _seconds(row.expires_at),
        "finalizing_at": _seconds(row.finalizing_at),
        "completed_at": ended if row.state == "completed" else None,
        "failed_at": ended if row.state == "failed" else None,
        "expired_at": ended if row.state == "expired" else None,
        "cancelling_at": _seconds(row.cancelling_at),
        "cancelled_at": ended if row.state == "cancelled" else None,
        "request_counts": {"total": row.total, "completed": completed, "failed": failed},
        "metadata": row.batch_metadata or None,
    }


def status_of(state: str, *, cancelling: bool) -> str:
    """OpenAI's status of a batch in `state`."""
    if state in OPEN and cancelling:
        return "cancelling"
    return "in_progress" if state == "running" else state


def _owned(row: OpenAIBatchRow | None, batch_id: str, reader: Reader) -> OpenAIBatchRow:
    if row is None or (row.key_id != reader.key_id and not reader.everything):
        raise NotFound(f"No batch found with id '{batch_id}'.", field="id")
    return row


def _check_metadata(metadata: Mapping[str, str]) -> None:
    if len(metadata) > _MAX_METADATA:
        raise InvalidArgument(f"metadata has at most {_MAX_METADATA} pairs.", field="metadata")
    for key, value in metadata.items():
        if not 0 < len(key) <= _MAX_KEY or len(value) > _MAX_VALUE or "\0" in key + value:
            raise InvalidArgument(
                f"Keys of metadata have 1 to {_MAX_KEY} characters, values at most {_MAX_VALUE}.",
                field="metadata",
            )


def _seconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())
