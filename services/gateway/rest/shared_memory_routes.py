"""Shared memory over REST, as the Open Inference Protocol's extensions have it: of the system, and of GPUs,
where nothing can be registered."""

from __future__ import annotations

import asyncio

import msgspec
import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from services.common.clock import Clock
from services.common.errors import NotFound, Unimplemented
from services.gateway.codecs.native import wrong_field
from services.gateway.codecs.tensors import PARSE_ERRORS, malformed
from services.gateway.keys import KeyRing, Scope
from services.gateway.reading import BodyBudget
from services.gateway.regions import Regions
from services.gateway.rest.door import authenticated, bounded_body

NO_CUDA = "Shared memory of GPUs is not served."
_MAX_BODY = 4096


class _Register(msgspec.Struct):
    key: str
    byte_size: int
    offset: int = 0


_register = msgspec.json.Decoder(_Register)


def shared_memory_routes(regions: Regions, keys: KeyRing, clock: Clock, bodies: BodyBudget) -> APIRouter:
    """Regions of the caller's key."""
    router = APIRouter(tags=["open inference protocol"])

    def caller(request: Request) -> str:
        return authenticated(request, keys, Scope.PREDICT, clock.monotonic()).key_id

    async def register(request: Request, name: str) -> Response:
        key_id = caller(request)
        asked = _asked(await bounded_body(request, _MAX_BODY, bodies))
        await asyncio.to_thread(regions.register, key_id, name, asked.key, asked.offset, asked.byte_size)
        return Response(status_code=200)

    async def unregister(request: Request, name: str = "") -> Response:
        await asyncio.to_thread(regions.unregister, caller(request), name)
        return Response(status_code=200)

    async def status(request: Request, name: str = "") -> Response:
        found = await asyncio.to_thread(regions.listed, caller(request), name)
        return _json(
            [
                {"name": name, "key": one.key, "offset": one.offset, "byte_size": one.byte_size}
                for name, one in found.items()
            ]
        )

    async def register_cuda(request: Request, name: str) -> Response:
        caller(request)
        raise Unimplemented(NO_CUDA)

    async def unregister_cuda(request: Request, name: str = "") -> Response:
        caller(request)  # there are none
        return Response(status_code=200)

    async def cuda_status(request: Request, name: str = "") -> Response:
        caller(request)
        if name:
            raise NotFound(NO_CUDA, field="name")
        return _json([])

    of_one = "/region/{name}"
    for prefix, ways in (
        ("/v2/systemsharedmemory", (register, unregister, status)),
        ("/v2/cudasharedmemory", (register_cuda, unregister_cuda, cuda_status)),
    ):
        router.add_api_route(f"{prefix}{of_one}/register", ways[0], methods=["POST"])
        for path in ("", of_one):
            router.add_api_route(f"{prefix}{path}/unregister", ways[1], methods=["POST"])
            router.add_api_route(f"{prefix}{path}/status", ways[2], methods=["GET"])
    return router


def _asked(body: bytes) -> _Register:
    try:
        return _register.decode(body)
    except msgspec.ValidationError as error:
        raise wrong_field(error) from None
    except PARSE_ERRORS as error:
        raise malformed(error) from None


def _json(content: object) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
