"""The environment of the gateway."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from services.common.settings import (
    ArtifactSettings,
    CommaSeparated,
    FrameTlsSettings,
    Port,
    RedisSettings,
    ServiceSettings,
)


class Settings(ServiceSettings, RedisSettings, ArtifactSettings, FrameTlsSettings):
    """What the gateway reads. Durations are seconds, sizes bytes."""

    http_port: Port = 8000
    grpc_port: Port = 8001
    ops_port: Port = 8002
    #: Address of the ops port; empty: that of the others.
    ops_host: str = ""
    #: Processes that share the ports; `auto`: one for every four cores.
    gateway_processes: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] = 1
    #: Of several processes, one whose event loop stands still for so long is killed and replaced; 0: never,
    #: as for a debugger. Time in which their parent did not run either does not count.
    hung_after_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30.0
    #: Gateways on all machines, each with all of its processes counted as one here, among which the limits of
    #: keys are divided as long as Redis was never reached; it knows better.
    limit_sharers: Annotated[int, Field(ge=1)] = 1
    #: Set by a parent process for its children: end when the parent is gone.
    supervised: bool = False

    #: `host:port` of the routers' frame streams, `a:1,b:2`; `unix:/path` where they run on this machine.
    router_addresses: CommaSeparated = ()
    #: The same for one router.
    router_address: str = ""
    registry_url: str = "http://127.0.0.1:8030"
    analytics_url: str = "http://127.0.0.1:8040"
    drift_url: str = "http://127.0.0.1:8050"

    max_body_bytes: Annotated[int, Field(gt=0)] = 32 << 20
    #: The same for JSON that was sent compressed, unpacked.
    max_unpacked_json_bytes: Annotated[int, Field(gt=0)] = 8 << 20
    #: Bodies that have not arrived completely, of all clients together.
    max_held_bytes: Annotated[int, Field(gt=0)] = 256 << 20
    #: HTTP connections; clients beyond are answered 503.
    max_connections: Annotated[int, Field(gt=0)] = 10_000
    #: Above this delay between the processes (model and queue left out) requests are refused with 503 before
    #: all of them wait; milliseconds, 0: never.
    max_platform_delay_ms: Annotated[float, Field(ge=0)] = 500.0
    default_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    max_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    #: Hot routes before ASGI; off, the same answers come through ASGI.
    hot_routes: bool = True
    #: Take tensors from, and put them into, shared memory of this machine, where workers run as well (and are
    #: told the same). Any key that may predict can then name any object there whose name begins with the
    #: prefix and that this process may open.
    shared_memory: bool = False
    shared_memory_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]*$")] = ""
    #: How long the gateway goes on answering, with `Connection: close`, after it said that it is not ready.
    drain_notice_s: Annotated[float, Field(ge=0)] = 1.0
    #: How long the first start waits for the control topics before it serves what it has.
    control_wait_s: Annotated[float, Field(gt=0)] = 10.0
    #: Several gateways on one port, where the kernel spreads the connections: side by side, or one that takes
    #: over from another.
    reuse_port: bool = False

    #: Batch jobs need a database and the artifact store; without them the gateway serves and takes none.
    database_url: Annotated[str, Field(repr=False, pattern=r"^(postgres(ql)?://|$)")] = ""
    artifact_store_url: Annotated[str, Field(pattern=r"^(file:///|s3://|$)")] = ""
    #: Where inputs of jobs may lie: prefixes such as `file:///srv/data/` or `s3://bucket/inputs/`. Workers
    #: are told the same.
    batch_input_allow: CommaSeparated = ("store://files/",)
    #: Partitions of a pool's chunks: how many workers can share them.
    batch_partitions: Annotated[int, Field(gt=0, le=1024)] = 8
    #: Largest file that a key may upload as data of a job; files of OpenAI batches have 200 MB.
    max_file_bytes: Annotated[int, Field(gt=0)] = 8 << 30
    batch_max_jobs_per_key: Annotated[int, Field(gt=0)] = 1000
    #: How long jobs and their results are kept after their end.
    batch_retention_s: Annotated[float, Field(gt=0, le=36_500 * 24 * 3600)] = 30 * 24 * 3600.0
    #: Hosts that callbacks may go to, wherever they lie; `public` stands for every public address.
    callback_allow: CommaSeparated = ("public",)
    #: Signs callbacks; without it jobs with a callback are refused.
    callback_secret: Annotated[str, Field(repr=False)] = ""
    #: Copies of the topics that jobs make.
    kafka_replication: Annotated[int, Field(gt=0)] = 1

    @model_validator(mode="after")
    def _some_router(self) -> Settings:
        if not self.routers:
            raise ValueError("set ROUTER_ADDRESSES or ROUTER_ADDRESS")
        return self

    @property
    def routers(self) -> tuple[str, ...]:
        """Addresses of all routers."""
        return self.router_addresses or ((self.router_address,) if self.router_address else ())
