"""What is held of the rows of one pane: all of them are counted, of most of them no more is asked.

A window says no more about a distribution for a hundred thousand rows than for some thousands, so of each
pane those `most` rows are held whose priority is lowest. A row's priority is a number to which the id of its
record and its place in it are hashed, so the choice is uniform, without replacement, the same whenever it is
made, and blind to values, users and load (bottom-k sampling: Cohen & Kaplan, "Summarizing data using bottom-k
sketches", PODC 2007). Panes join without weights: the rows below the lowest of their limits are a uniform
choice from all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from services.drift.observations import Numbers, Observations
from services.drift.sample import Sample, merged

Places = NDArray[np.int64]
Priorities = NDArray[np.uint64]

#: Above every priority, but for one in 2**64.
NO_LIMIT = (1 << 64) - 1

_LARGEST = float(np.finfo(np.float32).max)
#: Names of the numeric columns, then of the categorical ones.
Columns = tuple[tuple[str, ...], tuple[str, ...]]


class Seen(Protocol):
    """Rows that came one after another, numbered from 0, read only where they are taken."""

    @property
    def rows(self) -> int:
        """How many there are."""
        ...

    @property
    def at_us(self) -> int:
        """When the last of them was answered, Unix microseconds."""
        ...

    def priorities(self) -> Priorities:
        """The priority of every row."""
        ...

    def take(self, places: Places) -> Observations:
        """The rows at these places, which ascend."""
        ...


@dataclass(slots=True)
class Draw:
    """Rows counted (`rows`, seen in `first_us` … `last_us`, Unix microseconds), and those of them held: every
    one with a priority below `limit`, and `settled`, sketches of what came while every row was looked at."""

    rows: int = 0
    first_us: int = 0
    last_us: int = 0
    limit: int = NO_LIMIT
    settled: Sample = field(default_factory=Sample)
    _held: dict[Columns, tuple[Priorities, Observations]] = field(default_factory=dict)

    @property
    def looked_at(self) -> int:
        """How many rows are held or settled."""
        return self.settled.rows + sum(seen.rows for _, seen in self._held.values())

    def add(self, seen: Seen, first: int, rows: int, most: int) -> None:
        """Count `rows` rows of `seen` from place `first` on, and hold the `most` of all with the lowest
        priority; 0: look at every one."""
        self.rows += rows
        self.first_us = min(self.first_us, seen.at_us) if self.first_us else seen.at_us
        self.last_us = max(self.last_us, seen.at_us)
        places = np.arange(first, first + rows)
        if not most:
            self.settled.add(seen.take(places), seen.at_us)
            return
        priorities = seen.priorities()[first : first + rows]
        candidates = np.concatenate([priorities, *(held for held, _ in self._held.values())])
        candidates = candidates[candidates < self.limit]
        if candidates.size > most:
            self.limit = int(np.partition(candidates, most)[most])
            self._held = _below(self._held, self.limit)
        chosen = np.flatnonzero(priorities < np.uint64(self.limit))
        if chosen.size:
            _hold(self._held, priorities[chosen], _single(seen.take(places[chosen])))

    def held_below(self, limit: int) -> dict[Columns, tuple[Priorities, Observations]]:
        """Rows held with a priority below `limit`."""
        return _below(self._held, limit) if limit < self.limit else self._held

    def to_bytes(self) -> bytes:
        """For storage: the length of a header, the header in JSON, then sketches, priorities and columns."""
        settled = self.settled.to_bytes() if self.settled.rows else b""
        chunks, parts = [], [settled]
        for priorities, seen in self._held.values():
            kinds = {name: list(dict.fromkeys(labels)) for name, labels in seen.categorical.items()}
            chunks.append({"rows": seen.rows, "numeric": list(seen.numeric), "categorical": kinds})
            parts.append(priorities.astype("<u8").tobytes())
            parts += [values.astype("<f4").tobytes() for values in seen.numeric.values()]
            for name, labels in seen.categorical.items():
                place_of = {label: place for place, label in enumerate(kinds[name])}
                parts.append(np.array([place_of[label] for label in labels], "<u4").tobytes())
        header = {name: getattr(self, name) for name in ("rows", "first_us", "last_us", "limit")}
        text = json.dumps(header | {"settled": len(settled), "chunks": chunks}).encode()
        return b"".join((len(text).to_bytes(4, "big"), text, *parts))

    @classmethod
    def from_bytes(cls, data: bytes) -> Draw:
        """What `to_bytes` wrote, or `Sample.to_bytes`, as releases did that looked at every row."""
        place = 4 + int.from_bytes(data[:4], "big")
        stored = json.loads(data[4:place])
        if "chunks" not in stored:
            settled = Sample.from_bytes(data)
            return cls(settled.rows, settled.first_us, settled.last_us, settled=settled)
        made = cls(stored["rows"], stored["first_us"], stored["last_us"], stored["limit"])
        if stored["settled"]:
            made.settled = Sample.from_bytes(data[place : place + stored["settled"]])
        place += stored["settled"]
        for chunk in stored["chunks"]:
            rows = chunk["rows"]
            priorities = np.frombuffer(data, "<u8", rows, place).astype(np.uint64)
            place += 8 * rows
            seen = Observations(rows)
            for name in chunk["numeric"]:
                seen.numeric[name] = np.frombuffer(data, "<f4", rows, place).astype(np.float32)
                place += 4 * rows
            for name, kinds in chunk["categorical"].items():
                seen.categorical[name] = [
                    kinds[at] for at in np.frombuffer(data, "<u4", rows, place).tolist()
                ]
                place += 4 * rows
            _hold(made._held, priorities, seen)
        return made


def drawn(draws: Sequence[Draw]) -> Sample:
    """A uniform choice from the rows of all, as sketches: its `rows` are those looked at."""
    limit = min((draw.limit for draw in draws), default=NO_LIMIT)
    whole = merged([draw.settled for draw in draws])
    together: dict[Columns, list[Observations]] = {}
    for draw in draws:
        for columns, (_, seen) in draw.held_below(limit).items():
            together.setdefault(columns, []).append(seen)
    last_us = max((draw.last_us for draw in draws), default=0)
    for parts in together.values():
        whole.add(_end_to_end(parts), last_us)
    return whole


def _below(
    held: dict[Columns, tuple[Priorities, Observations]], limit: int
) -> dict[Columns, tuple[Priorities, Observations]]:
    kept = {}
    for columns, (priorities, seen) in held.items():
        places = np.flatnonzero(priorities < np.uint64(limit))
        if places.size:
            kept[columns] = (priorities[places], seen.pick(places))
    return kept


def _hold(
    held: dict[Columns, tuple[Priorities, Observations]], priorities: Priorities, seen: Observations
) -> None:
    columns = (tuple(seen.numeric), tuple(seen.categorical))
    before = held.get(columns)
    if before is not None:
        priorities = np.concatenate((before[0], priorities))
        seen = _end_to_end((before[1], seen))
    held[columns] = (priorities, seen)


def _end_to_end(parts: Sequence[Observations]) -> Observations:
    """All rows of `parts`, which have the same columns."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    return Observations(
        sum(part.rows for part in parts),
        {name: np.concatenate([part.numeric[name] for part in parts]) for name in first.numeric},
        {name: _joined(part.categorical[name] for part in parts) for name in first.categorical},
    )


def _joined(lists: Iterable[list[str]]) -> list[str]:
    return [label for labels in lists for label in labels]


def _single(seen: Observations) -> Observations:
    """Numbers in single precision, as sketches hold them, whole columns each: what lies beyond it is its
    largest number, infinities are no numbers."""
    return Observations(
        seen.rows, {name: _finite(values) for name, values in seen.numeric.items()}, seen.categorical
    )


def _finite(values: Numbers) -> NDArray[np.float32]:
    single = np.clip(values, -_LARGEST, _LARGEST).astype(np.float32)
    single[np.isinf(values)] = np.nan
    return single
