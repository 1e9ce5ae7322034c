"""The REST surface of what serves and who may call: deployments and API keys."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query

from services.registry import deployments, keys
from services.registry.edge import Edge
from services.registry.endpoints import After, Limit
from services.registry.schemas import DeployIn, KeyIn
from services.registry.views import (
    DeploymentPage,
    DeploymentView,
    KeyPage,
    KeyView,
    NewKeyView,
    RevisionPage,
    RevisionView,
)


def deployment_routes(edge: Edge) -> APIRouter:
    """Routes under /v1/deployments."""
    routes = APIRouter(prefix="/v1/deployments", tags=["deployments"])

    @routes.get("")
    async def list_deployments(limit: Limit = 100, after: After = "") -> DeploymentPage:
        async with edge.transaction() as tx:
            found, following = await deployments.list_deployments(tx, after, limit)
        return DeploymentPage(deployments=[DeploymentView.of(item) for item in found], next=following)

    @routes.put("/{model}")
    async def deploy(model: str, body: DeployIn) -> DeploymentView:
        async with edge.transaction() as tx:
            return DeploymentView.of(await deployments.deploy(tx, model, body, edge.clock))

    @routes.get("/{model}")
    async def get_deployment(model: str) -> DeploymentView:
        async with edge.transaction() as tx:
            return DeploymentView.of(await deployments.get_deployment(tx, model))

    @routes.delete("/{model}", status_code=204)
    async def undeploy(model: str) -> None:
        async with edge.transaction() as tx:
            await deployments.undeploy(tx, model, edge.clock)

    @routes.get("/{model}/history")
    async def history(
        model: str, limit: Limit = 100, before: Annotated[int | None, Query(ge=1, lt=1 << 62)] = None
    ) -> RevisionPage:
        async with edge.transaction() as tx:
            entries, following = await deployments.history(tx, model, before, limit)
        return RevisionPage(revisions=[RevisionView.of(entry) for entry in entries], next=following)

    return routes


def key_routes(edge: Edge) -> APIRouter:
    """Routes under /v1/keys."""
    routes = APIRouter(prefix="/v1/keys", tags=["keys"])

    @routes.post("", status_code=201)
    async def create_key(body: KeyIn) -> NewKeyView:
        async with edge.transaction() as tx:
            key, text = await keys.create_key(tx, body, edge.clock)
        return NewKeyView(**asdict(key), key=text)

    @routes.get("")
    async def list_keys(limit: Limit = 100, after: After = "") -> KeyPage:
        async with edge.transaction() as tx:
            found, following = await keys.list_keys(tx, after, limit)
        return KeyPage(keys=[KeyView(**asdict(key)) for key in found], next=following)

    @routes.delete("/{key_id}", status_code=204)
    async def revoke_key(key_id: str) -> None:
        async with edge.transaction() as tx:
            await keys.revoke_key(tx, key_id, edge.clock)

    return routes
