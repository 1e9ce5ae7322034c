"""The Open Inference Protocol over REST, inference itself aside."""

from __future__ import annotations

import functools
import importlib.metadata
import tomllib
from pathlib import Path
from typing import Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from services.common.clock import Clock
from services.common.errors import InvalidArgument, MalformedBody, Unimplemented
from services.common.lifecycle import Health
from services.gateway.catalogue import Catalogue, ServedModel, ServedVersion
from services.gateway.keys import Key, KeyRing, Scope
from services.gateway.pools import Condition, Pools
from services.gateway.reading import BodyBudget
from services.gateway.regions import Regions
from services.gateway.rest.door import authenticated, bounded_body
from services.gateway.rest.v2_statistics import as_json, model_statistics

_EXTENSIONS = (
    "binary_tensor_data", "classification", "model_configuration", "model_repository", "statistics"
)  # fmt: skip
_SHARED_MEMORY = "system_shared_memory"
SERVER_NAME = "headrace"
#: Of requests about the repository.
_MAX_BODY = 4096
#: What workers run together where a deployment does not say; requests with more rows run in slices.
_USUAL_ROWS = 64


@functools.cache
def server_version() -> str:
    """The version of the gateway, installed or run from a source tree."""
    try:
        return importlib.metadata.version("headrace-gateway")
    except importlib.metadata.PackageNotFoundError:
        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
        return str(project["version"])


def extensions(regions: Regions) -> tuple[str, ...]:
    """The extensions of the protocol that are served."""
    return (*_EXTENSIONS, _SHARED_MEMORY) if regions.served else _EXTENSIONS


def model_metadata(model: ServedModel, version: ServedVersion) -> dict[str, Any]:
    """Model metadata; all versions in service are listed."""
    signature = version.signature
    return {
        "name": model.name,
        "versions": list(model.versions),
        "platform": platform_of(version),
        "inputs": [
            {"name": s.name, "datatype": s.datatype.name, "shape": list(s.shape)} for s in signature.inputs
        ],
        "outputs": [
            {"name": s.name, "datatype": s.datatype.name, "shape": list(s.shape)} for s in signature.outputs
        ],
    }


def model_config(model: ServedModel, version: ServedVersion) -> dict[str, Any]:
    """What of Triton's model configuration is known here."""
    signature = version.signature
    skip = 1 if signature.batched else 0

    def entry(spec: Any) -> dict[str, Any]:
        kind = "STRING" if spec.datatype.name == "BYTES" else spec.datatype.name
        return {"name": spec.name, "data_type": f"TYPE_{kind}", "dims": list(spec.shape[skip:])}

    return {
        "name": model.name,
        "platform": platform_of(version),
        "backend": version.backend,
        "max_batch_size": (model.max_rows or _USUAL_ROWS) if signature.batched else 0,
        "input": [entry(spec) for spec in signature.inputs],
        "output": [entry(spec) for spec in signature.outputs],
        "version_policy": {"specific": {"versions": list(model.versions)}},
    }


def platform_of(version: ServedVersion) -> str:
    """The platform name that clients of other servers know."""
    return {"onnx": "onnx_onnxv1"}.get(version.backend, version.backend)


def condition_of(pools: Pools, model: ServedModel, version: ServedVersion) -> Condition:
    """Whether workers have `version`."""
    return pools.condition(model.pool, model.name, version.name, version.artifact_digest)


def repository_index(
    catalogue: Catalogue, pools: Pools, key: Key, *, ready: bool = False
) -> list[dict[str, str]]:
    """Every version in service of the models that `key` is for; with `ready`, those alone that are."""
    found = []
    for model in catalogue:
        if key.models and model.name not in key.models:
            continue
        for version in model.versions.values():
            condition = condition_of(pools, model, version)
            if condition.ready or not ready:
                state = {"state": str(condition.state), "reason": condition.reason}
                found.append({"name": model.name, "version": version.name, **state})
    return found


def load_as_it_is(parameters: object) -> None:
    """What is deployed is loaded already. Raises Unimplemented where it is to be loaded with a configuration
    or files of the request, its `parameters`."""
    if parameters:
        raise Unimplemented("No model is loaded from a request: push it, POST /v1/models/{name}/versions.")


def not_unloaded(model: ServedModel) -> Unimplemented:
    """What is said to those who would unload `model`."""
    return Unimplemented(f"Undeploy it: DELETE /v1/deployments/{model.name}.")


def v2_health_routes(health: Health) -> APIRouter:
    """The health routes, open to everybody."""
    router = APIRouter(tags=["open inference protocol"])

    @router.get("/v2/health/live")
    async def live() -> Response:
        return _json({"live": True})

    @router.get("/v2/health/ready")
    async def ready() -> Response:
        return _json({"ready": health.ready}, 200 if health.ready else 503)

    return router


