"""Tables of the schema `registry`. `migrations/` creates them; nothing else does."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, DateTime, ForeignKey, ForeignKeyConstraint, Identity, LargeBinary, Text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from services.common.db import OutboxRow


class Tables(DeclarativeBase):
    """Every table of the registry."""

    type_annotation_map = {  # noqa: RUF012 - read by the declarative scan, never changed
        str: Text,
        int: BigInteger,
        bytes: LargeBinary,
        datetime: DateTime(timezone=True),
        dict[str, Any]: JSONB,
        list[Any]: JSONB,
    }


class ModelRow(Tables):
    __tablename__ = "models"

    name: Mapped[str] = mapped_column(primary_key=True)
    description: Mapped[str]
    tags: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]
    #: Share of the units that no experiment gets, in 1/10,000.
    holdout: Mapped[int] = mapped_column(server_default="0")


class VersionRow(Tables):
    """Never updated but for `deleted_at`."""

    __tablename__ = "versions"

    model: Mapped[str] = mapped_column(ForeignKey("models.name", ondelete="CASCADE"), primary_key=True)
    version: Mapped[str] = mapped_column(primary_key=True)
    backend: Mapped[str]
    artifact_digest: Mapped[str]
    artifact_bytes: Mapped[int]
    #: Serialized headrace.v1.Signature.
    signature: Mapped[bytes]
    #: [{"path", "digest", "size"}], sorted by path, as in the manifest.
    files: Mapped[list[Any]]
    metrics: Mapped[dict[str, Any]]
    lineage: Mapped[dict[str, Any]]
    tags: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]
    deleted_at: Mapped[datetime | None]


class VersionNameRow(Tables):
    """A name that a version has or had. Outlives version and model: what was counted under one (model,
    version) must never be added to by another artifact."""

    __tablename__ = "version_names"

    model: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[str] = mapped_column(primary_key=True)


class AliasRow(Tables):
    __tablename__ = "aliases"
    __table_args__ = (ForeignKeyConstraint(["model", "version"], ["versions.model", "versions.version"]),)

    model: Mapped[str] = mapped_column(primary_key=True)
    alias: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[str]
    updated_at: Mapped[datetime]


class RevisionRow(Tables):
    """The last revision a model's deployment had. Outlives deployment and model: none comes twice."""

    __tablename__ = "revisions"

    model: Mapped[str] = mapped_column(primary_key=True)
    revision: Mapped[int]


class DeploymentRow(Tables):
    __tablename__ = "deployments"

    model: Mapped[str] = mapped_column(ForeignKey("models.name"), primary_key=True)
    revision: Mapped[int]
    #: Serialized headrace.v1.ServingConfig, byte for byte what the topic carries.
    config: Mapped[bytes]
    updated_at: Mapped[datetime]


class HistoryRow(Tables):
    """Every revision a deployment had, save for old ones that experiments made; `config` null: undeployed."""

    __tablename__ = "deployment_history"

    model: Mapped[str] = mapped_column(primary_key=True)
    revision: Mapped[int] = mapped_column(primary_key=True)
    reason: Mapped[str]
    config: Mapped[bytes | None]
    created_at: Mapped[datetime]


class KeyRow(Tables):
    __tablename__ = "api_keys"

    key_id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    key_sha256: Mapped[bytes] = mapped_column(unique=True)
    scopes: Mapped[list[Any]]
    rate_per_second: Mapped[float]
    burst: Mapped[int]
    models: Mapped[list[Any]]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    revision: Mapped[int]
    created_at: Mapped[datetime]


class AlertRow(Tables):
    """A drift alert. It may be about a model that is not here any more."""

    __tablename__ = "alerts"

    alert_id: Mapped[bytes] = mapped_column(primary_key=True)
    model: Mapped[str]
    #: Serialized headrace.v1.DriftAlert.
    alert: Mapped[bytes]
    received_at: Mapped[datetime]


