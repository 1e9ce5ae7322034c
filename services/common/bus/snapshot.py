"""The last known records of a compacted topic in one file, so that a service that starts while Kafka is away
serves what it served before."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from pathlib import Path

_MAGIC = b"headrace-table-1\n"


def load_snapshot(path: Path) -> dict[bytes, bytes]:
    """The records of `path`; none where it is missing, cut short or not ours: the topic is read anyway."""
    try:
        content = path.read_bytes()
    except OSError:
        return {}
    head = len(_MAGIC) + 4
    body = content[head:]
    if not content.startswith(_MAGIC) or zlib.crc32(body) != int.from_bytes(
        content[head - 4 : head], "little"
    ):
        return {}
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(body):
        parts = []
        for _ in range(2):
            size = int.from_bytes(body[at : at + 4], "little")
            parts.append(body[at + 4 : at + 4 + size])
            at += 4 + size
        records[parts[0]] = parts[1]
    return records


def save_snapshot(path: Path, records: Mapping[bytes, bytes]) -> None:
    """Replace `path` in one step; readable by its owner only. Blocking: call it in a thread."""
    body = b"".join(
        len(part).to_bytes(4, "little") + part for pair in sorted(records.items()) for part in pair
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(_MAGIC + zlib.crc32(body).to_bytes(4, "little") + body)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
