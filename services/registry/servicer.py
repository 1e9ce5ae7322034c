"""The gRPC surface: each rpc is the same call of the service layer as its REST route."""

# ruff: noqa: N802 - rpcs are named as in the contract

from __future__ import annotations

from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import grpc
from headrace.v1 import registry_pb2 as pb
from headrace.v1 import registry_pb2_grpc
from headrace.v1.control_pb2 import Balancing
from headrace.v1.tensor_pb2 import Code, DataType, Signature, Task, TensorSpec

from services.common.errors import InvalidArgument
from services.registry import deployments, service
from services.registry.edge import Edge
from services.registry.schemas import (
    AliasIn,
    AliasPath,
    BatchingIn,
    DeployIn,
    ModelIn,
    PageIn,
    VersionIn,
    checked,
)
from services.registry.uploads import Upload

Context = grpc.aio.ServicerContext[Any, Any]

#: Versions that are read together for a list, which over gRPC has no pages.
_AT_ONCE = 1000


class RegistryServicer(registry_pb2_grpc.RegistryServicer):
    """`headrace.v1.Registry`. Domain errors become statuses in `grpc_server.py`."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge

    async def CreateModel(self, request: pb.CreateModelRequest, _context: Context) -> pb.Model:
        wanted = checked(
            ModelIn,
            {"name": request.name, "description": request.description, "tags": dict(request.tags)},
        )
        async with self._edge.transaction() as tx:
            return await service.create_model(tx, wanted, self._edge.clock)

    async def GetModel(self, request: pb.GetModelRequest, _context: Context) -> pb.Model:
        async with self._edge.transaction() as tx:
            return await service.get_model(tx, request.name)

    async def ListModels(self, request: pb.ListModelsRequest, _context: Context) -> pb.ListModelsResponse:
        page = checked(PageIn, {"limit": request.limit or 100, "after": request.after})
        async with self._edge.transaction() as tx:
            models, following = await service.list_models(tx, page.after, page.limit)
        return pb.ListModelsResponse(models=models, next=following or "")

    async def CreateVersion(
        self, request_iterator: AsyncIterator[pb.CreateVersionRequest], _context: Context
    ) -> pb.ModelVersion:
        header = await anext(request_iterator, pb.CreateVersionRequest())
        if header.WhichOneof("part") != "header":
            raise InvalidArgument("the first message carries the header", field="header")
        wanted = checked(VersionIn, _version_values(header.header))
        async with self._edge.transaction() as tx:
            await service.get_model(tx, header.header.model)
        async with self._edge.uploads.receive() as upload:
            await _receive(header.header, request_iterator, upload)
            version, _created = await self._edge.add_version(header.header.model, wanted, upload.files)
        return version

    async def GetVersion(self, request: pb.GetVersionRequest, _context: Context) -> pb.ModelVersion:
        async with self._edge.transaction() as tx:
            return await service.get_version(tx, request.model, request.version)

    async def ListVersions(
        self, request: pb.ListVersionsRequest, _context: Context
    ) -> pb.ListVersionsResponse:
        async with self._edge.transaction() as tx:
            answer, after = pb.ListVersionsResponse(), ""
            while True:
                versions, following = await service.list_versions(tx, request.model, after, _AT_ONCE)
                answer.versions.extend(versions)
                if following is None:
                    return answer
                after = following

    async def SetAlias(self, request: pb.SetAliasRequest, _context: Context) -> pb.Model:
        async with self._edge.transaction() as tx:
            if not request.version:
                return await service.remove_alias(tx, request.model, request.alias, self._edge.clock)
            alias = checked(AliasPath, {"alias": request.alias}).alias
            version = checked(AliasIn, {"version": request.version}).version
            return await service.set_alias(tx, request.model, alias, version, self._edge.clock)

    async def Deploy(self, request: pb.DeployRequest, _context: Context) -> pb.Deployment:
        wanted = checked(DeployIn, _deploy_values(request))
        async with self._edge.transaction() as tx:
            return await deployments.deploy(tx, request.model, wanted, self._edge.clock)

    async def GetDeployment(self, request: pb.GetDeploymentRequest, _context: Context) -> pb.Deployment:
        async with self._edge.transaction() as tx:
            return await deployments.get_deployment(tx, request.model)

    async def Undeploy(self, request: pb.UndeployRequest, _context: Context) -> pb.UndeployResponse:
        async with self._edge.transaction() as tx:
            await deployments.undeploy(tx, request.model, self._edge.clock)
        return pb.UndeployResponse()


async def _receive(
    header: pb.CreateVersionHeader, messages: AsyncIterator[pb.CreateVersionRequest], upload: Upload
) -> None:
    """Cut the stream of chunks into the header's files. Raises InvalidArgument, field `files`, where their
    bytes are too few, too many or not those of the digest given."""
    waiting = b""
    for announced in header.files:
        await upload.begin(announced.path)
        left = announced.size
        while left:
            if not waiting:
                message = await anext(messages, None)
                if message is None:
                    raise InvalidArgument(f"{announced.path} ends {left} bytes early", field="files")
                waiting = message.chunk
                continue
            taken, waiting = waiting[:left], waiting[left:]
            left -= len(taken)
            await upload.write(taken)
        received = await upload.end()
        if announced.digest and announced.digest != received.digest:
            raise InvalidArgument(f"{announced.path} has digest {received.digest}", field="files")
    while not waiting and (message := await anext(messages, None)) is not None:
        waiting = message.chunk
    if waiting:
        raise InvalidArgument("more bytes came than the header announced", field="files")


def _version_values(header: pb.CreateVersionHeader) -> dict[str, Any]:
    """The header as VersionIn takes it; what protobuf cannot tell from unset counts as unset."""
    lineage = header.lineage
    return {
        "version": header.version or None,
        "backend": header.backend,
        "signature": _override_values(header.signature),
        "metrics": dict(header.metrics),
        "lineage": {field.name: getattr(lineage, field.name) for field in lineage.DESCRIPTOR.fields},
        "tags": dict(header.tags),
    }


def _override_values(signature: Signature) -> dict[str, Any]:
    return {
        "inputs": [_tensor_values(spec) for spec in signature.inputs],
        "outputs": [_tensor_values(spec) for spec in signature.outputs],
        "batched": signature.batched or None,
        "task": _name(Task, "TASK_", signature.task, lower=True),
        "prediction_output": signature.prediction_output or None,
        "probability_output": signature.probability_output or None,
        "classes": list(signature.classes) or None,
    }


def _tensor_values(spec: TensorSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "datatype": _name(DataType, "DATA_TYPE_", spec.datatype),
        "shape": list(spec.shape) or None,
        "columns": list(spec.columns) or None,
    }


def _deploy_values(request: pb.DeployRequest) -> dict[str, Any]:
    batching = request.batching
    values: dict[str, Any] = {
        "versions": [
            {"version": v.version, "weight": Decimal(v.weight) / 100, "variant": v.variant or None}
            for v in request.versions
        ],
        "batching": {
            name: list(batching.preferred_rows) if name == "preferred_rows" else getattr(batching, name)
            for name in BatchingIn.model_fields
        },
        "log_payloads": not request.disable_payload_log,
        "default_timeout_ms": request.default_timeout_ms,
        "expected_revision": request.expected_revision or None,
    }
    if request.HasField("fallback"):
        known = Code.DESCRIPTOR.values_by_number
        codes = [known[c].name.removeprefix("CODE_") if c in known else c for c in request.fallback.on]
        values["fallback"] = {"version": request.fallback.version, "on": codes}
    if request.HasField("cache"):
        values["cache"] = {"ttl_s": request.cache.ttl_ms / 1000}
        if request.cache.max_entry_bytes:
            values["cache"]["max_entry_bytes"] = request.cache.max_entry_bytes
    if request.HasField("shadow"):
        shadow = request.shadow
        values["shadow"] = {
            "version": shadow.version,
            "share": Decimal(shadow.share) / 100,
            "slice_by": shadow.slice_by,
        }
        if shadow.tolerance:
            values["shadow"]["tolerance"] = shadow.tolerance
    if request.HasField("hedging"):
        values["hedging"] = {"min_delay_ms": request.hedging.min_delay_ms}
        if request.hedging.quantile:
            values["hedging"]["quantile"] = request.hedging.quantile
    if request.pool:
        values["pool"] = request.pool
    if request.balancing:
        values["balancing"] = _name(Balancing, "BALANCING_", request.balancing, lower=True)
    return values


def _name(kind: Any, prefix: str, number: int, *, lower: bool = False) -> str | int | None:
    """As REST has it; one of a later contract by its number, which is refused with its field."""
    if number == 0:
        return None
    known = kind.DESCRIPTOR.values_by_number.get(number)
    if known is None:
        return number
    name: str = known.name.removeprefix(prefix)
    return name.lower() if lower else name
