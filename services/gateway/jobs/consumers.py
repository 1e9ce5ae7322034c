"""Records of Kafka: jobs that producers submit, and what workers say of chunks. Handled at least once each;
the second time changes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from hashlib import sha256

import structlog
from google.protobuf.message import DecodeError
from headrace.v1.batch_pb2 import BatchChunkResult, BatchJob
from headrace.v1.tensor_pb2 import Code

from services.common.bus import Malformed, Record
from services.common.clock import Clock
from services.common.db import transaction
from services.common.errors import HeadraceError, InvalidArgument, Unavailable
from services.gateway.jobs.backend import Availability
from services.gateway.jobs.changes import JobChanges
from services.gateway.jobs.metrics import JobMetrics
from services.gateway.jobs.publishing import output_prefix
from services.gateway.jobs.service import JobService
from services.gateway.jobs.specs import JobSpec, is_job_id, spec_of_json, spec_of_record
from services.gateway.keys import Key, KeyRing, Scope

log = structlog.get_logger(__name__)

#: Whoever may write to the topic may submit; such jobs belong to nobody, so only admins see them.
NOBODY = Key("", frozenset({Scope.PREDICT}), frozenset(), 0, b"", None)

_JSON, _PROTOBUF = "application/json", "application/x-protobuf"
_TRANSIENT = frozenset(
    (
        Code.CODE_UNAVAILABLE,
        Code.CODE_RESOURCE_EXHAUSTED,
        Code.CODE_ABORTED,
        Code.CODE_DEADLINE_EXCEEDED,
        Code.CODE_INTERNAL,
    )
)
#: How often a record is tried that is refused for now, before it is put aside: the others wait meanwhile.
MAX_TRIES = 4
_MAX_REMEMBERED = 10_000
_OBJECT = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")


class SubmittedJobs:
    """Handler of batch.jobs.v1. A record may carry an API key in the header `authorization` or `x-api-key`,
    as a request does; the job is that key's then."""

    def __init__(self, service: JobService, keys: KeyRing, is_known: Callable[[], bool]) -> None:
        """`is_known`: whether models and keys have been read, so that what is not among them does not
        exist."""
        self._service = service
        self._keys = keys
        self._is_known = is_known
        self._tries: dict[tuple[int, int], int] = {}

    async def __call__(self, records: Sequence[Record]) -> None:
        """Raises Malformed for what can never be a job and for what was refused `MAX_TRIES` times, and
        otherwise what makes the records come again: those that are jobs by then stay the same jobs. While
        database or store are away everything waits, since nothing could be taken."""
        if not self._is_known():
            raise Unavailable("Models and keys are not known yet.")
        refused: list[tuple[int, HeadraceError]] = []
        for number, record in enumerate(records):
            try:
                await self._service.submit(spec_of(record), self._caller(record))
            except HeadraceError as error:
                if _is_nobodys_fault(error):
                    raise
                refused.append((number, error))
            except Exception as error:
                log.exception("job_intake_failed", partition=record.partition, offset=record.offset)
                crashed = HeadraceError("The platform failed.")
                crashed.__cause__ = error
                refused.append((number, crashed))
            else:
                self._tries.pop((record.partition, record.offset), None)
        for number, refusal in refused:
            at = (records[number].partition, records[number].offset)
            if refusal.code not in _TRANSIENT or self._tries.get(at, 0) >= MAX_TRIES:
                self._tries.pop(at, None)
                reason = refusal.message
                if refusal.field and not reason.startswith(refusal.field):
                    reason = f"{refusal.field}: {reason}"
                raise Malformed(number, reason) from refusal
        if refused:
            self._count(records[number] for number, _ in refused)
            raise refused[0][1]

    def _count(self, refused: Iterable[Record]) -> None:
        if len(self._tries) > _MAX_REMEMBERED:  # of partitions that others read now
            self._tries.clear()
        for record in refused:
            at = (record.partition, record.offset)
            self._tries[at] = self._tries.get(at, 0) + 1

    def _caller(self, record: Record) -> Key:
        headers = {name.lower(): value for name, value in record.headers}
        authorization, api_key = headers.get("authorization"), headers.get("x-api-key")
        if authorization is None and api_key is None:
            return NOBODY
        key = self._keys.authenticate(authorization, api_key)
        key.require(Scope.PREDICT)
        return key


