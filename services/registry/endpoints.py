"""The REST surface of the catalogue: models, versions, files, aliases."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect

from services.common.errors import Cancelled, NotFound
from services.common.objects import blob_path
from services.registry import alerts, service
from services.registry.alerts import KEPT
from services.registry.edge import Edge
from services.registry.names import AliasName
from services.registry.schemas import AliasIn, ModelIn, ModelPatch, VersionIn, checked
from services.registry.uploads import receive_multipart, steady
from services.registry.views import AlertList, AlertView, ModelPage, ModelView, VersionPage, VersionView

Limit = Annotated[int, Query(ge=1, le=1000)]
After = Annotated[str, Query(max_length=100, pattern=r"^[^\x00]*$")]

#: Who asks, as the gateway says it; those that come another way are one.
_KEY_ID = "x-headrace-key-id"

_UPLOAD_DOCS = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["files"],
                    "properties": {
                        "metadata": {"type": "string", "description": "JSON of VersionIn"},
                        "files": {"type": "array", "items": {"type": "string", "format": "binary"}},
                    },
                }
            }
        },
    }
}


def model_routes(edge: Edge) -> APIRouter:
    """Models and their aliases."""
    routes = APIRouter(prefix="/v1/models", tags=["models"])

    @routes.post("", status_code=201)
    async def create_model(body: ModelIn) -> ModelView:
        async with edge.transaction() as tx:
            return ModelView.of(await service.create_model(tx, body, edge.clock))

    @routes.get("")
    async def list_models(limit: Limit = 100, after: After = "") -> ModelPage:
        async with edge.transaction() as tx:
            models, following = await service.list_models(tx, after, limit)
        return ModelPage.of(models, following)

    @routes.get("/{model}")
    async def get_model(model: str) -> ModelView:
        async with edge.transaction() as tx:
            return ModelView.of(await service.get_model(tx, model))

    @routes.patch("/{model}")
    async def update_model(model: str, body: ModelPatch) -> ModelView:
        async with edge.transaction() as tx:
            return ModelView.of(await service.update_model(tx, model, body))

    @routes.delete("/{model}", status_code=204)
    async def delete_model(model: str) -> None:
        async with edge.transaction() as tx:
            await service.delete_model(tx, model)

    @routes.get("/{model}/alerts")
    async def list_alerts(model: str, limit: Annotated[int, Query(ge=1, le=KEPT)] = 10) -> AlertList:
        async with edge.transaction() as tx:
            found = await alerts.list_alerts(tx, model, limit)
        return AlertList(alerts=[AlertView.of(alert) for alert in found])

    @routes.put("/{model}/aliases/{alias}")
    async def set_alias(model: str, alias: AliasName, body: AliasIn) -> ModelView:
        async with edge.transaction() as tx:
            return ModelView.of(await service.set_alias(tx, model, alias, body.version, edge.clock))

    @routes.delete("/{model}/aliases/{alias}")
    async def remove_alias(model: str, alias: str) -> ModelView:
        async with edge.transaction() as tx:
            return ModelView.of(await service.remove_alias(tx, model, alias, edge.clock))

    return routes


def version_routes(edge: Edge) -> APIRouter:
    """Versions of a model and their files."""
    routes = APIRouter(prefix="/v1/models", tags=["versions"])

    @routes.post(
        "/{model}/versions",
        status_code=201,
        response_model=VersionView,
        responses={200: {"model": VersionView, "description": "The version is there already, the same."}},
        openapi_extra=_UPLOAD_DOCS,
    )
    async def create_version(model: str, request: Request, response: Response) -> VersionView:
        async with edge.transaction() as tx:
            await service.get_model(tx, model)  # before gigabytes are received for nothing
        async with edge.uploads.receive(request.headers.get(_KEY_ID, "")) as upload:
            kind = request.headers.get("content-type", "")
            metadata = await receive_multipart(kind, steady(_received(request)), upload)
            wanted = checked(VersionIn, metadata or b"{}")
            version, created = await edge.add_version(model, wanted, upload.files)
        response.status_code = 201 if created else 200
        return VersionView.of(version)

    @routes.get("/{model}/versions")
    async def list_versions(model: str, limit: Limit = 100, after: After = "") -> VersionPage:
        async with edge.transaction() as tx:
            versions, following = await service.list_versions(tx, model, after, limit)
        return VersionPage(versions=[VersionView.of(version) for version in versions], next=following)

    @routes.get("/{model}/versions/{version}")
    async def get_version(model: str, version: str) -> VersionView:
        async with edge.transaction() as tx:
            return VersionView.of(await service.get_version(tx, model, version))

    @routes.delete("/{model}/versions/{version}", status_code=204)
    async def delete_version(model: str, version: str) -> None:
        async with edge.transaction() as tx:
            await service.delete_version(tx, model, version, edge.clock)

    @routes.get("/{model}/versions/{version}/files/{path:path}", response_class=StreamingResponse)
    async def download(model: str, version: str, path: str) -> StreamingResponse:
        async with edge.transaction() as tx:
            found = await service.get_version(tx, model, version)
        file = next((file for file in found.files if file.path == path), None)
        if file is None:
            raise NotFound(f"version {found.version!r} of {model} has no file {path!r}", field="path")
        headers = {"content-length": str(file.size), "etag": f'"{file.digest}"'}
        blob = edge.store.stream(blob_path(file.digest))
        return StreamingResponse(blob, media_type="application/octet-stream", headers=headers)

    return routes


async def _received(request: Request) -> AsyncIterator[bytes]:
    try:
        async for chunk in request.stream():
            yield chunk
    except ClientDisconnect:
        raise Cancelled("the sender went away") from None
