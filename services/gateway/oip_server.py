"""The Open Inference Protocol over gRPC, with health and reflection: what is served on the gRPC port, `rpc/`
being how."""

# ruff: noqa: N802 - the names of the methods are the protocol's

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import structlog
from google.protobuf.json_format import ParseDict
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from open_inference import open_inference_pb2 as oip_pb2
from open_inference import open_inference_pb2_grpc as oip_grpc

from services.common.clock import Clock
from services.common.errors import Fatal, HeadraceError, Internal, NotFound, Unimplemented
from services.common.frames.header_blocks import Field
from services.common.grpc_health import HealthServicer
from services.common.lifecycle import Health
from services.gateway.catalogue import Catalogue, ServedModel, ServedVersion
from services.gateway.keys import Key, KeyRing, Scope
from services.gateway.pools import Pools
from services.gateway.predict import PredictService
from services.gateway.regions import Regions
from services.gateway.rest.shared_memory_routes import NO_CUDA
from services.gateway.rest.v2_routes import (
    SERVER_NAME,
    condition_of,
    extensions,
    load_as_it_is,
    model_config,
    model_metadata,
    not_unloaded,
    repository_index,
    server_version,
)
from services.gateway.rest.v2_statistics import model_statistics
from services.gateway.rpc.limits import RpcLimits
from services.gateway.rpc.methods import Door, Methods
from services.gateway.rpc.server import RpcServer
from services.gateway.rpc.tasks import CallAborted, RpcContext

log = structlog.get_logger(__name__)

Answer = TypeVar("Answer")

_SERVICE = "inference.GRPCInferenceService"
#: Protobuf around the tensors.
_MESSAGE_SLACK = 1 << 20
#: Digits that 64 bits always have room for, and one.
_NUMBER_DIGITS = 19
_OPEN = frozenset({"ServerLive", "ServerReady"})
_STATUS: dict[int, grpc.StatusCode] = {status.value[0]: status for status in grpc.StatusCode}


