"""What routes and consumers ask for: jobs submitted, looked at, cancelled, followed and read."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from typing import Any

import orjson
import pyarrow as pa
import structlog
from headrace.v1.batch_pb2 import InputFormat

from services.common.clock import Clock
from services.common.db import transaction
from services.common.errors import (
    AlreadyExists,
    FailedPrecondition,
    HeadraceError,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from services.common.ids import id_text, new_id
from services.gateway.catalogue import Catalogue, ServedModel, ServedVersion
from services.gateway.jobs.addresses import CallbackRules
from services.gateway.jobs.backend import Availability, Backend
from services.gateway.jobs.changes import JobChanges
from services.gateway.jobs.formats import Format, as_json_lines, as_parquet
from services.gateway.jobs.repository import JobRepository
from services.gateway.jobs.results import error_lines, parsed_errors, result_batches
from services.gateway.jobs.sizing import run_rows, seconds_for
from services.gateway.jobs.specs import JobSpec, rows_as_lines, validated
from services.gateway.jobs.splitting import Input, about_rows
from services.gateway.jobs.tables import JobRow
from services.gateway.jobs.views import STATES, Job, JobPage, job_of
from services.gateway.jobs.watching import Watching
from services.gateway.keys import Key, Scope
from services.gateway.pools import Pools

log = structlog.get_logger(__name__)

#: Rows that travel with the job and its chunks; more are stored as a file first.
INLINE_BYTES = 64 << 10
_IN_THREAD_BYTES = 64 << 10
MAX_PAGE = 100
_FILES = "files"
_INLINE = "files/inline"
_RETRY_MS = 10_000
#: An estimate is worth no more than this many seconds of its caller's time, and of ours this many at once.
_LOOK_S = 1.0
_LOOKS_AT_ONCE = 8
_DEFAULT_POOL = "default"


@dataclass(frozen=True, slots=True)
class JobLimits:
    """Bounds of what one key may have under way."""

    max_jobs_per_key: int = 1000


class JobService:
    """Jobs belong to the key that submitted them: others, but admins, are told that there is none. Everything
    raises Unavailable while PostgreSQL or the store is away, and Unimplemented where there is none."""

    def __init__(  # noqa: PLR0913 - its parts, wired once
        self,
        *,
        availability: Availability,
        catalogue: Catalogue,
        pools: Pools,
        rules: CallbackRules,
        watching: Watching,
        changed: Callable[[str], None],
        clock: Clock,
        limits: JobLimits,
        committed: Callable[[JobChanges], None] = lambda _changes: None,
    ) -> None:
        """`changed` is told the id of a job that somebody should look at now, `committed` what to count."""
        self._availability = availability
        self._catalogue = catalogue
        self._pools = pools
        self._rules = rules
        self._watching = watching
        self._changed = changed
        self._clock = clock
        self._limits = limits
        self._committed = committed
        self._looking = 0

    def close(self) -> None:
        """The process ends: whoever follows a job asks another gateway."""
        self._watching.close()

    def ready(self) -> Backend:
        """Database and store, for what else lives in the schema `gateway`."""
        return self._availability.ready()

    async def submit(self, spec: JobSpec, caller: Key) -> Job:
        """Accept a job, before its input is read. The same idempotency key with the same request, or the same
        job id, is the same job. Raises what is found wrong so far: InvalidArgument, PermissionDenied,
        NotFound (with field), AlreadyExists (key or id used for something else), ResourceExhausted."""
        spec = validated(spec)
        caller.require_model(spec.model)
        model = self._catalogue.model(spec.model)
        version = model.version(spec.version)
        if spec.callback_url:
            self._rules.check(spec.callback_url)
        backend = self.ready()
        if spec.inputs is not None and len(spec.inputs) > _IN_THREAD_BYTES:
            digest = await asyncio.to_thread(_digest, spec)
        else:
            digest = _digest(spec)
        known = await self._known(backend, spec, caller, digest)
        if known is not None:
            return known
        job_id = spec.job_id or id_text(new_id())
        given = await self._input(backend, spec, caller, job_id)
        now = self._clock.now()
        row = given | {
            "job_id": job_id,
            "key_id": caller.key_id,
            "kind": spec.kind,
            "model": model.name,
            "version": version.name,
            "artifact_digest": version.artifact_digest,
            "pool": model.pool or _DEFAULT_POOL,
            "state": "validating",
            "input_format": spec.input_format,
            "output_format": spec.output_format,
            "callback_url": spec.callback_url,
            "priority": spec.priority,
            "metadata": spec.kept,
            "exclude_from_drift": spec.exclude_from_drift,
            "exclude_from_experiments": spec.exclude_from_experiments,
            "run_rows": self._run_rows(model, version),
            "is_split": False,
            "chunks": 0,
            "open_chunks": 0,
            "flying_chunks": 0,
            "completed": 0,
            "failed": 0,
            "created_at": now,
            "expires_at": now + timedelta(seconds=spec.expires_in_s),
            "revision": 1,
            "is_forgotten": False,
        }
        try:
            stored = await self._stored(backend, row, spec, caller, digest)
        except Unavailable:
            raise  # stored or not, nobody knows
        except HeadraceError:
            await _discard(backend, given["input_uri"])
            raise
        if stored is None or stored.input_uri != given["input_uri"]:  # somebody else was faster
            await _discard(backend, given["input_uri"])
        if stored is None or stored.key_id != caller.key_id:
            raise AlreadyExists("There is a job of that id.", field="job_id")
        self._changed(stored.job_id)
        return job_of(stored, now)

    async def estimated_s(self, job: Job) -> float | None:
        """Seconds that the rows take the workers that are there, from a look at the beginning of the input or
        at its metadata; None: there are no workers, or the look fails or takes long."""
        speed = self._pools.speed(job.pool, job.model, job.version)
        if not speed.rows_per_s or not speed.workers:
            return None
        rows = float(job.rows) or await self._about_rows(job)
        return None if rows is None else seconds_for(rows, speed.workers, speed.rows_per_s)

    async def _about_rows(self, job: Job) -> float | None:
        if self._looking >= _LOOKS_AT_ONCE:
            return None
        self._looking += 1
        try:
            async with asyncio.timeout(_LOOK_S):
                of = Input(job.input_uri, job.input_format, "")
                return await about_rows(self.ready().sources, of)
        except (HeadraceError, TimeoutError):  # what is wrong with the input, the job will say
            return None
        finally:
            self._looking -= 1

    async def get(self, job_id: str, caller: Key) -> Job:
        """One job. Raises NotFound."""
        async with transaction(self.ready().engine) as session:
            row = await JobRepository(session).job(job_id)
        return job_of(_owned(row, caller), self._clock.now())

    async def list(
        self,
        caller: Key,
        *,
        model: str | None = None,
        state: str | None = None,
        kind: str | None = None,
        limit: int = 20,
        after: str | None = None,
    ) -> JobPage:
        """Jobs of the caller, of everybody for an admin, newest first. Raises InvalidArgument for a state
        that there is not, NotFound where there is no job `after`."""
        if state is not None and state not in STATES:
            raise InvalidArgument(f"status is one of {', '.join(STATES)}.", field="status")
        if not 1 <= limit <= MAX_PAGE:
            raise InvalidArgument(f"limit must be 1 … {MAX_PAGE}.", field="limit")
        asked = {"model": model, "state": state, "kind": kind}
        filters = {name: value for name, value in asked.items() if value is not None}
        if any("\0" in value for value in filters.values()):
            return JobPage([], has_more=False)
        key_id = None if Scope.ADMIN in caller.scopes else caller.key_id
        async with transaction(self.ready().engine) as session:
            repository = JobRepository(session)
            behind = None if after is None else _owned(await repository.job(after), caller, "after")
            rows = await repository.page(key_id, caller.models, filters, behind, limit + 1)
        return JobPage([job_of(row, self._clock.now()) for row in rows[:limit]], has_more=len(rows) > limit)

    async def cancel(self, job_id: str, caller: Key) -> Job:
        """Begin to cancel: what runs stops within a batch, finished rows stay. Again is fine. Raises
        NotFound, FailedPrecondition where the job has ended otherwise."""
        backend = self.ready()
        async with transaction(backend.engine) as session:
            changes = JobChanges(session, self._clock.now())
            row = _owned(await changes.repository.job(job_id, lock=True), caller)
            if row.ended_at is not None and row.state != "cancelled":
                raise FailedPrecondition(f"The job has ended already: {row.state}.", field="batch_id")
            await changes.stop(row, "cancelled")
            await changes.finish()
        self._committed(changes)
        self._changed(job_id)
        return job_of(row, self._clock.now())

    def watch(self, job: Job) -> AsyncGenerator[Job, None]:
        """`job` as it is and as it changes, a few times a second at most; ends with the job."""
        return self._watching.follow(job)

    def result_batches(self, job: Job, *, extra: bool = False) -> AsyncIterator[pa.RecordBatch]:
        """What is finished, in the order of the rows: `row`, `custom_id` where it has one, outputs; with
        `extra` also those that the signature does not name."""
        return result_batches(self.ready(), job.job_id, extra=extra)

    def results(self, job: Job, form: Format, *, partial: bool = False) -> AsyncIterator[bytes]:
        """The results as one file, in pieces. Raises FailedPrecondition where the job has not ended, unless
        what is there so far is asked for."""
        _check_ended(job, partial=partial)
        batches = self.result_batches(job)
        return as_json_lines(batches) if form == "jsonl" else as_parquet(batches)

    def errors(self, job: Job, *, partial: bool = False) -> AsyncIterator[bytes]:
        """The rows that failed, as JSON Lines, in pieces of whole lines. Raises FailedPrecondition as
        `results`."""
        _check_ended(job, partial=partial)
        return error_lines(self.ready(), job.job_id)

    async def error_rows(self, job: Job) -> AsyncIterator[Sequence[dict[str, Any]]]:
        """The same, read: `row`, `custom_id` where it has one, `error`."""
        async for lines in error_lines(self.ready(), job.job_id):
            async for errors in parsed_errors(lines):
                yield errors

    async def _stored(
        self, backend: Backend, row: dict[str, Any], spec: JobSpec, caller: Key, digest: bytes
    ) -> JobRow | None:
        """Insert the job, unless there is one for this idempotency key or of this id; the one there is."""
        job_id: str = row["job_id"]
        async with transaction(backend.engine) as session:
            repository = JobRepository(session)
            if spec.idempotency_key:
                at = row["created_at"]
                noted = await repository.idempotent(caller.key_id, spec.idempotency_key, digest, job_id, at)
                job_id = _same(noted, digest)
            if job_id == row["job_id"]:
                await self._check_room(repository, caller)
                await repository.insert(row)
            return await repository.job(job_id)

    def _run_rows(self, model: ServedModel, version: ServedVersion) -> int:
        speed = self._pools.speed(model.pool or _DEFAULT_POOL, model.name, version.name)
        return run_rows(speed.best_rows, speed.rows_per_s)

    async def _known(self, backend: Backend, spec: JobSpec, caller: Key, digest: bytes) -> Job | None:
        """The job that was made of this request before: looked up first, so that its input is not stored
        twice."""
        row: JobRow | None = None
        async with transaction(backend.engine) as session:
            repository = JobRepository(session)
            job_id: str | None = spec.job_id
            if spec.idempotency_key:
                noted = await repository.noted(caller.key_id, spec.idempotency_key)
                job_id = None if noted is None else _same(noted, digest)
            if job_id:
                row = await repository.job(job_id)
            if row is None:
                await self._check_room(repository, caller)
        if row is None:
            return None
        if row.key_id != caller.key_id:
            raise AlreadyExists("There is a job of that id.", field="job_id")
        return job_of(row, self._clock.now())

    async def _check_room(self, repository: JobRepository, caller: Key) -> None:
        """Raise ResourceExhausted where the caller has as many jobs as one may have."""
        if await repository.under_way(caller.key_id) >= self._limits.max_jobs_per_key:
            raise ResourceExhausted(
                f"This key has {self._limits.max_jobs_per_key} jobs under way.", retry_after_ms=_RETRY_MS
            )

    async def _input(self, backend: Backend, spec: JobSpec, caller: Key, job_id: str) -> dict[str, Any]:
        """Columns of the input: where the rows are, and what it was when the job was accepted."""
        if spec.inputs is None:
            await self._check_file(backend, spec.input_uri, caller)
            if spec.input_format == InputFormat.INPUT_FORMAT_IMAGES:
                backend.sources.check(spec.input_uri)
                return {"input_uri": spec.input_uri, "inline_input": None, "etag": "", "rows": 0}
            info = await backend.sources.stat(spec.input_uri)
            return {"input_uri": spec.input_uri, "inline_input": None, "etag": info.etag, "rows": 0}
        if len(spec.inputs) > _IN_THREAD_BYTES:
            lines, rows = await asyncio.to_thread(rows_as_lines, spec.inputs)
        else:
            lines, rows = rows_as_lines(spec.inputs)
        if len(lines) <= INLINE_BYTES:
            return {"input_uri": "", "inline_input": lines, "etag": "", "rows": rows}
        # Another name each time: a record that is handled twice at the same time must not change what the
        # first was cut by, and whoever comes second removes its own.
        path = f"{inline_folder(job_id)}/{id_text(new_id())}.jsonl"
        await backend.store.put(path, lines)
        info = await backend.sources.stat(f"store://{path}")
        return {"input_uri": f"store://{path}", "inline_input": None, "etag": info.etag, "rows": rows}

    async def _check_file(self, backend: Backend, uri: str, caller: Key) -> None:
        """Uploaded files belong to keys too, and of the platform's own store nothing else is anybody's.
        Raises PermissionDenied where nobody may read from there, NotFound."""
        path = backend.sources.store_path(uri)
        if path is None:
            return
        folder, file_id, name = [*path.split("/", 2), "", ""][:3]
        if folder != _FILES or not file_id or not name:
            raise PermissionDenied(
                "Of the store, uploaded files are inputs: store://files/<id>/<name>.", field="input_uri"
            )
        async with transaction(backend.engine) as session:
            file = await JobRepository(session).file(file_id)
        is_theirs = file is not None and (file.key_id == caller.key_id or caller.sees_all)
        if file is None or not file.readable(self._clock.now()) or not is_theirs:
            raise NotFound("There is no such input.", field="input_uri")


def inline_folder(job_id: str) -> str:
    """The folder of the store for rows that came with a job. Job ids are chosen by producers and file ids by
    the platform, which never makes `inline`: the one cannot name the other's folder."""
    return f"{_INLINE}/{job_id}"


