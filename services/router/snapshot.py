"""The routing table and the workers on disk, so that a router that starts without Kafka serves what the one
before it served."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import structlog

log = structlog.get_logger(__name__)

Records = dict[str, bytes]
Apply = Callable[[bytes, bytes | None], None]

_FORMAT: Final = 1
#: Changes of this long are written at once, seconds.
_SETTLE_S: Final = 0.5
#: Records that are restored without a pause for whatever else the event loop has to do.
_AT_ONCE: Final = 20


class Snapshot:
    """One file, replaced as a whole. `changed` is cheap; writing happens in a thread of `run`."""

    def __init__(self, path: Path, parts: dict[str, Callable[[], Records]]) -> None:
        """`parts` give the records of each part by key."""
        self._path = path
        self._parts = parts
        self._dirty = asyncio.Event()

    async def restore(self, apply: dict[str, Apply]) -> bool:
        """Hand the file's records to the parts; whether there was a file that could be read."""
        try:
            held = await asyncio.to_thread(_read, self._path)
        except FileNotFoundError:
            return False
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.warning("snapshot_unreadable", path=str(self._path), reason=str(error))
            return False
        for part, take in apply.items():
            for number, (key, value) in enumerate(held.get(part, {}).items()):
                if number % _AT_ONCE == 0:
                    await asyncio.sleep(0)
                try:
                    take(key.encode(), value)
                except Exception:
                    log.warning("snapshot_record_skipped", part=part, key=key, exc_info=True)
        return True

    def changed(self) -> None:
        """Write soon."""
        self._dirty.set()

    async def run(self) -> None:
        """Write after changes, until cancelled; then once more where something is unwritten."""
        try:
            while True:
                await self._dirty.wait()
                await asyncio.sleep(_SETTLE_S)
                await self._write()
        except asyncio.CancelledError:
            if self._dirty.is_set():
                await self._write()
            raise

    async def _write(self) -> None:
        self._dirty.clear()
        held = {part: records() for part, records in self._parts.items()}
        writing = asyncio.create_task(asyncio.to_thread(_write, self._path, held))
        try:
            await asyncio.wait({writing})
        finally:  # cancelled or not: whoever ends this is to find the file, and no second thread writes to it
            await asyncio.wait({writing})
        try:
            writing.result()
        except OSError as error:
            log.warning("snapshot_not_written", path=str(self._path), reason=str(error))


def _read(path: Path) -> dict[str, Records]:
    document = json.loads(path.read_bytes())
    if document["format"] != _FORMAT:
        raise ValueError(f"format {document['format']!r} is not {_FORMAT}")
    return {
        part: {key: base64.b64decode(value, validate=True) for key, value in records.items()}
        for part, records in document["parts"].items()
    }


def _write(path: Path, held: dict[str, Records]) -> None:
    document = {
        "format": _FORMAT,
        "parts": {
            part: {key: base64.b64encode(value).decode() for key, value in records.items()}
            for part, records in held.items()
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    try:
        with fresh.open("wb") as file:
            file.write(json.dumps(document).encode())
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        with suppress(OSError):
            fresh.unlink()