class InferenceServicer(oip_grpc.GRPCInferenceServiceServicer):
    """The protocol's methods but ModelInfer and ModelStreamInfer, which are hot calls. Errors become gRPC
    statuses with the same number as their code."""

    def __init__(
        self,
        *,
        catalogue: Catalogue,
        pools: Pools,
        keys: KeyRing,
        health: Health,
        clock: Clock,
        regions: Regions,
    ) -> None:
        self._regions = regions
        self._catalogue = catalogue
        self._pools = pools
        self.keys = keys
        self._health = health
        self._clock = clock

    async def ServerLive(self, request: oip_pb2.ServerLiveRequest, context: RpcContext) -> Any:
        return oip_pb2.ServerLiveResponse(live=True)

    async def ServerReady(self, request: oip_pb2.ServerReadyRequest, context: RpcContext) -> Any:
        return oip_pb2.ServerReadyResponse(ready=self._health.ready)

    async def ModelReady(self, request: oip_pb2.ModelReadyRequest, context: RpcContext) -> Any:
        async def answer() -> oip_pb2.ModelReadyResponse:
            try:
                condition = condition_of(self._pools, *self._asked(context, request.name, request.version))
            except NotFound:  # not yet, to clients that ask until it is ready; as Triton has it
                return oip_pb2.ModelReadyResponse(ready=False)
            return oip_pb2.ModelReadyResponse(ready=self._health.ready and condition.ready)

        return await self._answered(context, answer)

    async def ServerMetadata(self, request: oip_pb2.ServerMetadataRequest, context: RpcContext) -> Any:
        async def answer() -> oip_pb2.ServerMetadataResponse:
            self._charge(self._caller(context, Scope.PREDICT, Scope.READ))
            return oip_pb2.ServerMetadataResponse(
                name=SERVER_NAME, version=server_version(), extensions=extensions(self._regions)
            )

        return await self._answered(context, answer)

    async def ModelMetadata(self, request: oip_pb2.ModelMetadataRequest, context: RpcContext) -> Any:
        async def answer() -> oip_pb2.ModelMetadataResponse:
            described = model_metadata(*self._asked(context, request.name, request.version))
            return oip_pb2.ModelMetadataResponse(**described)

        return await self._answered(context, answer)

    async def ModelStatistics(self, request: oip_pb2.ModelStatisticsRequest, context: RpcContext) -> Any:
        async def answer() -> oip_pb2.ModelStatisticsResponse:
            key = self._caller(context, Scope.PREDICT, Scope.READ)
            self._charge(key)
            found = model_statistics(self._catalogue, self._pools, key, request.name, request.version)
            return oip_pb2.ModelStatisticsResponse(model_stats=found)

        return await self._answered(context, answer)

    async def ModelConfig(self, request: oip_pb2.ModelConfigRequest, context: RpcContext) -> Any:
        async def answer() -> oip_pb2.ModelConfigResponse:
            config = model_config(*self._asked(context, request.name, request.version))
            policy = config["version_policy"]["specific"]
            policy["versions"] = [name for name in policy["versions"] if _is_number(name)]
            return oip_pb2.ModelConfigResponse(config=ParseDict(config, oip_pb2.ModelConfig()))

        return await self._answered(context, answer)

    async def RepositoryModelLoad(
        self, request: oip_pb2.RepositoryModelLoadRequest, context: RpcContext
    ) -> Any:
        async def answer() -> oip_pb2.RepositoryModelLoadResponse:
            self._administered(context, request.model_name)
            load_as_it_is(request.parameters)
            return oip_pb2.RepositoryModelLoadResponse()

        return await self._answered(context, answer)

    async def RepositoryModelUnload(
        self, request: oip_pb2.RepositoryModelUnloadRequest, context: RpcContext
    ) -> Any:
        async def answer() -> oip_pb2.RepositoryModelUnloadResponse:
            raise not_unloaded(self._administered(context, request.model_name))

        return await self._answered(context, answer)

    async def RepositoryIndex(self, request: oip_pb2.RepositoryIndexRequest, context: RpcContext) -> Any:
        async def answer() -> oip_pb2.RepositoryIndexResponse:
            key = self._caller(context, Scope.PREDICT, Scope.READ)
            self._charge(key)
            return oip_pb2.RepositoryIndexResponse(
                models=repository_index(self._catalogue, self._pools, key, ready=request.ready)
            )

        return await self._answered(context, answer)

    async def SystemSharedMemoryRegister(
        self, request: oip_pb2.SystemSharedMemoryRegisterRequest, context: RpcContext
    ) -> Any:
        async def answer() -> oip_pb2.SystemSharedMemoryRegisterResponse:
            key_id = self._predicting(context)
            await asyncio.to_thread(
                self._regions.register, key_id, request.name, request.key, request.offset, request.byte_size
            )
            return oip_pb2.SystemSharedMemoryRegisterResponse()

        return await self._answered(context, answer)

    async def SystemSharedMemoryUnregister(
        self, request: oip_pb2.SystemSharedMemoryUnregisterRequest, context: RpcContext
    ) -> Any:
        async def answer() -> oip_pb2.SystemSharedMemoryUnregisterResponse:
            await asyncio.to_thread(self._regions.unregister, self._predicting(context), request.name)
            return oip_pb2.SystemSharedMemoryUnregisterResponse()

        return await self._answered(context, answer)

    async def SystemSharedMemoryStatus(
        self, request: oip_pb2.SystemSharedMemoryStatusRequest, context: RpcContext
    ) -> Any:
        async def answer() -> oip_pb2.SystemSharedMemoryStatusResponse:
            found = await asyncio.to_thread(self._regions.listed, self._predicting(context), request.name)
            status = oip_pb2.SystemSharedMemoryStatusResponse()
            for name, region in found.items():
                said = status.regions[name]
                said.name, said.key = name, region.key
                said.offset, said.byte_size = region.offset, region.byte_size
            return status

        return await self._answered(context, answer)

    async def CudaSharedMemoryRegister(
        self, request: oip_pb2.CudaSharedMemoryRegisterRequest, context: RpcContext
    ) -> Any:
        async def answer() -> oip_pb2.CudaSharedMemoryRegisterResponse:
            self._predicting(context)
            raise Unimplemented(NO_CUDA)

        return await self._answered(context, answer)

    async def CudaSharedMemoryUnregister(
        self, request: oip_pb2.CudaSharedMemoryUnregisterRequest, context: RpcContext
    ) -> Any:
        async def answer() -> oip_pb2.CudaSharedMemoryUnregisterResponse:
            self._predicting(context)  # there are none
            return oip_pb2.CudaSharedMemoryUnregisterResponse()

        return await self._answered(context, answer)

    async def CudaSharedMemoryStatus(
        self, request: oip_pb2.CudaSharedMemoryStatusRequest, context: RpcContext
    ) -> Any:
        async def answer() -> oip_pb2.CudaSharedMemoryStatusResponse:
            self._predicting(context)
            if request.name:
                raise NotFound(NO_CUDA, field="name")
            return oip_pb2.CudaSharedMemoryStatusResponse()

        return await self._answered(context, answer)

    def _administered(self, context: RpcContext, model: str) -> ServedModel:
        """The model, of a caller who may change what is served."""
        key = self._caller(context, Scope.ADMIN)
        self._charge(key)
        return self._found(key, model, "")[0]

    def _predicting(self, context: RpcContext) -> str:
        """The id of the caller's key, which may predict and is charged for the call."""
        key = self._caller(context, Scope.PREDICT)
        self._charge(key)
        return key.key_id

    async def _answered(self, context: RpcContext, answer: Callable[[], Awaitable[Answer]]) -> Answer:
        try:
            return await answer()
        except HeadraceError as error:
            failure = error
        except CallAborted:
            raise
        except Exception:
            log.exception("grpc_crashed")
            failure = Internal("The gateway failed to handle this request.")
        message = failure.message
        if failure.field and failure.field not in message:
            message = f"{failure.field}: {message}"
        trailing: tuple[tuple[str, str], ...] = ()
        if failure.retry_after_ms:
            # What gRPC's own retry policy reads.
            trailing = (("grpc-retry-pushback-ms", str(failure.retry_after_ms)),)
        return await context.abort(_STATUS[failure.code], message, trailing)

    def _asked(self, context: RpcContext, model: str, version: str) -> tuple[ServedModel, ServedVersion]:
        key = self._caller(context, Scope.PREDICT, Scope.READ)
        self._charge(key)
        return self._found(key, model, version)

    def _found(self, key: Key, model: str, version: str) -> tuple[ServedModel, ServedVersion]:
        key.require_model(model)
        served = self._catalogue.model(model)
        return served, served.version(version)

    def _caller(self, context: RpcContext, *any_of: Scope) -> Key:
        authorization, api_key = _metadata(context, "authorization"), _metadata(context, "x-api-key")
        key = self.keys.authenticate(authorization, api_key)
        if not any(scope in key.scopes for scope in any_of):
            key.require(any_of[0])
        return key

    def _charge(self, key: Key) -> None:
        """Count one call against the key's limit. Raises ResourceExhausted."""
        if key.bucket is not None:
            key.bucket.admit(self._clock.monotonic())