def v2_routes(
    catalogue: Catalogue,
    pools: Pools,
    keys: KeyRing,
    health: Health,
    clock: Clock,
    bodies: BodyBudget,
    regions: Regions,
) -> APIRouter:
    """All other routes below /v2, infer and shared memory aside."""
    router = APIRouter(tags=["open inference protocol"])

    def asked(request: Request, model: str, version: str) -> tuple[ServedModel, ServedVersion]:
        caller = authenticated(request, keys, _reading(request, keys), clock.monotonic())
        caller.require_model(model)
        served = catalogue.model(model)
        return served, served.version(version)

    async def server(request: Request) -> Response:
        authenticated(request, keys, _reading(request, keys), clock.monotonic())
        return _json({"name": SERVER_NAME, "version": server_version(), "extensions": extensions(regions)})

    async def metadata(request: Request, model: str, version: str = "") -> Response:
        return _json(model_metadata(*asked(request, model, version)))

    async def model_ready(request: Request, model: str, version: str = "") -> Response:
        served, found = asked(request, model, version)
        ready = health.ready and condition_of(pools, served, found).ready
        return _json({"name": served.name, "ready": ready}, 200 if ready else 503)

    async def config(request: Request, model: str, version: str = "") -> Response:
        return _json(model_config(*asked(request, model, version)))

    async def stats(request: Request, model: str, version: str = "") -> Response:
        key = authenticated(request, keys, _reading(request, keys), clock.monotonic())
        found = model_statistics(catalogue, pools, key, model, version)
        return _json({"model_stats": [as_json(one) for one in found]})

    async def all_stats(request: Request) -> Response:
        key = authenticated(request, keys, _reading(request, keys), clock.monotonic())
        found = model_statistics(catalogue, pools, key)
        return _json({"model_stats": [as_json(one) for one in found]})

    async def index(request: Request) -> Response:
        key = authenticated(request, keys, _reading(request, keys), clock.monotonic())
        ready = await _only_ready(request, bodies)
        return _json(repository_index(catalogue, pools, key, ready=ready))

    async def load(request: Request, model: str) -> Response:
        authenticated(request, keys, Scope.ADMIN, clock.monotonic()).require_model(model)
        catalogue.model(model)  # NotFound before its parameters are looked at
        load_as_it_is((await _object(request, bodies)).get("parameters"))
        return Response(status_code=200)

    async def unload(request: Request, model: str) -> Response:
        authenticated(request, keys, Scope.ADMIN, clock.monotonic()).require_model(model)
        raise not_unloaded(catalogue.model(model))

    # A model of this name has its metadata under /v2/models/stats/versions/…: clients ask here for all.
    router.add_api_route("/v2/models/stats", all_stats, methods=["GET"])
    for path, answer in (
        ("", metadata),
        ("/ready", model_ready),
        ("/config", config),
        ("/stats", stats),
    ):
        router.add_api_route(f"/v2/models/{{model}}{path}", answer, methods=["GET"])
        router.add_api_route(f"/v2/models/{{model}}/versions/{{version}}{path}", answer, methods=["GET"])
    router.add_api_route("/v2", server, methods=["GET"])

    router.add_api_route("/v2/repository/index", index, methods=["POST"])
    router.add_api_route("/v2/repository/models/{model}/load", load, methods=["POST"])
    router.add_api_route("/v2/repository/models/{model}/unload", unload, methods=["POST"])
    return router


async def _only_ready(request: Request, bodies: BodyBudget) -> bool:
    """What the body of an index request asks for."""
    asked = await _object(request, bodies)
    ready = asked.get("ready", False)
    if not isinstance(ready, bool):
        raise InvalidArgument("ready must be true or false.", field="ready")
    return ready


async def _object(request: Request, bodies: BodyBudget) -> dict[str, Any]:
    """The body, an object or nothing."""
    body = await bounded_body(request, _MAX_BODY, bodies)
    try:
        asked = orjson.loads(body) if body.strip() else {}
    except orjson.JSONDecodeError as error:
        raise MalformedBody(f"The body is not JSON: {error}.") from None
    if not isinstance(asked, dict):
        raise InvalidArgument("The body must be an object.")
    return asked


def _reading(request: Request, keys: KeyRing) -> Scope:
    """Clients with predict alone may look at what they call."""
    key = keys.authenticate(
        *(
            None if (value := request.headers.get(name)) is None else value.encode("latin-1")
            for name in ("authorization", "x-api-key")
        )
    )
    return Scope.READ if Scope.READ in key.scopes else Scope.PREDICT


def _json(content: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")
