"""Single predictions that nobody waits for on a connection: a job of the rows of one native body, and its
answer as the native route would have given it."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import msgspec
import orjson
import pyarrow as pa
from headrace.v1.tensor_pb2 import Task, Tensor

from services.common.errors import InvalidArgument, NotFound
from services.gateway.catalogue import Catalogue
from services.gateway.codecs import native
from services.gateway.codecs.tensors import PARSE_ERRORS, malformed
from services.gateway.jobs.openai_answers import RowReader, native_body, shown_of, signature_of
from services.gateway.jobs.openai_rows import rows_of
from services.gateway.jobs.service import JobService
from services.gateway.jobs.specs import PRIORITIES, SHOWN, JobSpec
from services.gateway.jobs.views import Job, error_json
from services.gateway.keys import Key
from services.gateway.signature import ModelSignature

KIND: Literal["async"] = "async"
MAX_ROWS = 1000
_IN_THREAD_BYTES = 64 << 10
_SINGLE, _OUTPUTS = "headrace.single", "headrace.outputs"
#: Of a version of which nothing is known any more. Another's labels would be wrong, so it has only outputs.
_UNKNOWN = signature_of(
    {
        "batched": True,
        "task": Task.TASK_UNSPECIFIED,
        "is_classifier": False,
        "prediction": "",
        "probabilities": "",
        "classes": (),
    }
)


class AsyncBody(msgspec.Struct, forbid_unknown_fields=True):
    """A native body without `user_id`, since what is answered later is no experiment."""

    model: str = ""
    inputs: msgspec.Raw = native.ABSENT
    input: msgspec.Raw = native.ABSENT
    version: str | int | None = None
    outputs: list[str] | None = None
    callback_url: str = ""
    priority: Literal["high", "normal", "low"] = "high"
    expires_in_s: int = 3600


_body = msgspec.json.Decoder(AsyncBody)


class AsyncRequests:
    """Single predictions as jobs."""

    def __init__(self, jobs: JobService, catalogue: Catalogue) -> None:
        self._jobs = jobs
        self._catalogue = catalogue

    async def submit(self, model: str, raw: bytes, caller: Key, idempotency_key: str) -> Job:
        """Accept one. What is wrong with the inputs is found now, as by the native route. Raises what
        `JobService.submit` does."""
        caller.require_model(model)
        if len(raw) > _IN_THREAD_BYTES:
            spec = await asyncio.to_thread(self._spec, model, raw, idempotency_key)
        else:
            spec = self._spec(model, raw, idempotency_key)
        return await self._jobs.submit(spec, caller)

    async def get(self, job_id: str, caller: Key) -> Job:
        """Raises NotFound, also for jobs of other kinds."""
        job = await self._jobs.get(job_id, caller)
        if job.kind != KIND:
            raise NotFound("There is no such request.", field="id")
        return job

    async def ended(self, job: Job) -> Job:
        """`job` once it has ended, or as it is where nobody can follow it any more."""
        async for now in self._jobs.watch(job):
            job = now
        return job

    async def shown(self, job: Job) -> dict[str, Any]:
        """The request as its caller reads it, for orjson with numpy."""
        answer: dict[str, Any] = {
            "id": job.job_id,
            "request_id": job.job_id,
            "status": job.state,
            "model": job.model,
            "version": job.version,
        }
        if job.state == "failed" and job.error is not None:
            answer["error"] = error_json(job.error)
        if job.state != "completed":
            return answer
        if job.failed:
            async for errors in self._jobs.error_rows(job):
                if errors:
                    first = min(errors, key=lambda one: int(one["row"]))
                    return answer | {"status": "failed", "error": first["error"]}
        batches: list[pa.RecordBatch] = [batch async for batch in self._jobs.result_batches(job)]
        outputs = RowReader(iter(batches)).take(0, job.completed)
        if outputs is None:
            raise NotFound("The answer was removed.", field="id")
        wanted = job.metadata.get(_OUTPUTS)
        if wanted:
            names = orjson.loads(wanted)
            outputs = {name: array for name, array in outputs.items() if name in names}
        signature = self._signature(job)
        single = _SINGLE in job.metadata
        answer["result"] = native_body(job.job_id, job.model, job.version, signature, outputs, single=single)
        return answer

    def _signature(self, job: Job) -> ModelSignature:
        """By which the answer is shown: that of the version that gave it, which may be in service no more."""
        if SHOWN in job.metadata:
            return signature_of(job.metadata[SHOWN])
        try:  # accepted by an older release
            served = self._catalogue.model(job.model).answering(job.version)
        except NotFound:
            served = None
        return _UNKNOWN if served is None else served.signature

    def _spec(self, model: str, raw: bytes, idempotency_key: str) -> JobSpec:
        try:
            body = _body.decode(raw)
        except msgspec.ValidationError as error:
            raise native.wrong_field(error, AsyncBody) from None
        except PARSE_ERRORS as error:
            raise malformed(error) from None
        if body.model not in ("", model):
            raise InvalidArgument(f"The path names the model {model}.", field="model")
        if body.expires_in_s < 1:
            raise InvalidArgument("expires_in_s must be at least 1.", field="expires_in_s")
        asked = "" if body.version is None else str(body.version)
        signature = self._catalogue.model(model).version(asked).signature
        rows = native.PredictBody(inputs=body.inputs, input=body.input)
        single, tensors = native.inputs_of(signature, rows)
        native.check_outputs(signature, body.outputs or ())
        metadata = {_SINGLE: "true"} if single else {}
        if body.outputs:
            metadata[_OUTPUTS] = orjson.dumps(body.outputs).decode()
        return JobSpec(
            model=model,
            version=asked,
            inputs=json_rows(tensors, batched=signature.batched),
            callback_url=body.callback_url,
            priority=PRIORITIES[body.priority],
            metadata=metadata,
            expires_in_s=body.expires_in_s,
            kind=KIND,
            idempotency_key=idempotency_key,
            shown=shown_of(signature),
        )


def json_rows(tensors: list[Tensor], *, batched: bool) -> bytes:
    """The rows of checked inputs as a JSON array of objects by input name. Raises InvalidArgument for more
    than `MAX_ROWS`, and for a model whose requests have no rows."""
    if not batched:
        raise InvalidArgument("The model takes no rows; ask it directly.", field="model")
    if tensors[0].shape[0] > MAX_ROWS:
        raise InvalidArgument(f"More than {MAX_ROWS} rows at once: submit a batch.", field="inputs")
    columns = [rows_of(tensor) for tensor in tensors]
    names = [tensor.name for tensor in tensors]
    rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    return orjson.dumps(rows, option=orjson.OPT_SERIALIZE_NUMPY)
