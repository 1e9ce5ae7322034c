"""What a worker of one pool should serve, by the deployments it has read. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from google.protobuf.message import DecodeError
from headrace.v1.control_pb2 import ServedVersion, ServingConfig

from services.common.errors import InvalidArgument
from services.worker.batch_queue import BatchPolicy
from services.worker.prediction_log import PayloadPolicy
from services.worker.serving import ServingPolicy
from services.worker.settings import Settings


@dataclass(frozen=True, slots=True)
class VersionKey:
    """What is loaded: never changes while it is loaded."""

    model: str
    version: str
    artifact_digest: str


@dataclass(frozen=True, slots=True)
class Desired:
    """A version that should be served, and how. `carries`: requests come to it that name no version, by its
    share of the traffic or by an experiment; or they are about to, since a rollout waits for it."""

    key: VersionKey
    served: ServedVersion
    policy: ServingPolicy
    carries: bool


@dataclass(frozen=True, slots=True)
class Defaults:
    """Where the deployment makes no statement. `timeout` is seconds, sizes are rows or bytes."""

    batching: BatchPolicy
    payloads: PayloadPolicy
    timeout: float


class Deployments:
    """The last configuration of every model, as read from control.deployments.v1."""

    def __init__(
        self, pool: str, defaults: Defaults, takes: Callable[[ServedVersion], bool] = lambda _: True
    ) -> None:
        """Versions that `takes` is false of are left to others."""
        self._pool = pool
        self._takes = takes
        self._defaults = defaults
        self._configs: dict[str, ServingConfig] = {}

    def apply(self, key: bytes, value: bytes | None) -> bool:
        """Take one record in; False for an older revision than the one known, which is ignored. Raises
        InvalidArgument for one that cannot be read."""
        model = key.decode(errors="replace")
        if value is None:
            self._configs.pop(model, None)
            return True
        try:
            config = ServingConfig.FromString(value)
        except DecodeError as error:
            raise InvalidArgument(f"the deployment of {model} cannot be read: {error}") from error
        known = self._configs.get(model)
        if known is not None and config.revision < known.revision:
            return False
        self._configs[model] = config
        return True

    def desired_of(self, model: str) -> dict[VersionKey, Desired]:
        """Every version of `model` that this pool should serve."""
        found: dict[VersionKey, Desired] = {}
        config = self._configs.get(model)
        if config is None or (config.pool and config.pool != self._pool):
            return found
        arms = {arm.version for experiment in config.experiments for arm in experiment.variants}
        for served in config.versions:
            if not self._takes(served):
                continue
            key = VersionKey(model, served.version, served.artifact_digest)
            carries = bool(served.weight) or served.held or served.version in arms
            policy = self._policy(config, batched=served.signature.batched)
            found[key] = Desired(key, served, policy, carries)
        return found

    def _policy(self, config: ServingConfig, *, batched: bool) -> ServingPolicy:
        defaults, given = self._defaults, config.batching
        payloads = replace(defaults.payloads, enabled=config.log_payloads)
        max_rows = (given.max_rows or defaults.batching.max_rows) if batched else 1
        batching = BatchPolicy(
            max_rows=max_rows,
            max_delay=given.max_delay_us / 1e6 if batched else 0.0,
            preferred_rows=tuple(sorted(rows for rows in given.preferred_rows if 0 < rows <= max_rows)),
            max_queue_rows=max(given.max_queue_rows or defaults.batching.max_queue_rows, max_rows),
            max_queue_bytes=defaults.batching.max_queue_bytes,
            max_queue=given.max_queue_ms / 1e3 if given.max_queue_ms else defaults.batching.max_queue,
            grows=batched and not (given.max_rows or given.max_delay_us or given.preferred_rows),
        )
        timeout = config.default_timeout_ms / 1e3 if config.default_timeout_ms else defaults.timeout
        return ServingPolicy(batching, payloads, timeout)


def defaults_of(cfg: Settings) -> Defaults:
    """What the worker's environment says where deployments say nothing."""
    batching = BatchPolicy(
        max_rows=cfg.max_rows,
        max_queue_rows=cfg.max_queue_rows,
        max_queue_bytes=cfg.max_queue_bytes,
        max_queue=cfg.max_queue_ms / 1e3,
    )
    payloads = PayloadPolicy(
        small_bytes=cfg.log_small_payload_bytes,
        request_bytes=cfg.log_payload_max_bytes,
        large_bytes_per_s=cfg.log_large_payload_bytes_per_s,
    )
    return Defaults(batching, payloads, cfg.default_timeout_s)
