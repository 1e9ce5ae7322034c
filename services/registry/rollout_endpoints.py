"""The REST surface of rollouts."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from fastapi import APIRouter, Query

from services.registry import rollouts
from services.registry.edge import Edge
from services.registry.endpoints import After, Limit
from services.registry.names import ModelName
from services.registry.repository import Repository
from services.registry.rollout_schemas import NewRolloutIn, ReasonIn
from services.registry.rollout_views import RolloutEventPage, RolloutEventView, RolloutPage, RolloutView
from services.registry.tables import RolloutRow
from services.registry.workers import Workers

StatusName = Literal["running", "paused", "baking", "completed", "rolled_back", "aborted"]
_NO_REASON: Final = ReasonIn()


def rollout_routes(edge: Edge, workers: Workers) -> APIRouter:
    """Routes under /v1/rollouts."""
    routes = APIRouter(prefix="/v1/rollouts", tags=["rollouts"])

    async def view(tx: Repository, row: RolloutRow) -> RolloutView:
        return RolloutView.of(row, await rollouts.facts_of(tx, row, workers), edge.clock.now())

    @routes.post("", status_code=201)
    async def create_rollout(body: NewRolloutIn) -> RolloutView:
        async with edge.transaction() as tx:
            return await view(tx, await rollouts.create_rollout(tx, body, edge.clock))

    @routes.get("")
    async def list_rollouts(
        model: ModelName | None = None,
        status: StatusName | None = None,
        limit: Limit = 100,
        after: After = "",
    ) -> RolloutPage:
        async with edge.transaction() as tx:
            found, following = await rollouts.list_rollouts(tx, model, status, after, limit)
        now = edge.clock.now()
        return RolloutPage(rollouts=[RolloutView.of(row, None, now) for row in found], next=following)

    @routes.get("/{rollout_id}")
    async def get_rollout(rollout_id: str) -> RolloutView:
        async with edge.transaction() as tx:
            return await view(tx, await rollouts.get_rollout(tx, rollout_id))

    @routes.get("/{rollout_id}/events")
    async def events(
        rollout_id: str, limit: Limit = 100, before: Annotated[int | None, Query(ge=1, lt=1 << 62)] = None
    ) -> RolloutEventPage:
        async with edge.transaction() as tx:
            found, following = await rollouts.rollout_events(tx, rollout_id, before, limit)
        return RolloutEventPage(events=[RolloutEventView.of(row) for row in found], next=following)

    @routes.post("/{rollout_id}/pause")
    async def pause(rollout_id: str, body: ReasonIn = _NO_REASON) -> RolloutView:
        async with edge.transaction() as tx:
            return await view(tx, await rollouts.pause(tx, rollout_id, body.reason, edge.clock))

    @routes.post("/{rollout_id}/resume")
    async def resume(rollout_id: str, body: ReasonIn = _NO_REASON) -> RolloutView:
        async with edge.transaction() as tx:
            return await view(tx, await rollouts.resume(tx, rollout_id, body.reason, edge.clock))

    @routes.post("/{rollout_id}/abort")
    async def abort(rollout_id: str, body: ReasonIn = _NO_REASON) -> RolloutView:
        async with edge.transaction() as tx:
            return await view(tx, await rollouts.abort(tx, rollout_id, body.reason, edge.clock))

    @routes.post("/{rollout_id}/promote")
    async def promote(rollout_id: str, body: ReasonIn = _NO_REASON) -> RolloutView:
        async with edge.transaction() as tx:
            return await view(tx, await rollouts.promote(tx, rollout_id, body.reason, workers, edge.clock))

    return routes
