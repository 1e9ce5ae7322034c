"""Whose requests were compared with a shadow's: a bounded sample of units that merges, the same whatever came
first. Pure.

Requests of one unit are no independent draws, so what shadows prove rests on the first compared request of
every unit. Of many units those whose hash begins with `level` zero bits are kept. Which units these are is
fixed before any of them comes, so that at every level the first requests are a sample that grows like the
whole; which level is in force follows from how many units there were.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

#: Units kept at most.
MOST_UNITS: Final = 4096
_LEVELS: Final = 63
#: Of the weight of evidence: the part of level 0, and what the others share.
_LEVEL_0: Final = 0.9

DIFFERENT, ONLY_VERSION_FAILED, ONLY_SHADOW_FAILED = 1, 2, 4

#: A unit: its hash, when and as which request it came first, what that showed (the flags above), and of all
#: its requests how many there were and how many were answered differently.
UNIT: Final = np.dtype(
    [
        ("unit", "<u8"),
        ("at_us", "<u8"),
        ("request", "<u8"),
        ("first", "u1"),
        ("requests", "<u4"),
        ("different", "<u4"),
    ]
)
Units = NDArray[np.void]


@dataclass(slots=True)
class UnitSample:
    """Units by hash, sorted; `unnamed` requests told no unit, and each is one of its own."""

    level: int = 0
    units: Units = field(default_factory=lambda: np.zeros(0, UNIT))
    unnamed: int = 0

    @classmethod
    def of(cls, hashes: Sequence[int], request_ids: bytes, at_us: int, first: NDArray[np.int64]) -> Self:
        """Of the requests of one record: flags in `first`, ids of 16 bytes each; a hash of 0, or none at all,
        is no unit."""
        requests = np.frombuffer(request_ids, "<u8").reshape(-1, 2)[:, 1]
        found = np.zeros(len(requests), UNIT)
        given = np.array(hashes, dtype=np.uint64) if hashes else np.zeros(len(requests), np.uint64)
        # The last bytes of an id are random.
        found["unit"] = np.where(given == 0, requests, given)
        found["at_us"], found["request"], found["first"] = at_us, requests, first
        found["requests"], found["different"] = 1, first & DIFFERENT
        made = cls(unnamed=int(np.count_nonzero(given == 0)))
        made.units = found
        made._settle()
        return made

    @property
    def weight(self) -> float:
        """The part of a statement's evidence that this level has: they add up to 1 over all levels, so that
        whichever level is in force, the statement's error is bounded."""
        return _LEVEL_0 if self.level == 0 else (1 - _LEVEL_0) / (self.level * (self.level + 1))

    def firsts(self, flag: int) -> int:
        """How many units' first requests showed this."""
        return int(np.count_nonzero(self.units["first"] & flag))

    def design_effect(self) -> float:
        """By how much the variance of the share of different answers is larger than of as many independent
        requests, at least 1: a ratio of sums per unit, by the delta method (Deng, Knoblich & Lu, "Applying
        the delta method in metric analytics", KDD 2018)."""
        n, d = self.units["requests"].astype(np.float64), self.units["different"].astype(np.float64)
        total = n.sum()
        share = d.sum() / total if total else 0.0
        if len(n) < 2 or not 0 < share < 1:
            # Without any difference nothing is known of how they come together: every unit counts once.
            return max(1.0, float(total / len(n))) if len(n) else 1.0
        spread = float(np.sum((d - share * n) ** 2)) * len(n) / (len(n) - 1)
        return max(1.0, spread / float(total * share * (1 - share)))

    def merge(self, other: UnitSample) -> None:
        """Count what `other` has counted."""
        self.level = max(self.level, other.level)
        self.unnamed += other.unnamed
        self.units = np.concatenate([self.units, other.units])
        self._settle()

    def to_json(self) -> dict[str, Any]:
        units = base64.b64encode(self.units.tobytes()).decode()
        return {"level": self.level, "unnamed": self.unnamed, "units": units}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Self:
        units = np.frombuffer(base64.b64decode(stored["units"]), UNIT).copy()
        return cls(stored["level"], units, stored["unnamed"])

    def _settle(self) -> None:
        """One entry per unit, of its first request, and no more than are kept."""
        order = np.lexsort((self.units["request"], self.units["at_us"], self.units["unit"]))
        ordered = self.units[order]
        names, starts = np.unique(ordered["unit"], return_index=True)
        settled = ordered[starts]
        for name in ("requests", "different"):
            if len(starts):
                settled[name] = np.minimum(np.add.reduceat(ordered[name].astype(np.uint64), starts), 1 << 31)
        if len(names) > MOST_UNITS:
            # Names are sorted: so many of them have a hash below that of the first one too many.
            leading = 64 - int(names[MOST_UNITS]).bit_length()
            self.level = min(_LEVELS, max(self.level, leading + 1))
        if self.level:
            settled = settled[names < np.uint64(1 << (64 - self.level))]
        self.units = settled


def log_weight(sample: UnitSample) -> float:
    """What the level costs a statement, as the logarithm of evidence."""
    return math.log(sample.weight)
