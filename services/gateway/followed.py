"""A compacted control topic followed into a working form, with its snapshot on disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import structlog

from services.common.bus import Bus, Table
from services.common.topics import Topic
from services.gateway.snapshot import load_snapshot, save_snapshot

log = structlog.get_logger(__name__)

Apply = Callable[[bytes, bytes | None], None]

_SAVE_AFTER_S = 1.0


@asynccontextmanager
async def followed(bus: Bus, topic: Topic, apply: Apply, path: Path) -> AsyncIterator[Table]:
    """Give `apply` the snapshot's records at once, then everything the topic says, while the block runs.
    Changes are saved together, a second after the first of them, and at the end."""
    records = await asyncio.to_thread(load_snapshot, path)
    for key, value in records.items():
        _applied(apply, topic, key, value)
    changed = asyncio.Event()

    def take(key: bytes, value: bytes | None) -> None:
        apply(key, value)  # what it refuses is not saved either
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

    task = asyncio.create_task(saving(), name=f"snapshot:{topic.name}")
    try:
        async with bus.table(topic, take) as table:
            yield table
    finally:
        task.cancel()
        await asyncio.wait({task})
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
