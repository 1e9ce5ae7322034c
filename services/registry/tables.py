"""Tables of the schema `registry`. `migrations/` creates them; nothing else does."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, DateTime, ForeignKey, ForeignKeyConstraint, LargeBinary, Text
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
    """Every revision a deployment had; `config` null: undeployed."""

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


class ControlOutbox(OutboxRow, Tables):
    """Records for the control topics, committed with the state they tell of, published afterwards."""
