"""The REST surface of experiments and holdouts."""

from __future__ import annotations

import math
import re
from typing import Annotated, Final, Literal

from fastapi import APIRouter, Query, Request

from services.common.errors import InvalidArgument
from services.common.ids import new_id, parse_id
from services.common.targeting import MAX_UNIT, check_attributes
from services.registry import experiments
from services.registry.assignments import explain_assignment
from services.registry.edge import Edge
from services.registry.endpoints import After, Limit
from services.registry.experiment_running import Readiness
from services.registry.experiment_schemas import (
    ExperimentPatch,
    HoldoutIn,
    NewExperimentIn,
    StopIn,
    Value,
)
from services.registry.experiment_views import (
    AssignmentView,
    ExperimentHistory,
    ExperimentPage,
    ExperimentView,
    HoldoutView,
)
from services.registry.explanation import request_of
from services.registry.names import ModelName
from services.registry.repository import Repository
from services.registry.tables import ExperimentRow

StatusName = Literal["draft", "scheduled", "running", "stopped"]
UnitText = Annotated[str, Query(max_length=MAX_UNIT)]
_NO_REASON: Final = StopIn()
_ATTRIBUTE: Final = "attribute."
#: As JSON has numbers; Python would take "1_000" and " 7" for some as well. No longer one means anything.
_NUMBER: Final = re.compile(r"-?[0-9]{1,300}(\.[0-9]{1,300})?([eE][+-]?[0-9]{1,4})?")


def experiment_routes(edge: Edge, ready: Readiness) -> APIRouter:
    """Routes under /v1/experiments."""
    routes = APIRouter(prefix="/v1/experiments", tags=["experiments"])

    async def view(tx: Repository, row: ExperimentRow) -> ExperimentView:
        return ExperimentView.of(row, await tx.verdict(row.experiment_id))

    @routes.post("", status_code=201)
    async def create_experiment(body: NewExperimentIn) -> ExperimentView:
        async with edge.transaction() as tx:
            return await view(tx, await experiments.create(tx, body, edge.clock, ready))

    @routes.get("")
    async def list_experiments(
        model: ModelName | None = None,
        status: StatusName | None = None,
        limit: Limit = 100,
        after: After = "",
    ) -> ExperimentPage:
        async with edge.transaction() as tx:
            found, following = await experiments.page(tx, model, status, after, limit)
        return ExperimentPage(experiments=[ExperimentView.of(row) for row in found], next=following)

    @routes.get("/{experiment_id}")
    async def get_experiment(experiment_id: str) -> ExperimentView:
        async with edge.transaction() as tx:
            return await view(tx, await experiments.get(tx, experiment_id))

    @routes.patch("/{experiment_id}")
    async def change_experiment(experiment_id: str, body: ExperimentPatch) -> ExperimentView:
        async with edge.transaction() as tx:
            return await view(tx, await experiments.change(tx, experiment_id, body, edge.clock))

    @routes.delete("/{experiment_id}", status_code=204)
    async def delete_experiment(experiment_id: str) -> None:
        async with edge.transaction() as tx:
            await experiments.delete(tx, experiment_id)

    return routes


def experiment_action_routes(edge: Edge, ready: Readiness) -> APIRouter:
    """What can be done with an experiment and asked of it, under /v1/experiments/{experiment_id}."""
    routes = APIRouter(prefix="/v1/experiments", tags=["experiments"])

    async def view(tx: Repository, row: ExperimentRow) -> ExperimentView:
        return ExperimentView.of(row, await tx.verdict(row.experiment_id))

    @routes.post("/{experiment_id}/start")
    async def start_experiment(experiment_id: str) -> ExperimentView:
        async with edge.transaction() as tx:
            return await view(tx, await experiments.start(tx, experiment_id, edge.clock, ready))

    @routes.post("/{experiment_id}/stop")
    async def stop_experiment(experiment_id: str, body: StopIn = _NO_REASON) -> ExperimentView:
        async with edge.transaction() as tx:
            return await view(tx, await experiments.stop(tx, experiment_id, body, edge.clock))

    @routes.get("/{experiment_id}/history")
    async def history(
        experiment_id: str, limit: Limit = 100, before: Annotated[int | None, Query(ge=1, lt=1 << 62)] = None
    ) -> ExperimentHistory:
        async with edge.transaction() as tx:
            return ExperimentHistory.of(*await experiments.history(tx, experiment_id, before, limit))

    @routes.get("/{experiment_id}/assignment")
    async def assignment(
        experiment_id: str,
        request: Request,
        unit: UnitText = "",
        session: UnitText = "",
        request_id: UnitText = "",
    ) -> AssignmentView:
        """Explains one request; its attributes are `attribute.<name>=<value>`, numbers where they read so."""
        if not (unit or session or request_id):
            raise InvalidArgument("whom is it about? unit, session or request_id says", field="unit")
        identity = parse_id(request_id) if request_id else new_id()
        asked = request_of(unit, session, identity, _attributes(request))
        async with edge.transaction() as tx:
            return AssignmentView.of(experiment_id, await explain_assignment(tx, experiment_id, asked))

    return routes


def holdout_routes(edge: Edge) -> APIRouter:
    """Holdouts of models."""
    routes = APIRouter(prefix="/v1/models", tags=["experiments"])

    @routes.put("/{model}/holdout")
    async def set_holdout(model: str, body: HoldoutIn) -> HoldoutView:
        async with edge.transaction() as tx:
            share = await experiments.set_holdout(tx, model, body, edge.clock)
        return HoldoutView(model=model, share=float(share))

    @routes.get("/{model}/holdout")
    async def get_holdout(model: str) -> HoldoutView:
        async with edge.transaction() as tx:
            share = await experiments.get_holdout(tx, model)
        return HoldoutView(model=model, share=float(share))

    return routes


def _attributes(request: Request) -> dict[str, Value]:
    found = {
        name.removeprefix(_ATTRIBUTE): attribute_value(text)
        for name, text in request.query_params.items()
        if name.startswith(_ATTRIBUTE) and len(name) > len(_ATTRIBUTE)
    }
    check_attributes(found, "attribute")
    return found


def attribute_value(text: str) -> Value:
    """What a query says as the value of an attribute: a truth value, a number, or else a text; one that shall
    be a text all the same stands in double quotes."""
    if text in ("true", "false"):
        return text == "true"
    if len(text) > 1 and text[0] == text[-1] == '"':
        return text[1:-1]
    if _NUMBER.fullmatch(text):
        number = int(text) if text.lstrip("-").isdigit() else float(text)
        if math.isfinite(number) and abs(number) < 1 << 63:
            return number
    return text
