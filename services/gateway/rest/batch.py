"""`/v1/batch`: submit, look, follow, cancel, and read what came out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any, get_args

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from services.common.clock import Clock
from services.common.errors import InvalidArgument
from services.gateway.jobs.downloads import Downloads
from services.gateway.jobs.events import as_events
from services.gateway.jobs.formats import MEDIA_TYPES, Format
from services.gateway.jobs.service import JobService
from services.gateway.jobs.specs import INPUT_FORMATS, OUTPUT_FORMATS, PRIORITIES, JobSpec, spec_of_json
from services.gateway.jobs.views import Job, job_json
from services.gateway.keys import Key, KeyRing, Scope
from services.gateway.predict import PredictLimits
from services.gateway.reading import BodyBudget
from services.gateway.rest.door import authenticated, bounded_body

_JSON = "application/json"
_JSON_LINES = MEDIA_TYPES["jsonl"]
_MAX_LIMIT_DIGITS = 4
_DEFAULT_PAGE = 20
#: Proxies that gather answers would hold events back.
_UNBUFFERED = {"cache-control": "no-store", "x-accel-buffering": "no"}
_TEXT, _COUNT = {"type": "string"}, {"type": "integer", "minimum": 1}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            _JSON: {
                "schema": {
                    "type": "object",
                    "required": ["model"],
                    "additionalProperties": False,
                    "properties": {
                        "model": _TEXT,
                        "version": {**_TEXT, "description": "A version or an alias."},
                        "inputs": {"type": "array", "description": "Rows, or input_uri instead."},
                        "input_uri": {**_TEXT, "description": "store://…, file:///… or s3://…"},
                        "input_format": {"enum": list(INPUT_FORMATS)},
                        "output_format": {"enum": list(OUTPUT_FORMATS)},
                        "callback_url": _TEXT,
                        "priority": {"enum": list(PRIORITIES)},
                        "metadata": {"type": "object", "additionalProperties": _TEXT},
                        "exclude_from": {"type": "array", "items": {"enum": ["drift", "experiments"]}},
                        "expires_in_s": _COUNT,
                    },
                }
            }
        },
    }
}


class JobRoutes:
    """The handlers, and what they share."""

    def __init__(
        self, jobs: JobService, keys: KeyRing, clock: Clock, limits: PredictLimits, bodies: BodyBudget
    ) -> None:
        self._jobs = jobs
        self._keys = keys
        self._clock = clock
        self._limits = limits
        self._bodies = bodies
        self._downloads = Downloads()

    def router(self) -> APIRouter:
        """The routes."""
        router = APIRouter(prefix="/v1/batch", tags=["batch"])
        add = router.add_api_route
        add("", self.submit, methods=["POST"], status_code=202, summary="Submit a job", openapi_extra=_BODY)
        add("", self.list, methods=["GET"], summary="Jobs, newest first")
        add("/{batch_id}", self.get, methods=["GET"], summary="State and progress of a job")
        add("/{batch_id}", self.cancel, methods=["DELETE"], status_code=202, summary="Cancel a job")
        add("/{batch_id}/events", self.events, methods=["GET"], summary="Progress as server-sent events")
        add("/{batch_id}/results", self.results, methods=["GET"], summary="Results in the order of the rows")
        add("/{batch_id}/errors", self.errors, methods=["GET"], summary="Rows that failed, and why")
        return router

    async def submit(self, request: Request) -> Response:
        caller = self._caller(request)
        body = await bounded_body(request, self._limits.max_body_bytes, self._bodies)
        if len(body) > self._limits.inline_bytes:
            spec = await asyncio.to_thread(spec_of_json, body)
        else:
            spec = spec_of_json(body)
        if spec.job_id:
            raise InvalidArgument(
                "job_id is for records of Kafka; send an Idempotency-Key header.", field="job_id"
            )
        job = await self._jobs.submit(_with_key(spec, request), caller)
        answer = {
            "batch_id": job.job_id,
            "status": job.state,
            "estimated_time": await self._jobs.estimated_s(job),
        }
        return _json(answer, 202)

    async def list(self, request: Request) -> Response:
        asked = request.query_params
        page = await self._jobs.list(
            self._caller(request),
            model=asked.get("model"),
            state=asked.get("status"),
            limit=_limit(asked.get("limit")),
            after=asked.get("after"),
        )
        return _json({"batches": [job_json(job) for job in page.jobs], "has_more": page.has_more})

    async def get(self, request: Request, batch_id: str) -> Response:
        return _json(job_json(await self._job(request, batch_id)))

    async def cancel(self, request: Request, batch_id: str) -> Response:
        return _json(job_json(await self._jobs.cancel(batch_id, self._caller(request))), 202)

    async def events(self, request: Request, batch_id: str) -> Response:
        job = await self._job(request, batch_id)
        return await _streamed(as_events(self._jobs.watch(job)), "text/event-stream", _UNBUFFERED)

    async def results(self, request: Request, batch_id: str) -> Response:
        caller = self._caller(request)
        job = await self._jobs.get(batch_id, caller)
        form = _form(request, job)
        results = self._jobs.results(job, form, partial=_partial(request))
        pieces = self._downloads.bounded(results, caller.key_id)
        return await _streamed(pieces, MEDIA_TYPES[form], _attached(f"{job.job_id}.{form}"))

    async def errors(self, request: Request, batch_id: str) -> Response:
        caller = self._caller(request)
        job = await self._jobs.get(batch_id, caller)
        pieces = self._downloads.bounded(self._jobs.errors(job, partial=_partial(request)), caller.key_id)
        return await _streamed(pieces, _JSON_LINES, _attached(f"{job.job_id}.errors.jsonl"))

    def _caller(self, request: Request) -> Key:
        return authenticated(request, self._keys, Scope.PREDICT, self._clock.monotonic())

    async def _job(self, request: Request, batch_id: str) -> Job:
        return await self._jobs.get(batch_id, self._caller(request))


def _with_key(spec: JobSpec, request: Request) -> JobSpec:
    return replace(spec, idempotency_key=request.headers.get("idempotency-key", ""))


def _limit(text: str | None) -> int:
    if text is None:
        return _DEFAULT_PAGE
    if not text.isascii() or not text.isdigit() or len(text) > _MAX_LIMIT_DIGITS:
        raise InvalidArgument("limit is a number.", field="limit")
    return int(text)


def _partial(request: Request) -> bool:
    text = request.query_params.get("partial", "false").lower()
    if text not in ("true", "false", "1", "0"):
        raise InvalidArgument("partial is true or false.", field="partial")
    return text in ("true", "1")


def _form(request: Request, job: Job) -> Format:
    """What the query asks for, else the Accept header, else the job."""
    asked = request.query_params.get("format")
    if asked is not None:
        for form in get_args(Format):
            if asked == form:
                return form  # type: ignore[no-any-return]  # one of them
        raise InvalidArgument("format is jsonl or parquet.", field="format")
    accepted = request.headers.get("accept", "")
    for form, media_type in MEDIA_TYPES.items():
        if media_type in accepted:
            return form
    return "parquet" if job.output_format == OUTPUT_FORMATS["parquet"] else "jsonl"


async def _streamed(pieces: AsyncIterator[bytes], media_type: str, headers: Mapping[str, str]) -> Response:
    """The pieces as they come. The first is waited for, so that what is wrong from the start is an error and
    not half an answer."""
    first = await anext(pieces, b"")

    async def all_of_them() -> AsyncIterator[bytes]:
        yield first
        async for piece in pieces:
            yield piece

    return StreamingResponse(all_of_them(), media_type=media_type, headers=headers)


def _attached(name: str) -> dict[str, str]:
    return {"content-disposition": f'attachment; filename="{name}"'}


def _json(content: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type=_JSON)
