"""The router's environment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from services.common.settings import CommaSeparated, FrameTlsSettings, Port, ServiceSettings
from services.router.outliers import OutlierPolicy


class Settings(ServiceSettings, FrameTlsSettings):
    """What a router reads. Ports: 0 lets the system choose one."""

    #: Stays the same over restarts: the routing table and the prediction log on disk are found by it.
    router_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")] = "router-0"
    #: The name that this router takes turns with where new processes take over from old ones: what is left in
    #: the prediction log under that name is published, too.
    predecessor_id: Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]{0,62})?$")] = ""
    #: Folders in `state_dir` of routers and workers that are not there any more (`worker-worker-1`): what is
    #: left in their prediction logs is published, too.
    adopted_logs: CommaSeparated = ()
    frames_port: Port = 8010
    #: Where gateways of this machine find the frame stream as well (their `unix:/path`); empty: nowhere.
    frames_socket: Path | None = None
    #: By which name a gateway on the same event loop finds it as well (its `local:name`); empty: none does.
    frames_name: str = ""
    grpc_port: Port = 8011
    ops_port: Port = 8012
    #: Another process of ours may listen on the same ports: one that takes over from this one, or did.
    reuse_port: bool = False

    #: Inputs may lie in shared memory of this machine: how large a request is, its message does not say.
    shared_memory: bool = False

    #: Endpoints tried for one request, the first one included.
    max_attempts: Annotated[int, Field(ge=1, le=10)] = 3
    #: Retries at once: this share of the requests in flight, and never fewer than the floor (as in Envoy).
    retry_share: Annotated[float, Field(ge=0, le=1)] = 0.2
    retry_floor: Annotated[int, Field(ge=0)] = 3
    #: How long, and how many requests, may wait for a version that a worker is loading.
    endpoint_wait_s: Annotated[float, Field(ge=0)] = 2.0
    max_waiting: Annotated[int, Field(ge=0)] = 4096
    #: Where neither caller nor deployment makes a statement.
    default_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    #: How long a worker without heartbeats is tried: three of its own intervals, and never less than this.
    worker_expiry_s: Annotated[float, Field(gt=0)] = 3.0
    #: Outlier ejection (outliers.py): errors in a row, 0 switches it off; after how long one ejection is
    #: forgiven; the first ejection and the longest one; the share of a version's workers that may be out.
    outlier_consecutive_errors: Annotated[int, Field(ge=0)] = 5
    outlier_interval_s: Annotated[float, Field(gt=0)] = 10.0
    outlier_ejection_s: Annotated[float, Field(gt=0)] = 30.0
    outlier_ejection_max_s: Annotated[float, Field(gt=0)] = 300.0
    outlier_max_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    #: Copies for shadow versions under way at once; what is above is dropped.
    shadow_limit: Annotated[int, Field(ge=0)] = 256
    #: Redis or Valkey for the result cache, `redis://[:password@]host:port/db`; empty: nothing is cached.
    redis_url: Annotated[str, Field(repr=False, pattern=r"^((rediss?|unix)://.*)?$")] = ""
    #: What a look-up may take; longer is a miss.
    cache_budget_ms: Annotated[float, Field(gt=0, le=1000)] = 5.0
    #: How long the start waits for Kafka before it serves with the routing table on disk.
    table_wait_s: Annotated[float, Field(ge=0)] = 5.0
    #: The prediction log on disk, while Kafka is away.
    log_max_bytes: Annotated[int, Field(ge=1 << 20)] = 256 << 20

    @property
    def directory(self) -> Path:
        """This router's own part of the state directory."""
        return self.state_dir / f"router-{self.router_id}"

    @property
    def left_logs(self) -> list[Path]:
        """Prediction logs of others that this router publishes where nobody has them."""
        turns = [f"router-{self.predecessor_id}"] if self.predecessor_id else []
        return [self.state_dir / folder / "spool" for folder in (*turns, *self.adopted_logs)]

    @property
    def outliers(self) -> OutlierPolicy:
        """When a worker that fails is left out, and for how long."""
        return OutlierPolicy(
            consecutive=self.outlier_consecutive_errors,
            interval_s=self.outlier_interval_s,
            base_s=self.outlier_ejection_s,
            cap_s=self.outlier_ejection_max_s,
            share=self.outlier_max_share,
        )
