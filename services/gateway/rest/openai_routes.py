"""`/v1/files` and `/v1/batches`, as OpenAI's clients call them. Errors have OpenAI's shape (`door.py`)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import orjson
from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse

from services.common.clock import Clock
from services.common.errors import InvalidArgument
from services.gateway.jobs.downloads import Downloads
from services.gateway.jobs.openai_batches import JobCounts, batch_json, decode_batch
from services.gateway.jobs.openai_files import Files, Reader
from services.gateway.jobs.openai_runtime import OpenAIParts
from services.gateway.jobs.openai_steps import PLATFORM
from services.gateway.jobs.openai_tables import OpenAIBatchRow
from services.gateway.keys import KeyRing, Scope
from services.gateway.reading import BodyBudget
from services.gateway.rest.door import authenticated, bounded_body
from services.gateway.rest.multipart import receive_form

_MAX_FILES_PAGE, _FILES_PAGE = 10_000, 10_000
_MAX_BATCHES_PAGE, _BATCHES_PAGE = 100, 20
_BODY_BYTES = 64 << 10


def openai_routes(parts: OpenAIParts, keys: KeyRing, clock: Clock, bodies: BodyBudget) -> APIRouter:
    """Routes for files and batches."""
    router = APIRouter(tags=["openai"])

    def reader_of(request: Request) -> Reader:
        key = authenticated(request, keys, Scope.PREDICT, clock.monotonic())
        return Reader(key.key_id, everything=key.sees_all)

    _add_files(router, parts.files, reader_of)
    _add_batches(router, parts, reader_of, bodies)
    return router


def _add_files(router: APIRouter, files: Files, reader_of: Callable[[Request], Reader]) -> None:
    downloads = Downloads()

    @router.post("/v1/files", summary="Upload a file, for a batch (purpose=batch) or as data of a job")
    async def upload(request: Request) -> Response:
        reader = reader_of(request)
        try:
            async with files.receiving(reader.key_id) as receiving:
                content_type = request.headers.get("content-type", "")
                fields = await receive_form(content_type, request.stream(), receiving)
                await receiving.end()
                kept = await files.keep(
                    receiving, reader.key_id, fields.get("purpose", ""), _expires_after_s(fields)
                )
        except ClientDisconnect:
            return Response(status_code=499)
        return _json(kept.as_json())

    @router.get("/v1/files", summary="Files of this key")
    async def list_files(request: Request) -> Response:
        reader, query = reader_of(request), request.query_params
        found, more = await files.list(
            reader,
            purpose=query.get("purpose"),
            limit=_limit(query, _FILES_PAGE, _MAX_FILES_PAGE),
            after=query.get("after"),
            oldest_first=_oldest_first(query),
        )
        return _page([file.as_json() for file in found], has_more=more)

    @router.get("/v1/files/{file_id}", summary="What is known of a file")
    async def file(request: Request, file_id: str) -> Response:
        return _json((await files.get(file_id, reader_of(request))).as_json())

    @router.get("/v1/files/{file_id}/content", summary="The bytes of a file")
    async def content(request: Request, file_id: str) -> Response:
        reader = reader_of(request)
        found = await files.get(file_id, reader)
        pieces = downloads.bounded(files.content(found), reader.key_id)
        first = await anext(pieces, b"")  # what is wrong with the store is told before the status is sent
        headers = {
            "content-length": str(found.size),
            "content-disposition": f'attachment; filename="{found.filename}"',
        }
        return StreamingResponse(_after(first, pieces), 200, headers, "application/octet-stream")

    @router.delete("/v1/files/{file_id}", summary="Delete a file")
    async def delete(request: Request, file_id: str) -> Response:
        await files.delete(file_id, reader_of(request))
        return _json({"id": file_id, "object": "file", "deleted": True})


def _add_batches(
    router: APIRouter, parts: OpenAIParts, reader_of: Callable[[Request], Reader], bodies: BodyBudget
) -> None:
    batches = parts.batches

    @router.post("/v1/batches", summary="Start a batch of the requests in a file")
    async def create(request: Request) -> Response:
        reader = reader_of(request)
        wanted = decode_batch(await bounded_body(request, _BODY_BYTES, bodies))
        return _json(batch_json(await batches.create(wanted, reader)))

    @router.get("/v1/batches", summary="Batches of this key, newest first")
    async def list_batches(request: Request) -> Response:
        reader, query = reader_of(request), request.query_params
        limit = _limit(query, _BATCHES_PAGE, _MAX_BATCHES_PAGE)
        found, more = await batches.list(reader, limit=limit, after=query.get("after"))
        return _page([await shown(row) for row in found], has_more=more)

    @router.get("/v1/batches/{batch_id}", summary="How far a batch is")
    async def batch(request: Request, batch_id: str) -> Response:
        return _json(await shown(await batches.get(batch_id, reader_of(request))))

    @router.post("/v1/batches/{batch_id}/cancel", summary="Cancel a batch; what was done stays")
    async def cancel(request: Request, batch_id: str) -> Response:
        return _json(await shown(await batches.cancel(batch_id, reader_of(request))))

    async def shown(row: OpenAIBatchRow) -> dict[str, Any]:
        counts = None
        if row.state in ("running", "finalizing") and row.job_id is not None:
            job = await parts.jobs.get(row.job_id, PLATFORM)
            counts = JobCounts(job.total, job.completed, job.failed)
        return batch_json(row, counts)


async def _after(first: bytes, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in pieces:
        yield piece


def _limit(query: Mapping[str, str], usual: int, most: int) -> int:
    text = query.get("limit", str(usual))
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not 1 <= int(text) <= most:
        raise InvalidArgument(f"limit must be 1 … {most}.", field="limit")
    return int(text)


def _oldest_first(query: Mapping[str, str]) -> bool:
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidArgument("order must be asc or desc.", field="order")
    return order == "asc"


def _expires_after_s(fields: Mapping[str, str]) -> int | None:
    seconds = fields.get("expires_after[seconds]")
    if seconds is None:
        return None
    if fields.get("expires_after[anchor]") != "created_at":
        raise InvalidArgument("The anchor must be created_at.", field="expires_after[anchor]")
    if not seconds.isascii() or not seconds.isdigit() or len(seconds) > 9:
        raise InvalidArgument("seconds must be a number.", field="expires_after[seconds]")
    return int(seconds)


def _page(found: Sequence[Mapping[str, Any]], *, has_more: bool) -> Response:
    ids = [one["id"] for one in found]
    return _json(
        {
            "object": "list",
            "data": list(found),
            "first_id": ids[0] if ids else None,
            "last_id": ids[-1] if ids else None,
            "has_more": has_more,
        }
    )


def _json(body: Mapping[str, Any]) -> Response:
    return Response(orjson.dumps(body), 200, media_type="application/json")
