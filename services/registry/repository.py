"""Queries of one transaction. No rule of the domain lives here."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import delete, func, select, tuple_
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from services.common.bus import Record
from services.common.topics import Topic
from services.registry.rollout_queries import RolloutQueries
from services.registry.tables import (
    AlertRow,
    AliasRow,
    ControlOutbox,
    DeploymentRow,
    HistoryRow,
    KeyRow,
    ModelRow,
    RevisionRow,
    Tables,
    VersionNameRow,
    VersionRow,
)
from services.registry.trial_queries import TrialQueries

R = TypeVar("R", bound=Tables)


class Repository(TrialQueries, RolloutQueries):
    """The registry's tables as one transaction sees them."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session
        #: What to publish if and only if this transaction commits, in order.
        self.records: list[Record] = []

    def add(self, row: Any) -> None:
        """Insert `row` with the next flush."""
        self._session.add(row)

    async def _get(self, kind: type[R], *key: str, lock: bool = False, skip_locked: bool = False) -> R | None:
        """One row by its primary key. PostgreSQL refuses a NUL in a text, so nothing is stored under one."""
        if any("\0" in part for part in key):
            return None
        locking = {"skip_locked": True} if lock and skip_locked else lock
        return await self._session.get(kind, key, with_for_update=locking)

    async def flush(self) -> None:
        """Send what was added, so that constraints speak up now."""
        await self._session.flush()

    def publish(self, topic: Topic, key: str, value: bytes | None) -> None:
        """Add to `records`."""
        self.records.append(Record(topic.name, key.encode(), value))

    # models

    async def insert_model(self, row: dict[str, Any]) -> bool:
        """False where the name is taken."""
        statement = insert(ModelRow).values(**row).on_conflict_do_nothing().returning(ModelRow.name)
        return (await self._session.execute(statement)).scalar() is not None

    async def model(self, name: str, *, lock: bool = False, skip_locked: bool = False) -> ModelRow | None:
        """With `lock`, whoever else wants to change something of this model waits for this transaction; with
        `skip_locked` too, None where another transaction has it."""
        return await self._get(ModelRow, name, lock=lock, skip_locked=skip_locked)

    async def models(self, after: str, limit: int) -> Sequence[ModelRow]:
        statement = select(ModelRow).where(ModelRow.name > after).order_by(ModelRow.name).limit(limit)
        return (await self._session.scalars(statement)).all()

    async def delete_model(self, name: str) -> None:
        await self._session.execute(delete(ModelRow).where(ModelRow.name == name))

    # versions and aliases

    async def version(self, model: str, version: str) -> VersionRow | None:
        """Deleted ones included."""
        return await self._get(VersionRow, model, version)

    async def versions(self, model: str, names: Sequence[str]) -> Sequence[VersionRow]:
        """Those of `names` that are not deleted, oldest first."""
        statement = select(VersionRow).where(VersionRow.model == model, VersionRow.deleted_at.is_(None))
        statement = statement.where(VersionRow.version.in_(names))
        statement = statement.order_by(VersionRow.created_at, VersionRow.version)
        return (await self._session.scalars(statement)).all()

    async def versions_behind(self, model: str, row: VersionRow | None, limit: int) -> Sequence[VersionRow]:
        """Those not deleted that are younger than `row`, oldest first."""
        age = tuple_(VersionRow.created_at, VersionRow.version)
        statement = select(VersionRow).where(VersionRow.model == model, VersionRow.deleted_at.is_(None))
        if row is not None:
            statement = statement.where(age > tuple_(row.created_at, row.version))
        statement = statement.order_by(VersionRow.created_at, VersionRow.version).limit(limit)
        return (await self._session.scalars(statement)).all()

    async def version_names(self, model: str) -> Sequence[str]:
        """Every name ever given, those of deleted versions and of deleted models included."""
        statement = select(VersionNameRow.version).where(VersionNameRow.model == model)
        return (await self._session.scalars(statement)).all()

    async def take_version_name(self, model: str, version: str) -> bool:
        """False where the name was given before."""
        statement = insert(VersionNameRow).values(model=model, version=version).on_conflict_do_nothing()
        taken = await self._session.execute(statement.returning(VersionNameRow.version))
        return taken.scalar() is not None

    async def aliases(self, *models: str) -> Sequence[AliasRow]:
        statement = select(AliasRow).where(AliasRow.model.in_(models)).order_by(AliasRow.alias)
        return (await self._session.scalars(statement)).all()

    async def alias(self, model: str, alias: str) -> AliasRow | None:
        return await self._get(AliasRow, model, alias)

    async def put_alias(self, model: str, alias: str, version: str, at: datetime) -> None:
        statement = insert(AliasRow).values(model=model, alias=alias, version=version, updated_at=at)
        changed = {"version": version, "updated_at": at}
        await self._session.execute(
            statement.on_conflict_do_update(index_elements=["model", "alias"], set_=changed)
        )

    async def delete_alias(self, model: str, alias: str) -> None:
        await self._session.execute(delete(AliasRow).where(AliasRow.model == model, AliasRow.alias == alias))

    # deployments

    async def deployment(self, model: str) -> DeploymentRow | None:
        """As it is now, also where this transaction changed it: `put_deployment` goes past the session."""
        if "\0" in model:
            return None
        return await self._session.get(DeploymentRow, model, populate_existing=True)

    async def deployments(self, after: str, limit: int) -> Sequence[DeploymentRow]:
        statement = select(DeploymentRow).where(DeploymentRow.model > after)
        statement = statement.order_by(DeploymentRow.model).limit(limit)
        return (await self._session.scalars(statement)).all()

    async def put_deployment(self, model: str, revision: int, config: bytes, at: datetime) -> None:
        values = {"revision": revision, "config": config, "updated_at": at}
        statement = insert(DeploymentRow).values(model=model, **values)
        await self._session.execute(statement.on_conflict_do_update(index_elements=["model"], set_=values))

    async def delete_deployment(self, model: str) -> None:
        await self._session.execute(delete(DeploymentRow).where(DeploymentRow.model == model))

    async def next_revision(self, model: str, above: int = 0) -> int:
        """The revision after the last one and after `above`. Others wait for one until this commits."""
        statement = insert(RevisionRow).values(model=model, revision=above + 1)
        raised = func.greatest(RevisionRow.revision, above) + 1
        statement = statement.on_conflict_do_update(index_elements=["model"], set_={"revision": raised})
        return int((await self._session.execute(statement.returning(RevisionRow.revision))).scalar_one())

    async def deployed_revisions(self) -> dict[str, int]:
        """Model → revision of everything deployed."""
        return await self._revisions(DeploymentRow.model, DeploymentRow.revision)

    async def last_revisions(self) -> dict[str, int]:
        """Model → last revision of everything ever deployed."""
        return await self._revisions(RevisionRow.model, RevisionRow.revision)

    async def history(self, model: str, before: int, limit: int) -> Sequence[HistoryRow]:
        """Revisions below `before`, newest first."""
        statement = select(HistoryRow).where(HistoryRow.model == model, HistoryRow.revision < before)
        statement = statement.order_by(HistoryRow.revision.desc()).limit(limit)
        return (await self._session.scalars(statement)).all()

    async def prune_history(self, model: str, reason: str, below: int) -> None:
        """Delete revisions below `below` that were made for `reason`."""
        old = (HistoryRow.model == model, HistoryRow.revision < below, HistoryRow.reason == reason)
        await self._session.execute(delete(HistoryRow).where(*old))

    # keys

    async def insert_key(self, row: dict[str, Any]) -> None:
        """Nothing happens where the key id is there already."""
        await self._session.execute(
            insert(KeyRow).values(**row).on_conflict_do_nothing(index_elements=["key_id"])
        )

    async def key(self, key_id: str, *, lock: bool = False) -> KeyRow | None:
        return await self._get(KeyRow, key_id, lock=lock)

    async def keys(self, after: str, limit: int) -> Sequence[KeyRow]:
        statement = select(KeyRow).where(KeyRow.key_id > after).order_by(KeyRow.key_id).limit(limit)
        return (await self._session.scalars(statement)).all()

    async def key_revisions(self) -> dict[str, int]:
        """Key id → revision, revoked ones included."""
        return await self._revisions(KeyRow.key_id, KeyRow.revision)

    # alerts

    async def put_alert(self, alert_id: bytes, model: str, alert: bytes, at: datetime) -> None:
        """An alert that is there already keeps its place among the others and says what `alert` says."""
        statement = insert(AlertRow).values(alert_id=alert_id, model=model, alert=alert, received_at=at)
        changed = {"alert": alert}
        await self._session.execute(
            statement.on_conflict_do_update(index_elements=["alert_id"], set_=changed)
        )

    async def prune_alerts(self, model: str, keep: int) -> None:
        """Delete all but the newest `keep` alerts of `model`."""
        old = select(AlertRow.alert_id).where(AlertRow.model == model)
        old = old.order_by(AlertRow.received_at.desc(), AlertRow.alert_id).offset(keep)
        await self._session.execute(delete(AlertRow).where(AlertRow.alert_id.in_(old)))

    async def alerts(self, model: str, limit: int) -> Sequence[AlertRow]:
        """Newest first."""
        statement = select(AlertRow).where(AlertRow.model == model)
        statement = statement.order_by(AlertRow.received_at.desc(), AlertRow.alert_id).limit(limit)
        return (await self._session.scalars(statement)).all()

    # outbox

    async def pending(self, topic: Topic) -> set[str]:
        """Keys of the records of `topic` that are not published yet."""
        rows = await self._session.scalars(select(ControlOutbox.key).where(ControlOutbox.topic == topic.name))
        return {key.decode() for key in rows if key is not None}