def _is_nobodys_fault(error: HeadraceError) -> bool:
    """Whether database or own store are away; another store's absence names the input."""
    return isinstance(error, Unavailable) and error.field is None


def spec_of(record: Record) -> JobSpec:
    """The job that a record asks for; its id is the producer's, or the record's. Raises InvalidArgument."""
    value = record.value or b""
    # A producer's header may be null, which is as if there were none.
    given = next((text for name, text in record.headers if text and name.lower() == "content-type"), b"")
    kind = given.decode("latin-1").partition(";")[0].strip() or (
        _JSON if value.lstrip()[:1] == b"{" else _PROTOBUF
    )
    if kind == _JSON:
        spec = spec_of_json(value)
    elif kind == _PROTOBUF:
        try:
            spec = spec_of_record(BatchJob.FromString(value))
        except DecodeError:
            raise InvalidArgument("The value is no headrace.v1.BatchJob.") from None
    else:
        raise InvalidArgument(f"The content type is {_JSON} or {_PROTOBUF}, not {kind[:100]!r}.")
    return spec if spec.job_id else replace(spec, job_id=_own_id(record))


class ChunkResults:
    """Handler of batch.results.v1: each chunk counts once, whoever did it how often."""

    def __init__(
        self,
        availability: Availability,
        clock: Clock,
        metrics: JobMetrics,
        changed: Callable[[str], None],
        ended: Callable[[], None],
    ) -> None:
        """`changed` is told every job that changed, `ended` that some have ended."""
        self._availability = availability
        self._clock = clock
        self._metrics = metrics
        self._changed = changed
        self._ended = ended

    async def __call__(self, records: Sequence[Record]) -> None:
        """One transaction for all. Raises Malformed."""
        results = [result_of(number, record) for number, record in enumerate(records)]
        now = self._clock.now()
        taken: list[tuple[BatchChunkResult, float | None]] = []
        async with transaction(self._availability.ready().engine) as session:
            changes = JobChanges(session, now)
            jobs = await changes.repository.locked({result.job_id for result in results})
            chunks = await changes.repository.chunks_at({(one.job_id, one.index) for one in results})
            for result in results:
                job, chunk = jobs.get(result.job_id), chunks.get((result.job_id, result.index))
                if job is not None and chunk is not None and await changes.result(job, chunk, result):
                    at = chunk.published_at
                    taken.append((result, None if at is None else (now - at).total_seconds()))
            await changes.finish()
        self._metrics.committed(changes)
        for _, seconds in taken:
            self._metrics.result(seconds)
        self._metrics.repeated(len(results) - len(taken))
        for job_id in {result.job_id for result, _ in taken}:
            self._changed(job_id)
        if changes.ended:
            self._ended()


def result_of(number: int, record: Record) -> BatchChunkResult:
    """The result that a record tells. Raises Malformed where it is none, or names objects that are not its
    job's."""
    try:
        result = BatchChunkResult.FromString(record.value or b"")
    except DecodeError:
        raise Malformed(number, "The value is no headrace.v1.BatchChunkResult.") from None
    if not is_job_id(result.job_id):
        raise Malformed(number, "The id of the job is none.")
    prefix = f"{output_prefix(result.job_id)}/"
    for path in (result.results_object, result.errors_object):
        if path and not (path.startswith(prefix) and _OBJECT.fullmatch(path) and ".." not in path.split("/")):
            raise Malformed(number, f"The object {path[:200]!r} is not one of the job's.")
    return result


def _own_id(record: Record) -> str:
    """The id of a job whose producer gave it none: its key, or where it lies. The time makes it another
    record where a broker starts over and counts from 0 again."""
    if record.key:
        text = record.key.decode("utf-8", "replace")
        return text if is_job_id(text) else sha256(record.key).hexdigest()[:32]
    return f"{record.topic}-{record.partition}-{record.offset}-{record.timestamp_ms}"
