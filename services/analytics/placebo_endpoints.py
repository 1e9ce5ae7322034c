"""GET /v1/experiments/placebo."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from services.analytics.placebo_looking import Placebos


def placebo_routes(placebos: Placebos) -> APIRouter:
    """Include before routes with an experiment's id in the same place."""
    router = APIRouter(prefix="/v1/experiments", tags=["experiments"])

    @router.get("/placebo")
    async def show_placebo(
        model: Annotated[str | None, Query(min_length=1, max_length=64, pattern=r"^[^\x00]*$")] = None,
    ) -> dict[str, Any]:
        """How often the method that decides has told halves of one and the same control apart, by model:
        about `alpha` at most, however often it looked. A fixed-horizon test looked at as often is shown
        beside it."""
        return {"models": await placebos.all(model)}

    return router
