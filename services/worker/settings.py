"""The worker's environment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from services.common.settings import (
    ArtifactSettings,
    CommaSeparated,
    FrameTlsSettings,
    Port,
    ServiceSettings,
)


class Settings(ServiceSettings, ArtifactSettings, FrameTlsSettings):
    """What a worker reads. Ports: 0 lets the system choose one."""

    #: Stays the same over restarts: the prediction log that an earlier process left is found by it.
    worker_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")] = "worker-0"
    #: The name that this worker takes turns with where new processes take over from old ones: what is left in
    #: the prediction log under that name is published, too.
    predecessor_id: Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]{0,62})?$")] = ""
    #: Serves the models that are deployed to this pool.
    pool: str = "default"
    #: Host name under which routers reach this worker; empty: `host`.
    advertise_host: str = ""
    frames_port: Port = 8020
    #: Where routers reach the frame stream instead, if all of them run on this machine; empty: by the port.
    frames_socket: Path | None = None
    #: Read inputs that lie in shared memory of this machine, where gateways and their clients run as well.
    shared_memory: bool = False
    grpc_port: Port = 8021
    ops_port: Port = 8022
    #: Another process of ours may listen on the same ports: one that takes over from this one, or did.
    reuse_port: bool = False

    #: Where the deployment makes no statement: rows per batch, rows and bytes that may wait per version.
    max_rows: Annotated[int, Field(ge=1)] = 64
    max_queue_rows: Annotated[int, Field(ge=1)] = 8192
    #: Who would wait longer for a run than this is refused at once.
    max_queue_ms: Annotated[int, Field(ge=1)] = 1000
    max_queue_bytes: Annotated[int, Field(ge=1 << 20)] = 256 << 20
    default_timeout_s: Annotated[float, Field(gt=0)] = 30.0

    #: Threads that run models, and batches of one version that may run at once in them.
    run_threads: Annotated[int, Field(ge=1)] = 2
    slots: Annotated[int, Field(ge=1)] = 1
    #: Threads of one run.
    backend_threads: Annotated[int, Field(ge=1)] = 1
    #: Batches expected to be faster than this run on the event loop: handing them over would take longer.
    inline_below_us: Annotated[int, Field(ge=0)] = 500
    #: Before the process grows beyond this, idle versions leave memory until they are asked for; 0: no limit.
    memory_limit_bytes: Annotated[int, Field(ge=0)] = 0
    #: A version unused for this long makes room as if it had no share of the traffic.
    evict_idle_s: Annotated[float, Field(ge=0)] = 300.0

    #: The prediction log on disk, while Kafka is away; full: requests are refused.
    log_max_bytes: Annotated[int, Field(ge=1 << 20)] = 1 << 30
    #: Of requests whose inputs are larger (images, many rows), only so many are logged with them as fit into
    #: the rate, for each version; all of them with their outputs. Below it, inputs are always logged.
    log_small_payload_bytes: Annotated[int, Field(ge=0)] = 1 << 12
    log_large_payload_bytes_per_s: Annotated[int, Field(ge=0)] = 4 << 20
    #: Outputs that are larger are not logged.
    log_payload_max_bytes: Annotated[int, Field(ge=0)] = 1 << 16

    #: Prefixes of what batch jobs may read; the gateway's must be the same.
    batch_input_allow: CommaSeparated = ("store://files/",)
    #: Partitions of the pool's chunks: the most workers that can share one pool's jobs.
    batch_partitions: Annotated[int, Field(ge=1)] = 8
    #: How the pool's workers share them. `range` is for brokers that do not carry cooperative rebalances.
    batch_assignment: Literal["cooperative-sticky", "range"] = "cooperative-sticky"
    #: How long a chunk waits for a version that cannot be loaded, or an input that cannot be reached.
    batch_patience_s: Annotated[float, Field(gt=0)] = 300.0
    #: Rows of each chunk that are logged with their tensors; all others are logged without.
    batch_payload_rows: Annotated[int, Field(ge=0)] = 8192

    #: Of a worker that is the guest of another process (`guest.py`): the largest artifact that it takes, how
    #: long one row of a version may run, and by how much all of them may make the process grow.
    guest_artifact_bytes: Annotated[int, Field(ge=0)] = 16 << 20
    guest_row_us: Annotated[int, Field(gt=0)] = 150
    guest_memory_bytes: Annotated[int, Field(ge=0)] = 256 << 20

    heartbeat_s: Annotated[float, Field(gt=0)] = 1.0
    #: How long a version that is no longer deployed goes on answering.
    linger_s: Annotated[float, Field(ge=0)] = 2.0

    @property
    def reached_at(self) -> str:
        """Under which host the others reach this worker."""
        return self.advertise_host or self.host

    @property
    def directory(self) -> Path:
        """This worker's own part of the state directory."""
        return self.state_dir / f"worker-{self.worker_id}"

    @property
    def predecessor(self) -> Path | None:
        """That of the name that this worker takes turns with."""
        return self.state_dir / f"worker-{self.predecessor_id}" if self.predecessor_id else None
