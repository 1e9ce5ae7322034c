"""What callers get over REST, made from the same messages that gRPC sends."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

from headrace.v1 import control_pb2, events_pb2, registry_pb2, tensor_pb2
from pydantic import BaseModel

from services.registry.deployments import Revision


class OpenAIModel(BaseModel):
    """A model as clients of OpenAI know it; `created` in seconds since 1970."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "headrace"


class ModelView(OpenAIModel):
    name: str
    description: str
    tags: dict[str, str]
    aliases: dict[str, str]
    created_at: datetime

    @classmethod
    def of(cls, message: registry_pb2.Model) -> ModelView:
        return cls(
            id=message.name,
            created=message.created_at_us // 1_000_000,
            name=message.name,
            description=message.description,
            tags=dict(message.tags),
            aliases=dict(message.aliases),
            created_at=moment(message.created_at_us),
        )


class ModelPage(BaseModel):
    models: list[ModelView]
    #: `after` of the next page; null: this was the last.
    next: str | None
    object: Literal["list"] = "list"
    #: The same once more.
    data: list[OpenAIModel]

    @classmethod
    def of(cls, found: Sequence[registry_pb2.Model], following: str | None) -> ModelPage:
        models = [ModelView.of(model) for model in found]
        listed = [OpenAIModel(id=model.id, created=model.created) for model in models]
        return cls(models=models, next=following, data=listed)


class TensorView(BaseModel):
    name: str
    datatype: str
    shape: list[int]
    columns: list[str]


class SignatureView(BaseModel):
    inputs: list[TensorView]
    outputs: list[TensorView]
    batched: bool
    task: str | None
    prediction_output: str
    probability_output: str
    classes: list[str]

    @classmethod
    def of(cls, message: tensor_pb2.Signature) -> SignatureView:
        return cls(
            inputs=[_tensor(spec) for spec in message.inputs],
            outputs=[_tensor(spec) for spec in message.outputs],
            batched=message.batched,
            task=_name(tensor_pb2.Task.Name(message.task), "TASK_"),
            prediction_output=message.prediction_output,
            probability_output=message.probability_output,
            classes=list(message.classes),
        )


class FileView(BaseModel):
    path: str
    digest: str
    size: int


class LineageView(BaseModel):
    source_uri: str
    git_commit: str
    training_run: str
    training_data_digest: str
    parent: str


class VersionView(BaseModel):
    model: str
    version: str
    backend: str
    artifact_digest: str
    signature: SignatureView
    metrics: dict[str, float]
    lineage: LineageView
    tags: dict[str, str]
    files: list[FileView]
    created_at: datetime

    @classmethod
    def of(cls, message: registry_pb2.ModelVersion) -> VersionView:
        lineage = message.lineage
        return cls(
            model=message.model,
            version=message.version,
            backend=message.backend,
            artifact_digest=message.artifact_digest,
            signature=SignatureView.of(message.signature),
            metrics=dict(message.metrics),
            lineage=LineageView(**{name: getattr(lineage, name) for name in LineageView.model_fields}),
            tags=dict(message.tags),
            files=[FileView(path=f.path, digest=f.digest, size=f.size) for f in message.files],
            created_at=moment(message.created_at_us),
        )


class VersionPage(BaseModel):
    versions: list[VersionView]
    #: `after` of the next page; null: this was the last.
    next: str | None


class ServedView(BaseModel):
    version: str
    #: Percent.
    weight: float
    variant: str
    artifact_digest: str
    artifact_bytes: int
    backend: str
    signature: SignatureView
    #: Only experiments and rollouts need it: it goes with the last of them.
    held: bool


class BucketView(BaseModel):
    first: int
    last: int
    version: str


class BatchingView(BaseModel):
    max_rows: int
    max_delay_us: int
    preferred_rows: list[int]
    max_queue_rows: int
    max_queue_ms: int


class FallbackView(BaseModel):
    version: str
    #: Empty: the default.
    on: list[str]


class CacheView(BaseModel):
    ttl_s: float
    max_entry_bytes: int


class ShadowView(BaseModel):
    version: str
    #: Percent.
    share: float
    tolerance: float
    slice_by: str


class HedgingView(BaseModel):
    quantile: float
    min_delay_ms: int