class ExperimentRow(Tables):
    """An experiment as it is asked for (`spec`) and as it stands."""

    __tablename__ = "experiments"

    experiment_id: Mapped[str] = mapped_column(primary_key=True)
    model: Mapped[str] = mapped_column(ForeignKey("models.name", ondelete="CASCADE"))
    #: draft, scheduled, running or stopped.
    status: Mapped[str]
    #: Grows with every change; the revision of its Trial.
    revision: Mapped[int]
    #: `experiment_schemas.ExperimentIn`.
    spec: Mapped[dict[str, Any]]
    #: [[first, last], …]: the buckets of the model's layer it owns while it runs, and owned when it stopped.
    layer: Mapped[list[Any]]
    #: [[first, last, index of the variant], …], 0 … 9999 once.
    buckets: Mapped[list[Any]]
    #: Why a scheduled one that is due does not run yet; empty: nothing is in its way.
    waiting_for: Mapped[str]
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    #: When its weights changed last.
    weighted_at: Mapped[datetime | None]
    stopped_at: Mapped[datetime | None]
    stopped_because: Mapped[str]
    #: No verdict is computed any more.
    closed_at: Mapped[datetime | None]


class ExperimentEventRow(Tables):
    """What happened to an experiment, when and why. Never changed; of a bandit's changes the newest stay."""

    __tablename__ = "experiment_events"

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    experiment_id: Mapped[str] = mapped_column(ForeignKey("experiments.experiment_id", ondelete="CASCADE"))
    at: Mapped[datetime]
    kind: Mapped[str]
    reason: Mapped[str]
    detail: Mapped[dict[str, Any]]


class VerdictRow(Tables):
    """The newest verdict on a trial."""

    __tablename__ = "verdicts"

    trial_id: Mapped[str] = mapped_column(primary_key=True)
    #: Serialized headrace.v1.Verdict.
    verdict: Mapped[bytes]
    computed_at: Mapped[datetime]
    received_at: Mapped[datetime]


class RolloutRow(Tables):
    """A rollout as it is asked for (`spec`) and as it stands. Changed under the model's lock only."""

    __tablename__ = "rollouts"

    rollout_id: Mapped[str] = mapped_column(primary_key=True)
    #: No foreign key: what happened outlives the model.
    model: Mapped[str]
    version: Mapped[str]
    previous_version: Mapped[str]
    #: `rollout_plan.Status`.
    status: Mapped[str]
    #: Index in the plan. `entered_at` null: its first step waits for workers.
    step: Mapped[int]
    entered_at: Mapped[datetime | None]
    #: What the step's durations count from.
    clock_at: Mapped[datetime | None]
    #: Since when all decisions were to wait for workers.
    waiting_since: Mapped[datetime | None]
    paused_at: Mapped[datetime | None]
    #: A person said that this step has taken long enough.
    promoted: Mapped[bool]
    #: Of its Trial: the revision of the deployment that put these weights in force.
    revision: Mapped[int]
    #: `rollout_schemas.RolloutIn`.
    spec: Mapped[dict[str, Any]]
    #: Serialized headrace.v1.ServingConfig, as it was before.
    before: Mapped[bytes]
    #: The last decision, to tell when it changes, and its words.
    decided: Mapped[str]
    reason: Mapped[str]
    started_at: Mapped[datetime]
    #: When the present shadow step began; null in the others.
    shadow_since: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    #: No verdict is computed any more.
    closed_at: Mapped[datetime | None]


class RolloutEventRow(Tables):
    """A decision in a rollout, with what it rests on. Never changed."""

    __tablename__ = "rollout_events"

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    rollout_id: Mapped[str] = mapped_column(ForeignKey("rollouts.rollout_id", ondelete="CASCADE"))
    at: Mapped[datetime]
    action: Mapped[str]
    cause: Mapped[str]
    status: Mapped[str]
    step: Mapped[int]
    #: Of the new version, in 1/10,000.
    weight: Mapped[int]
    reason: Mapped[str]
    evidence: Mapped[list[Any]]


class ControlOutbox(OutboxRow, Tables):
    """Records for the control topics, committed with the state they tell of, published afterwards."""
