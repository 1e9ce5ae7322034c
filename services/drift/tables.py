"""Tables of the schema `drift`. `migrations/` creates them; nothing else does."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ARRAY, BigInteger, DateTime, Identity, LargeBinary, Text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from services.common.db import ClaimRow, OutboxRow


class Tables(DeclarativeBase):
    """Every table of the drift service."""

    type_annotation_map = {  # noqa: RUF012 - read by the declarative scan, never changed
        str: Text,
        int: BigInteger,
        bytes: LargeBinary,
        datetime: DateTime(timezone=True),
        dict[str, Any]: JSONB,
        list[Any]: JSONB,
    }


class StreamRow(Tables):
    """One model version: its reference and what it learns of it as `Sample.to_bytes` writes them, panes as
    `Draw.to_bytes` does."""

    __tablename__ = "streams"

    model: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[str] = mapped_column(primary_key=True)
    #: None while the stream still teaches it.
    reference: Mapped[bytes | None]
    #: "stream" (the first predictions) or "upload".
    reference_source: Mapped[str]
    reference_at: Mapped[datetime | None]
    learning: Mapped[bytes]
    pane: Mapped[bytes]
    #: Closed panes, oldest first.
    panes: Mapped[list[bytes]] = mapped_column(ARRAY(LargeBinary))
    updated_at: Mapped[datetime]


class SignatureRow(Tables):
    """The signature of every version that was ever served: its records may come when it no longer is."""

    __tablename__ = "signatures"

    model: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[str] = mapped_column(primary_key=True)
    #: Serialized headrace.v1.Signature.
    signature: Mapped[bytes]


class WindowRow(Tables):
    """One comparison, with what every detector said of every feature."""

    __tablename__ = "windows"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    model: Mapped[str]
    version: Mapped[str]
    start_us: Mapped[int]
    end_us: Mapped[int]
    rows: Mapped[int]
    #: Those of them that the reports are about; None: all (an older release beside this one wrote it).
    sampled_rows: Mapped[int | None]
    reference_rows: Mapped[int]
    severity: Mapped[int]
    features: Mapped[list[Any]]
    created_at: Mapped[datetime]

    @property
    def rows_seen(self) -> int:
        """How many rows the reports are about."""
        return self.rows if self.sampled_rows is None else self.sampled_rows


class SignalRow(Tables):
    """What is remembered of one detector on one feature between windows."""

    __tablename__ = "signals"

    model: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[str] = mapped_column(primary_key=True)
    feature: Mapped[str] = mapped_column(primary_key=True)
    detector: Mapped[str] = mapped_column(primary_key=True)
    streak: Mapped[int]
    calm: Mapped[int]
    alerted: Mapped[int]
    alert_id: Mapped[bytes | None]


class AlertRow(Tables):
    """A finding that persisted. It ends when the feature has been calm for long enough."""

    __tablename__ = "alerts"

    alert_id: Mapped[bytes] = mapped_column(primary_key=True)
    model: Mapped[str]
    version: Mapped[str]
    feature: Mapped[str]
    detector: Mapped[str]
    severity: Mapped[int]
    value: Mapped[float]
    threshold: Mapped[float]
    critical_value: Mapped[float]
    p_value: Mapped[float]
    window_start_us: Mapped[int]
    window_end_us: Mapped[int]
    window_rows: Mapped[int]
    #: As in the window.
    window_sampled_rows: Mapped[int | None]
    reference_rows: Mapped[int]
    message: Mapped[str]
    opened_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    acknowledged_at: Mapped[datetime | None]
    resolved_at: Mapped[datetime | None]

    @property
    def rows_seen(self) -> int:
        """How many rows of its window it is about."""
        return self.window_rows if self.window_sampled_rows is None else self.window_sampled_rows


class Claims(ClaimRow, Tables):
    """Records already counted; a redelivered one is left out."""


class WebhookRow(Tables):
    """Where alerts are posted; `model` None means those of every model."""

    __tablename__ = "webhooks"

    webhook_id: Mapped[bytes] = mapped_column(primary_key=True)
    url: Mapped[str]
    model: Mapped[str | None]
    created_at: Mapped[datetime]


class DeliveryRow(Tables):
    """One alert on its way to one webhook."""

    __tablename__ = "deliveries"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    webhook_id: Mapped[bytes]
    body: Mapped[dict[str, Any]]
    attempts: Mapped[int]
    next_at: Mapped[datetime]
    delivered_at: Mapped[datetime | None]
    error: Mapped[str | None]


class Outbox(OutboxRow, Tables):
    """Alerts on their way to drift.alerts.v1."""
