"""Logs of the parts: kept under a bound, shown and followed."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

MAX_BYTES = 64 << 20
TAIL_LINES = 20
FOLLOW_EVERY_S = 0.2


def trim_logs(folder: Path, max_bytes: int = MAX_BYTES) -> None:
    """Move what is in an overlong log to `<name>.log.1` and go on in an empty one.

    Writers have it open for appending, so their next line starts the file anew; lines written between copy
    and truncation are lost.
    """
    for log in folder.glob("*.log"):
        if log.stat().st_size > max_bytes:
            shutil.copyfile(log, log.with_suffix(".log.1"))
            with log.open("r+b") as stream:
                stream.truncate(0)


def choose(folder: Path, part: str | None) -> list[Path]:
    """The logs of `part`, or of all parts. `worker` means every worker."""
    logs = sorted(folder.glob("*.log"))
    if part is None:
        return logs
    return [log for log in logs if log.stem == part or log.stem.rpartition("-")[0] == part]


def tail(logs: Iterable[Path], lines: int = TAIL_LINES) -> Iterator[tuple[str, str]]:
    """The last lines of each log, as (part, line)."""
    for log in logs:
        with log.open(errors="replace") as stream:
            for line in deque(stream, lines):
                yield log.stem, line.rstrip("\n")


def follow(folder: Path, part: str | None) -> Iterator[tuple[str, str]]:
    """New lines of the chosen logs as they are written, from now on, without end. Logs that appear later
    are followed from their start."""
    return _follow(folder, part, {log: log.stat().st_size for log in choose(folder, part)})


def _follow(folder: Path, part: str | None, at: dict[Path, int]) -> Iterator[tuple[str, str]]:
    while True:
        for log in choose(folder, part):
            size, position = log.stat().st_size, at.get(log, 0)
            if size < position:  # trimmed
                position = 0
            if size > position:
                with log.open("rb") as stream:
                    stream.seek(position)
                    whole, _, rest = stream.read(size - position).rpartition(b"\n")
                at[log] = size - len(rest)
                yield from ((log.stem, line) for line in whole.decode(errors="replace").splitlines())
        time.sleep(FOLLOW_EVERY_S)
