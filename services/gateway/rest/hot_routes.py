"""The hot routes through ASGI: for paths that were written with escapes or a query, and to compare with."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from services.common.errors import HeadraceError
from services.gateway.call import HEADERS, Call, Head
from services.gateway.predict import PredictService
from services.gateway.rest.documents import EMBED, OPENAI_EMBEDDINGS, PREDICT, PREDICT_MODEL, V2_INFER
from services.gateway.rest.door import bounded_body
from services.gateway.targets import Dialect, Target


class _AsgiCall(Call):
    """A call whose answer somebody awaits."""

    def __init__(self, service: PredictService, head: Head) -> None:
        super().__init__(service, head)
        self.answered: asyncio.Future[Response] = asyncio.get_running_loop().create_future()

    def answer(self, status: int, headers: bytes, body: bytes) -> None:
        response = Response(body, status)
        pairs = [line.split(b": ", 1) for line in headers.split(b"\r\n") if line]
        response.raw_headers = [(name, value) for name, value in pairs]
        response.raw_headers.append((b"content-length", str(len(body)).encode()))
        if status == 413:
            response.raw_headers.append((b"connection", b"close"))
        if not self.answered.done():
            self.answered.set_result(response)


def hot_routes(service: PredictService) -> APIRouter:
    """Routes for every hot target."""
    router = APIRouter()

    async def predict(request: Request) -> Response:
        return await _answered(service, Target(Dialect.NATIVE), request)

    async def predict_model(request: Request, model: str) -> Response:
        return await _answered(service, Target(Dialect.NATIVE, model), request)

    async def embed(request: Request) -> Response:
        return await _answered(service, Target(Dialect.EMBED), request)

    async def openai_embeddings(request: Request) -> Response:
        return await _answered(service, Target(Dialect.OPENAI_EMBEDDINGS), request)

    async def infer(request: Request, model: str, version: str = "") -> Response:
        return await _answered(service, Target(Dialect.V2, model, version), request)

    for prefix in ("", "/api"):
        tags: list[str] = ["predict"]
        router.add_api_route(f"{prefix}/v1/predict", predict, methods=["POST"], tags=tags, **PREDICT)  # type: ignore[arg-type]
        router.add_api_route(
            f"{prefix}/v1/models/{{model}}/predict",
            predict_model,
            methods=["POST"],
            tags=tags,  # type: ignore[arg-type]
            **PREDICT_MODEL,
        )
    router.add_api_route("/v1/embed", embed, methods=["POST"], tags=["predict"], **EMBED)
    router.add_api_route(
        "/v1/embeddings", openai_embeddings, methods=["POST"], tags=["openai"], **OPENAI_EMBEDDINGS
    )
    for path in ("/v2/models/{model}/infer", "/v2/models/{model}/versions/{version}/infer"):
        router.add_api_route(path, infer, methods=["POST"], tags=["open inference protocol"], **V2_INFER)
    return router


async def _answered(service: PredictService, target: Target, request: Request) -> Response:
    head = Head(target)
    for name, value in request.scope["headers"]:
        attribute = HEADERS.get(name)
        if attribute is not None:
            setattr(head, attribute, value)
    call = _AsgiCall(service, head)
    try:
        request.state.holder = service.admit(call).holder
        call.body = await bounded_body(request, service.limits.max_body_bytes, service.bodies)
    except HeadraceError as error:
        service.refuse(call, error)
        return call.answered.result()
    except ClientDisconnect:
        return Response(status_code=499)
    service.begin(call)
    if not call.answered.done():
        gone = asyncio.ensure_future(request.receive())
        try:
            waited: set[asyncio.Future[Any]] = {call.answered, gone}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not call.answered.done():
                service.abandon(call)
    return call.answered.result() if call.answered.done() else Response(status_code=499)
