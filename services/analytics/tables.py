"""Tables of the schema `analytics`. `migrations/` creates them; nothing else does."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Boolean, DateTime, Float, Identity, Integer, LargeBinary, Text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from services.common.db import ClaimRow


class TableBase(DeclarativeBase):
    """Common metadata."""


class Claims(ClaimRow, TableBase):
    """Records of inference.predictions.v1 that were taken in."""


class InboxRow(TableBase):
    """Records of one version that are not in Parquet yet, as they came, joined by `chunks.pack`; `core` are
    the same without the tensors that no statistic needs. `request_ids` are 16 bytes each."""

    __tablename__ = "inbox"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    model: Mapped[str] = mapped_column(Text)
    version: Mapped[str] = mapped_column(Text)
    records: Mapped[int] = mapped_column(Integer)
    rows: Mapped[int] = mapped_column(Integer)
    received_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    request_ids: Mapped[bytes] = mapped_column(LargeBinary)
    value: Mapped[bytes] = mapped_column(LargeBinary)
    core: Mapped[bytes | None] = mapped_column(LargeBinary)


class WrittenRow(TableBase):
    """An object that is being written and is named by no segment yet: noted before, so that what a crash
    leaves behind is found. One that was given up is never named any more."""

    __tablename__ = "written"

    object: Mapped[str] = mapped_column(Text, primary_key=True)
    since: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    given_up: Mapped[bool] = mapped_column(Boolean, default=False)


class LeaseRow(TableBase):
    """What only one replica does at a time, and which one until when."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(Text, primary_key=True)
    holder: Mapped[bytes] = mapped_column(LargeBinary)
    until: Mapped[datetime] = mapped_column(DateTime(timezone=True))


class SegmentRow(TableBase):
    """A Parquet object. Only objects named here count; one with `dropped_at` was joined into
    another, or is too old."""

    __tablename__ = "segments"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    object: Mapped[str] = mapped_column(Text, unique=True)
    model: Mapped[str] = mapped_column(Text)
    version: Mapped[str] = mapped_column(Text)
    layout: Mapped[str] = mapped_column(Text)
    rows: Mapped[int] = mapped_column(BigInteger)
    size: Mapped[int] = mapped_column(BigInteger)
    first_id: Mapped[bytes] = mapped_column(LargeBinary)
    last_id: Mapped[bytes] = mapped_column(LargeBinary)
    first_at_us: Mapped[int] = mapped_column(BigInteger)
    last_at_us: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    dropped_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))


class SignatureRow(TableBase):
    """What a version answers with, a `headrace.v1.Signature`."""

    __tablename__ = "signatures"

    model: Mapped[str] = mapped_column(Text, primary_key=True)
    version: Mapped[str] = mapped_column(Text, primary_key=True)
    signature: Mapped[bytes] = mapped_column(LargeBinary)


class ShadowRow(TableBase):
    """What a version's answers and its shadow's came to in one hour: `ShadowTotals.to_json`."""

    __tablename__ = "shadows"

    model: Mapped[str] = mapped_column(Text, primary_key=True)
    version: Mapped[str] = mapped_column(Text, primary_key=True)
    shadow_version: Mapped[str] = mapped_column(Text, primary_key=True)
    hour: Mapped[datetime] = mapped_column(DateTime(timezone=True), primary_key=True)
    totals: Mapped[dict[str, Any]] = mapped_column(JSONB)


class OutcomeRow(TableBase):
    """One outcome. `number` or `text` is set."""

    __tablename__ = "outcomes"

    event_id: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)
    request_id: Mapped[bytes] = mapped_column(LargeBinary, index=True)
    model: Mapped[str] = mapped_column(Text)
    metric: Mapped[str] = mapped_column(Text)
    number: Mapped[float | None] = mapped_column(Float)
    text: Mapped[str | None] = mapped_column(Text)
    row: Mapped[int] = mapped_column(BigInteger)
    observed_at_us: Mapped[int] = mapped_column(BigInteger)
    received_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))


class MaximumRow(TableBase):
    """The largest log e-values ever seen of one statement of a trial; the split's has metric and arm
    empty."""

    __tablename__ = "trial_maxima"

    trial_id: Mapped[str] = mapped_column(Text, primary_key=True)
    metric: Mapped[str] = mapped_column(Text, primary_key=True)
    arm: Mapped[str] = mapped_column(Text, primary_key=True)
    log_e_harm: Mapped[float] = mapped_column(Float)
    log_e_safe: Mapped[float] = mapped_column(Float)
    log_e_better: Mapped[float] = mapped_column(Float)


class PlaceboRow(TableBase):
    """The A/A halves of one trial's control (trial id empty: of the version that serves): which of the
    `salts` ever crossed the bound that decides, and a naive one, at any of the looks."""

    __tablename__ = "placebos"

    model: Mapped[str] = mapped_column(Text, primary_key=True)
    trial_id: Mapped[str] = mapped_column(Text, primary_key=True)
    looks: Mapped[int] = mapped_column(BigInteger)
    units: Mapped[int] = mapped_column(BigInteger)
    crossed: Mapped[list[int]] = mapped_column(JSONB)
    naive: Mapped[list[int]] = mapped_column(JSONB)
    salts: Mapped[int] = mapped_column(Integer)
    looked_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