def _door(keys: KeyRing) -> Door:
    """Refuses callers without a key before their message is read."""

    def look(metadata: Sequence[Field]) -> Key:
        sent = dict(reversed(metadata))
        return keys.authenticate(sent.get(b"authorization"), sent.get(b"x-api-key"))

    return look


@dataclass(frozen=True, slots=True)
class OipServer:
    """A running server and the port that it got."""

    port: int
    announce_end: Callable[[], None]
    """Say by gRPC's own health service that the end is near; calls go on."""


@asynccontextmanager
async def serve_oip(
    servicer: InferenceServicer,
    service: PredictService,
    host: str,
    port: int,
    *,
    max_connections: int,
    drain_s: float,
    reuse_port: bool = False,
) -> AsyncIterator[OipServer]:
    """Serve while the block runs. At the end calls have `drain_s` seconds. Raises Fatal
    where the port is taken."""
    methods = Methods()
    methods.guard(_SERVICE, _door(servicer.keys), but=_OPEN)
    oip_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, methods)  # type: ignore[no-untyped-call]
    names = (_SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
    serving = HealthServicer(("", *names))
    health_pb2_grpc.add_HealthServicer_to_server(serving, methods)
    described = reflection.aio.ReflectionServicer((*names, reflection.SERVICE_NAME))  # type: ignore[attr-defined]
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(described, methods)
    limits = RpcLimits(
        max_message_bytes=service.limits.max_body_bytes + _MESSAGE_SLACK, max_connections=max_connections
    )
    hot_path, stream_path = (f"/{_SERVICE}/{name}".encode() for name in ("ModelInfer", "ModelStreamInfer"))
    server = RpcServer(service, hot_path, stream_path, methods.by_path, limits)
    try:
        chosen = await server.start(host, port, reuse_port=reuse_port)
    except OSError as error:
        raise Fatal(f"Cannot listen on {host}:{port} for gRPC: the port is taken.") from error
    async with server.sweeping():
        try:
            yield OipServer(chosen, serving.announce_end)
        finally:
            serving.announce_end()
            await server.stop(drain_s)


def _is_number(version: str) -> bool:
    return version.isascii() and version.isdigit() and len(version) < _NUMBER_DIGITS


def _metadata(context: RpcContext, name: str) -> bytes | None:
    for key, value in context.invocation_metadata():
        if key == name:
            return value
    return None
