"""A sample of observations as mergeable sketches: the reference of a model version and the panes of its live
stream are both this, so that comparing them needs nothing else."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field

from services.drift.detectors.sketches import QuantileSketch
from services.drift.observations import Observations

#: Rank error 0.15%; up to about this many rows a sketch holds every value.
SKETCH_K = 2048

#: A feature with more values than this is not one that takes "a few values"; the rest counts as one.
MAX_CATEGORIES = 200
OTHER = "(other)"

#: The beginning of what `Sample.to_bytes` writes, in which `rows_of` finds how many rows there are.
HEAD_BYTES = 64
_ROWS = re.compile(rb'\{"rows": (\d+)')


@dataclass(slots=True)
class Sample:
    """Sketches of numeric features, counts of categorical ones, over `rows` rows seen in
    `first_us` … `last_us` (Unix microseconds, 0 while empty)."""

    rows: int = 0
    first_us: int = 0
    last_us: int = 0
    numeric: dict[str, QuantileSketch] = field(default_factory=dict)
    categorical: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, seen: Observations, at_us: int) -> None:
        """Count `seen`, answered at `at_us`."""
        if not seen.rows:
            return
        self.rows += seen.rows
        self._stretch(at_us, at_us)
        for name, values in seen.numeric.items():
            self.numeric.setdefault(name, QuantileSketch(SKETCH_K)).update(values)
        for name, labels in seen.categorical.items():
            self._count(name, Counter(labels))

    def merge(self, other: Sample) -> None:
        """Count everything that `other` has counted."""
        if not other.rows:
            return
        self.rows += other.rows
        self._stretch(other.first_us, other.last_us)
        for name, sketch in other.numeric.items():
            self.numeric.setdefault(name, QuantileSketch(SKETCH_K)).merge(sketch)
        for name, counts in other.categorical.items():
            self._count(name, counts)

    def _stretch(self, first_us: int, last_us: int) -> None:
        self.first_us = min(self.first_us, first_us) if self.first_us else first_us
        self.last_us = max(self.last_us, last_us)

    def _count(self, name: str, added: Counter[str]) -> None:
        counts = self.categorical.setdefault(name, Counter())
        for value, number in added.items():
            known = value in counts or len(counts) < MAX_CATEGORIES
            counts[value if known else OTHER] += number

    def to_bytes(self) -> bytes:
        """For storage: the length of a header, the header in JSON, then the sketches end to end."""
        sketches = [sketch.to_bytes() for sketch in self.numeric.values()]
        header = json.dumps(
            {
                "rows": self.rows,
                "first_us": self.first_us,
                "last_us": self.last_us,
                "numeric": [[name, len(data)] for name, data in zip(self.numeric, sketches, strict=True)],
                "categorical": self.categorical,
            }
        ).encode()
        return b"".join((len(header).to_bytes(4, "big"), header, *sketches))

    @classmethod
    def from_bytes(cls, data: bytes) -> Sample:
        """The sample that `to_bytes` wrote."""
        place = 4 + int.from_bytes(data[:4], "big")
        stored = json.loads(data[4:place])
        numeric = {}
        for name, size in stored["numeric"]:
            numeric[name] = QuantileSketch.from_bytes(data[place : place + size])
            place += size
        return cls(
            rows=stored["rows"],
            first_us=stored["first_us"],
            last_us=stored["last_us"],
            numeric=numeric,
            categorical={name: Counter(counts) for name, counts in stored["categorical"].items()},
        )


def rows_of(head: bytes) -> int:
    """The rows of a stored sample, of which `head` is the beginning."""
    found = _ROWS.match(head, 4)
    if found is None:
        raise ValueError("no sample begins so")
    return int(found[1])


def merged(samples: list[Sample]) -> Sample:
    """All of `samples` as one."""
    whole = Sample()
    for sample in samples:
        whole.merge(sample)
    return whole