class DeploymentView(BaseModel):
    model: str
    revision: int
    versions: list[ServedView]
    aliases: dict[str, str]
    buckets: list[BucketView]
    salt: str
    pool: str
    batching: BatchingView
    balancing: str | None
    log_payloads: bool
    default_timeout_ms: int
    fallback: FallbackView | None
    cache: CacheView | None
    shadow: ShadowView | None
    hedging: HedgingView | None
    #: Ids of what runs, in the order in which they are asked.
    experiments: list[str]
    #: Share of the units that no experiment gets, 0 … 1.
    holdout: float
    updated_at: datetime

    @classmethod
    def of(cls, message: registry_pb2.Deployment) -> DeploymentView:
        config = message.config
        batching = config.batching
        return cls(
            model=config.model,
            revision=config.revision,
            versions=[_served(served) for served in config.versions],
            aliases=dict(config.aliases),
            buckets=[BucketView(first=b.first, last=b.last, version=b.version) for b in config.buckets],
            salt=config.salt,
            pool=config.pool,
            batching=BatchingView(
                max_rows=batching.max_rows,
                max_delay_us=batching.max_delay_us,
                preferred_rows=list(batching.preferred_rows),
                max_queue_rows=batching.max_queue_rows,
                max_queue_ms=batching.max_queue_ms,
            ),
            balancing=_name(control_pb2.Balancing.Name(config.balancing), "BALANCING_"),
            log_payloads=config.log_payloads,
            default_timeout_ms=config.default_timeout_ms,
            fallback=_fallback(config),
            cache=_cache(config),
            shadow=_shadow(config),
            hedging=_hedging(config),
            experiments=[experiment.experiment_id for experiment in config.experiments],
            holdout=config.holdout / 10_000,
            updated_at=moment(message.updated_at_us),
        )


class AlertView(BaseModel):
    alert_id: str
    version: str
    feature: str
    detector: str
    value: float
    threshold: float
    severity: str | None
    message: str
    window_start: datetime
    window_end: datetime
    resolved_at: datetime | None

    @classmethod
    def of(cls, message: events_pb2.DriftAlert) -> AlertView:
        return cls(
            alert_id=message.alert_id.hex(),
            version=message.version,
            feature=message.feature,
            detector=message.detector,
            value=message.value,
            threshold=message.threshold,
            severity=_name(events_pb2.DriftAlert.Severity.Name(message.severity), "SEVERITY_"),
            message=message.message,
            window_start=moment(message.window_start_us),
            window_end=moment(message.window_end_us),
            resolved_at=moment(message.resolved_at_us) if message.resolved_at_us else None,
        )


class AlertList(BaseModel):
    alerts: list[AlertView]


class DeploymentPage(BaseModel):
    deployments: list[DeploymentView]
    next: str | None


class RevisionView(BaseModel):
    """One entry of a deployment's history. `deployment` null: undeployed."""

    revision: int
    #: deploy, alias, experiment, rollout, holdout, undeploy or republish.
    reason: str
    at: datetime
    deployment: DeploymentView | None

    @classmethod
    def of(cls, entry: Revision) -> RevisionView:
        deployment = None if entry.deployment is None else DeploymentView.of(entry.deployment)
        return cls(revision=entry.revision, reason=entry.reason, at=entry.at, deployment=deployment)


class RevisionPage(BaseModel):
    revisions: list[RevisionView]
    #: `before` of the next page; null: this was the last.
    next: int | None


class KeyView(BaseModel):
    key_id: str
    name: str
    scopes: list[str]
    rate_per_second: float
    burst: int
    models: list[str]
    expires_at: datetime | None
    revoked: bool
    created_at: datetime


class NewKeyView(KeyView):
    """The only answer that ever carries the key."""

    key: str


class KeyPage(BaseModel):
    keys: list[KeyView]
    next: str | None


def moment(unix_us: int) -> datetime:
    """Microseconds since the Unix epoch as an aware UTC datetime."""
    return datetime.fromtimestamp(unix_us / 1e6, UTC)


def _tensor(spec: tensor_pb2.TensorSpec) -> TensorView:
    return TensorView(
        name=spec.name,
        datatype=tensor_pb2.DataType.Name(spec.datatype).removeprefix("DATA_TYPE_"),
        shape=list(spec.shape),
        columns=list(spec.columns),
    )


def _served(served: control_pb2.ServedVersion) -> ServedView:
    return ServedView(
        version=served.version,
        weight=served.weight / 100,
        variant=served.variant,
        artifact_digest=served.artifact_digest,
        artifact_bytes=served.artifact_bytes,
        backend=served.backend,
        signature=SignatureView.of(served.signature),
        held=served.held,
    )


def _fallback(config: control_pb2.ServingConfig) -> FallbackView | None:
    if not config.HasField("fallback"):
        return None
    codes = [tensor_pb2.Code.Name(code).removeprefix("CODE_") for code in config.fallback.on]
    return FallbackView(version=config.fallback.version, on=codes)


def _cache(config: control_pb2.ServingConfig) -> CacheView | None:
    if not config.HasField("cache"):
        return None
    return CacheView(ttl_s=config.cache.ttl_ms / 1000, max_entry_bytes=config.cache.max_entry_bytes)


def _hedging(config: control_pb2.ServingConfig) -> HedgingView | None:
    if not config.HasField("hedging"):
        return None
    return HedgingView(quantile=config.hedging.quantile, min_delay_ms=config.hedging.min_delay_ms)


def _shadow(config: control_pb2.ServingConfig) -> ShadowView | None:
    if not config.HasField("shadow"):
        return None
    shadow = config.shadow
    return ShadowView(
        version=shadow.version,
        share=shadow.share / 100,
        tolerance=shadow.tolerance,
        slice_by=shadow.slice_by,
    )


def _name(enumerator: str, prefix: str) -> str | None:
    name = enumerator.removeprefix(prefix).lower()
    return None if name == "unspecified" else name
