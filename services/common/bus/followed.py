"""A compacted control topic followed into a working form, with its snapshot on disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import structlog

from services.common.bus.port import Bus, Table
from services.common.bus.snapshot import load_snapshot, save_snapshot
from services.common.errors import Unavailable
from services.common.topics import Topic

log = structlog.get_logger(__name__)

#: Takes a record; False where it is older than what is known.
Apply = Callable[[bytes, bytes | None], bool]

_SAVE_AFTER_S = 1.0
_READ_WAIT_S = 60.0


@asynccontextmanager
async def followed(bus: Bus, topic: Topic, apply: Apply, path: Path) -> AsyncIterator[Table]:
    """Give `apply` the snapshot's records at once, then everything the topic says, while the block runs.
    Changes are saved together, a second after the first of them, and at the end.

    Once the topic was read completely, what only the snapshot knew is forgotten; unless the topic knew
    nothing at all, for then the broker lost it, and the registry will say it again."""
    records = await asyncio.to_thread(load_snapshot, path)
    for key, value in records.items():
        _applied(apply, topic, key, value)
    known = _Known(records, apply, path)
    tasks = {asyncio.create_task(known.saving(), name=f"snapshot:{topic.name}")}
    try:
        async with bus.table(topic, known.take) as table:
            tasks.add(asyncio.create_task(known.confirming(table, topic), name=f"confirm:{topic.name}"))
            yield table
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await known.save()


class _Known:
    """The records as the snapshot will hold them."""

    def __init__(self, records: dict[bytes, bytes], apply: Apply, path: Path) -> None:
        self._records = records
        self._apply = apply
        self._path = path
        self._changed = asyncio.Event()
        self._unconfirmed = set(records)
        self._told = False

    def take(self, key: bytes, value: bytes | None) -> None:
        """One record of the topic; what is older or refused is not kept."""
        self._told = True
        self._unconfirmed.discard(key)
        if not self._apply(key, value):
            return
        if value is None:
            self._records.pop(key, None)
        else:
            self._records[key] = value
        self._changed.set()

    async def confirming(self, table: Table, topic: Topic) -> None:
        """Wait until the topic was read, and forget what it does not hold."""
        while not table.caught_up:
            with suppress(Unavailable):
                await table.ready(_READ_WAIT_S)
        if self._told and self._unconfirmed:
            log.info("snapshot_records_forgotten", topic=topic.name, count=len(self._unconfirmed))
            for key in list(self._unconfirmed):
                self.take(key, None)

    async def saving(self) -> None:
        """Save changes as they come, for ever."""
        while True:
            await self._changed.wait()
            await asyncio.sleep(_SAVE_AFTER_S)
            await self.save()

    async def save(self) -> None:
        """Save what has changed."""
        if self._changed.is_set():
            self._changed.clear()
            await _save(self._path, dict(self._records))


def _applied(apply: Apply, topic: Topic, key: bytes, value: bytes) -> None:
    try:
        apply(key, value)
    except Exception as error:
        log.warning(
            "snapshot_record_ignored", topic=topic.name, key=key.decode("utf-8", "replace"), error=str(error)
        )


async def _save(path: Path, records: dict[bytes, bytes]) -> None:
    try:
        await asyncio.to_thread(save_snapshot, path, records)
    except OSError as error:
        log.warning("snapshot_not_saved", path=str(path), error=str(error))
