"""Has what a trial rests on been revised? Pure.

Exact evidence takes a unit's first request. A worker that could not reach the broker keeps its log and sends
it late: requests answered long ago become known then, and a unit's first one may be another than it was. What
was proven before rests on the one that was known: that is no error, and has to be told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Self

#: Logs come within seconds where nothing is wrong.
_USUAL_US: Final = 60_000_000

#: Units that came first before a time, and a digest of them.
Firsts = Callable[[int], tuple[int, int]]


@dataclass(frozen=True, slots=True)
class KnownFirsts:
    """What was known at one look of the units that came first before `before_us`. `revised_us`: the latest
    such time before which something became known after it; 0: never."""

    before_us: int
    units: int
    digest: int
    revised_us: int = 0

    @classmethod
    def at(cls, until_us: int, firsts: Firsts, earlier: Self | None) -> Self:
        """At a look at what was answered before `until_us`, after the look that knew `earlier`."""
        before_us = until_us - _USUAL_US
        revised_us = 0 if earlier is None else earlier.revised_us
        # Where the clock was set back in between, what comes now is no log that was held back.
        if earlier is not None and earlier.before_us <= before_us:
            same = firsts(earlier.before_us) == (earlier.units, earlier.digest)
            revised_us = revised_us if same else earlier.before_us
        return cls(before_us, *firsts(before_us), revised_us)

    @property
    def warning(self) -> str:
        """In words; empty where nothing was revised."""
        if not self.revised_us:
            return ""
        at = datetime.fromtimestamp(self.revised_us / 1e6, UTC)
        return (
            f"Requests answered before {at:%Y-%m-%d %H:%M:%S} UTC became known only later (a log was held "
            "back): some units' first request is another than it was. What had been proven stays, and rests "
            "on what was known then."
        )
