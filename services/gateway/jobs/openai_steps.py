"""What becomes of OpenAI batches: validating → running as a job → finalizing → the end.

Any gateway takes the next step of any batch: it moves `due_at` away, does the work, and writes what came of
it. Who dies meanwhile is followed by another once `due_at` has passed, and doing a step again does no harm:
job and files have ids that follow from the batch's."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import structlog
from headrace.v1.batch_pb2 import InputFormat
from headrace.v1.tensor_pb2 import Code
from sqlalchemy import or_, select, update

from services.common.clock import Clock
from services.common.db import transaction
from services.common.errors import (
    Aborted,
    HeadraceError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    error_of,
)
from services.gateway.catalogue import Catalogue, ServedVersion
from services.gateway.jobs.backend import Backend
from services.gateway.jobs.openai_answers import Rendering, shown_of, signature_of, write_files
from services.gateway.jobs.openai_batches import OPEN
from services.gateway.jobs.openai_files import INTERNAL, OUTPUT, Files, Reader, StoredFile
from services.gateway.jobs.openai_lines import EMBEDDINGS, Finding
from services.gateway.jobs.openai_rows import Refused, compile_lines, first_line
from services.gateway.jobs.openai_tables import OpenAIBatchRow
from services.gateway.jobs.openai_threads import items_in_thread, no_items
from services.gateway.jobs.pauses import Pauses
from services.gateway.jobs.service import JobService
from services.gateway.jobs.specs import JobSpec
from services.gateway.jobs.views import Job
from services.gateway.keys import Key, KeyRing, Scope

log = structlog.get_logger(__name__)

#: Whoever makes a batch here wakes these; this finds what another gateway has left.
_IDLE_S = 2.0
#: The same while what it needs is away, at the longest.
_AWAY_S = 30.0
_LOOK_S = 0.5
_LEASE_S = 60.0
#: A lease that would last so many times as long as one does is none.
_LEASES_LAST = 4
_RENEW_S = 20.0
_RETRY_S = 3.0
#: Its file is read again each time.
_NO_ROOM_S = 15.0
_MAX_ATTEMPTS = 20
_KEPT_S = 3 * 24 * 3600

#: Stands for the platform itself where a job is looked at on behalf of nobody.
PLATFORM = Key("", frozenset(Scope), frozenset(), 0, b"", None)
_PLATFORM_READS = Reader("", everything=True)


@dataclass(frozen=True, slots=True)
class Change:
    """What a step came to. `values` are columns of the row; `again_s` is when to look next."""

    values: dict[str, Any]
    again_s: float = 0.0


class OpenAISteps:
    """Takes steps while `running`."""

    def __init__(
        self,
        *,
        backend: Callable[[], Backend],
        files: Files,
        jobs: JobService,
        catalogue: Catalogue,
        keys: KeyRing,
        clock: Clock,
    ) -> None:
        self._backend = backend
        self._files = files
        self._jobs = jobs
        self._catalogue = catalogue
        self._keys = keys
        self._clock = clock
        self._news = asyncio.Event()
        self._reason = ""

    def wake(self) -> None:
        """There is something to do now."""
        self._news.set()

    async def running(self) -> None:
        """Take one step after another until cancelled. Run several for several batches at once."""
        pauses = Pauses(self._clock, _IDLE_S)
        idle_s = _IDLE_S
        while True:
            try:
                worked = await self.step()
                self._wait_for("")
                if worked:
                    pauses.worked()
                idle_s = pauses.next_s()
            except HeadraceError as error:
                self._wait_for(error.message)
                worked, idle_s = False, min(2 * idle_s, _AWAY_S)
            except Exception:
                log.exception("openai_batches_failed")
                worked, idle_s = False, min(2 * idle_s, _AWAY_S)
            if not worked:
                self._news.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(idle_s):
                        await self._news.wait()
                        pauses.worked()

    def _wait_for(self, reason: str) -> None:
        """Note why nothing can be done; the log is told when that changes."""
        if reason == self._reason:
            return
        self._reason = reason
        if reason:
            log.warning("openai_batches_wait", reason=reason)
        else:
            log.info("openai_batches_go_on")

    async def step(self) -> bool:
        """Take the next step that is due; False where none is."""
        row = await self._claim()
        if row is None:
            return False
        try:
            async with self._held(row.batch_id):
                change = await self._next(row)
        except Refused as refused:
            change = self._failed([finding.as_json() for finding in refused.findings])
        except Exception as error:
            change = self._after_failure(row, error)
        await self._write(row.batch_id, change)
        if row.state == "finalizing" and "state" in change.values:
            await self._forget(row)
        return True

    async def _next(self, row: OpenAIBatchRow) -> Change:
        if row.state == "validating":
            return await self._validate(row)
        if row.state == "running":
            return await self._follow(row)
        return await self._finalize(row)

    async def _validate(self, row: OpenAIBatchRow) -> Change:
        """Read the file, and make a job of its rows."""
        accepted = await self._accepted(row)
        if row.cancelling_at is not None and accepted is None:
            return self._ended("cancelled")
        if accepted is None and self._clock.now() >= row.expires_at:
            return self._ended("expired")
        async with self._files.workspace() as folder:
            source, rows_at, plans_at = folder / "lines", folder / "rows", folder / "plans"
            file = await self._files.get(row.input_file_id, _PLATFORM_READS)
            await self._files.download(file, source)
            model, version = await asyncio.to_thread(first_line, source, row.endpoint)
            key, served = self._served(row, model, version if accepted is None else accepted.version)
            compiled = await asyncio.to_thread(
                compile_lines, source, row.endpoint, served.signature, rows_at, plans_at
            )
            rows: StoredFile | None = None
            if accepted is None:  # or the job reads what is kept already, and must not find it replaced
                await self._keep(row, "plans", plans_at)
                rows = await self._keep(row, "rows", rows_at) if compiled.rows else None
        values = {
            "model": model,
            "version": served.name,
            "total": compiled.lines,
            "rows": compiled.rows,
            "shown": shown_of(served.signature),
            "in_progress_at": self._clock.now(),
        }
        if accepted is not None:
            return Change(values | {"state": "running", "job_id": accepted.job_id}, _LOOK_S)
        if rows is None:
            return Change(values | {"state": "finalizing", "finalizing_at": self._clock.now()})
        left = max(1, int((row.expires_at - self._clock.now()).total_seconds()))
        spec = JobSpec(
            model=model,
            version=served.name,  # by whose signature the rows were read, whatever is deployed meanwhile
            input_uri=rows.uri,
            input_format=InputFormat.INPUT_FORMAT_ARROW,
            expires_in_s=left,
            job_id=row.batch_id,
            kind="openai",
        )
        try:
            job = await self._jobs.submit(spec, key)
        except NotFound as error:
            raise Refused([Finding("model_not_found", error.message, None, "body.model")]) from None
        except InvalidArgument as error:
            raise Refused([Finding("invalid_request", error.message)]) from None
        return Change(values | {"state": "running", "job_id": job.job_id, "version": job.version}, _LOOK_S)

    async def _accepted(self, row: OpenAIBatchRow) -> Job | None:
        """The job of a step whose end was not written; None mostly."""
        try:
            job = await self._jobs.get(row.batch_id, PLATFORM)
        except NotFound:
            return None
        return job if job.key_id == row.key_id else None

    async def _follow(self, row: OpenAIBatchRow) -> Change:
        job = await self._jobs.get(row.job_id or "", PLATFORM)
        if not job.ended:
            if row.cancelling_at is not None:
                await self._jobs.cancel(job.job_id, PLATFORM)
            return Change({"attempts": 0}, _LOOK_S)
        if job.state == "failed":
            message = job.error.message if job.error is not None else "The job failed."
            code = Code.Name(job.error.code).removeprefix("CODE_").lower() if job.error else "internal_error"
            return self._failed([Finding(code, message).as_json()])
        return Change({"state": "finalizing", "finalizing_at": self._clock.now()})

    async def _finalize(self, row: OpenAIBatchRow) -> Change:
        """Write output and error file, from what the job came to."""
        job = None if row.job_id is None else await self._jobs.get(row.job_id, PLATFORM)
        ended = "completed" if job is None else job.state
        rendering = Rendering(
            batch_id=row.batch_id,
            model=row.model,
            version=row.version,
            signature=signature_of(row.shown or {}),
            embeddings=row.endpoint == EMBEDDINGS,
            ended=ended,
        )
        async with self._files.workspace() as folder:
            outputs_at, errors_at, plans_at = folder / "output", folder / "errors", folder / "plans"
            await self._files.download(
                await self._files.get(_file_id(row, "plans"), _PLATFORM_READS), plans_at
            )
            loop = asyncio.get_running_loop()
            results = no_items() if job is None else self._jobs.result_batches(job, extra=True)
            errors = no_items() if job is None else self._row_errors(job)
            counts = await asyncio.to_thread(
                write_files,
                rendering,
                plans_at,
                items_in_thread(loop, results),
                items_in_thread(loop, errors),
                outputs_at,
                errors_at,
            )
            values: dict[str, Any] = {"completed": counts.completed, "failed": counts.failed}
            for name, path, wanted in (
                ("output", outputs_at, counts.completed > 0),
                ("error", errors_at, counts.failed > 0),
            ):
                if wanted:
                    file = await self._files.store(
                        path,
                        f"{row.batch_id}_{name}.jsonl",
                        row.key_id,
                        OUTPUT,
                        row.output_expires_s,
                        file_id=_file_id(row, name),
                    )
                    values[f"{name}_file_id"] = file.file_id
        state = ended if ended in ("cancelled", "expired") else "completed"
        return Change(values | self._ended(state).values)

    async def _keep(self, row: OpenAIBatchRow, name: str, source: Path) -> StoredFile:
        """A file of the batch's own, forgotten with it or, where nobody does that, some days later."""
        return await self._files.store(
            source,
            f"{name}.arrow" if name == "rows" else name,
            row.key_id,
            INTERNAL,
            _KEPT_S,
            _file_id(row, name),
        )

    async def _forget(self, row: OpenAIBatchRow) -> None:
        """Delete what was kept for finalizing. Only once the end is written: whoever finalizes again needs
        it. What is left after a failure here goes when it expires."""
        for name in ("rows", "plans"):
            try:
                await self._files.delete(_file_id(row, name), _PLATFORM_READS)
            except NotFound:
                pass  # no line had rows, or somebody else was first
            except HeadraceError as error:
                log.warning("openai_batch_files_left", batch=row.batch_id, reason=error.message)

    async def _row_errors(self, job: Job) -> AsyncIterator[tuple[int, HeadraceError]]:
        """Errors in the order of their rows: pieces are in order, what stands in one is not."""
        async for piece in self._jobs.error_rows(job):
            for one in sorted(piece, key=lambda error: int(error["row"])):
                told = one["error"]
                code = cast("Code", Code.Value(f"CODE_{told['code']}"))
                yield one["row"], error_of(code, told["message"], field=told.get("field"))

    def _served(self, row: OpenAIBatchRow, model: str, version: str) -> tuple[Key, ServedVersion]:
        """The caller's key, and the version that answers. Raises Refused where there is none, or where it is
        not for that key."""
        try:
            key = self._keys.by_id(row.key_id)
            if key is None:
                raise NotFound("The key of the batch was revoked or has expired.")
            key.require_model(model)
            return key, self._catalogue.model(model).version(version)
        except HeadraceError as error:
            code = "model_not_found" if error.field in ("model", "version") else "invalid_api_key"
            param = f"body.{error.field}" if error.field else None
            raise Refused([Finding(code, error.message, 1, param)]) from None

    def _after_failure(self, row: OpenAIBatchRow, error: Exception) -> Change:
        """Try again, unless that makes no sense. What the platform or the key has no room for waits, for as
        long as the batch may."""
        if isinstance(error, NotFound):
            return self._failed([Finding("file_not_found", error.message).as_json()])
        if isinstance(error, ResourceExhausted | Aborted):
            log.warning("openai_batch_waits", batch=row.batch_id, reason=error.message)
            return Change({}, _NO_ROOM_S)
        if isinstance(error, Unavailable):  # what is away says nothing of the batch
            return Change({}, _RETRY_S)
        log.error("openai_batch_step_failed", batch=row.batch_id, state=row.state, exc_info=error)
        if row.attempts + 1 >= _MAX_ATTEMPTS:
            message = "The platform failed to handle this batch."
            return self._failed([Finding("internal_error", message).as_json()])
        return Change({"attempts": row.attempts + 1}, _RETRY_S)

    def _failed(self, found: list[dict[str, Any]]) -> Change:
        return Change(self._ended("failed").values | {"errors": {"data": found}})

    def _ended(self, state: str) -> Change:
        return Change({"state": state, "ended_at": self._clock.now()})

    async def _claim(self) -> OpenAIBatchRow | None:
        now = self._clock.now()
        # What would wait for far longer than anything here does was put off before the clock was set back.
        put_off = OpenAIBatchRow.due_at > now + _LEASES_LAST * timedelta(seconds=_LEASE_S)
        due = (
            select(OpenAIBatchRow)
            .where(OpenAIBatchRow.state.in_(OPEN), or_(OpenAIBatchRow.due_at <= now, put_off))
            .order_by(OpenAIBatchRow.due_at)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        async with transaction(self._backend().engine) as session:
            row = (await session.scalars(due)).first()
            if row is not None:
                row.due_at = now + timedelta(seconds=_LEASE_S)
            return row

    @asynccontextmanager
    async def _held(self, batch_id: str) -> AsyncIterator[None]:
        """Keep others away for as long as the block takes."""

        async def renew() -> None:
            while True:
                await asyncio.sleep(_RENEW_S)
                try:
                    await self._write(batch_id, Change({}, _LEASE_S))
                except HeadraceError as error:
                    log.warning("openai_batch_not_held", batch=batch_id, reason=error.message)

        task = asyncio.create_task(renew(), name=f"hold-{batch_id}")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})

    async def _write(self, batch_id: str, change: Change) -> None:
        values = change.values
        if "state" in values:
            values = {"attempts": 0} | values
        due = self._clock.now() + timedelta(seconds=change.again_s)
        async with transaction(self._backend().engine) as session:
            await session.execute(
                update(OpenAIBatchRow)
                .where(OpenAIBatchRow.batch_id == batch_id, OpenAIBatchRow.state.in_(OPEN))
                .values(due_at=due, **values)
            )


def _file_id(row: OpenAIBatchRow, name: str) -> str:
    return f"file-{uuid.uuid5(uuid.NAMESPACE_OID, f'{row.batch_id}/{name}').hex}"
