"""A compacted control topic followed into a working form, with its snapshot on disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import structlog

from services.common.bus import Bus, Table
from services.common.errors import Unavailable
from services.common.topics import Topic
from services.gateway.snapshot import load_snapshot, save_snapshot

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
    changed = asyncio.Event()
    unconfirmed, empty = set(records), True

    def take(key: bytes, value: bytes | None) -> None:
        nonlocal empty
        empty = False
        unconfirmed.discard(key)
        if not apply(key, value):  # nor is what it raises on saved
            return
        if value is None:
            records.pop(key, None)
        else:
            records[key] = value
        changed.set()

    async def saving() -> None:
        while True:
            await changed.wait()
            await asyncio.sleep(_SAVE_AFTER_S)
            changed.clear()
            await _save(path, dict(records))

    async def confirming(table: Table) -> None:
        while not table.caught_up:
            with suppress(Unavailable):
                await table.ready(_READ_WAIT_S)
        if empty or not unconfirmed:
            return
        log.info("snapshot_records_forgotten", topic=topic.name, count=len(unconfirmed))
        for key in list(unconfirmed):
            take(key, None)

    tasks = {asyncio.create_task(saving(), name=f"snapshot:{topic.name}")}
    try:
        async with bus.table(topic, take) as table:
            tasks.add(asyncio.create_task(confirming(table), name=f"confirm:{topic.name}"))
            yield table
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        if changed.is_set():
            await _save(path, dict(records))


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