async def _discard(backend: Backend, uri: str) -> None:
    """Remove rows that were stored for a job that there is not; of what callers name nothing is."""
    if not uri.startswith(f"store://{_INLINE}/"):
        return
    try:
        await backend.store.delete(uri.removeprefix("store://"))
    except HeadraceError as error:
        log.warning("input_stays", uri=uri, reason=error.message)


def _owned(row: JobRow | None, caller: Key, field: str = "batch_id") -> JobRow:
    """The row where it is the caller's to see. Raises NotFound."""
    if row is not None:
        is_theirs = row.key_id == caller.key_id or Scope.ADMIN in caller.scopes
        if is_theirs and (not caller.models or row.model in caller.models):
            return row
    raise NotFound("There is no such job.", field=field)


def _check_ended(job: Job, *, partial: bool) -> None:
    if not job.ended and not partial:
        raise FailedPrecondition(
            f"The job is {job.state}; ask with partial=true for what is finished.", field="batch_id"
        )


def _same(noted: tuple[bytes, str], digest: bytes) -> str:
    """The job that an idempotency key stands for. Raises AlreadyExists where it was another request's."""
    if noted[0] != digest:
        raise AlreadyExists("This idempotency key was used for another request.", field="Idempotency-Key")
    return noted[1]


def _digest(spec: JobSpec) -> bytes:
    """What makes two requests the same one."""
    metadata = dict(sorted(spec.metadata.items()))
    told = replace(spec, job_id="", idempotency_key="", metadata=metadata, inputs=None)
    said = [getattr(told, one.name) for one in fields(told) if one.name != "shown"]
    digest = hashlib.sha256(orjson.dumps(said))
    if spec.inputs is not None:
        digest.update(spec.inputs)
    return digest.digest()
