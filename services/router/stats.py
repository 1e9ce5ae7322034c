"""Totals of what the router did, kept where it happens and read when somebody scrapes (metrics.py)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Final

from headrace.v1.tensor_pb2 import Code

from services.router.routing_table import VersionKey

#: Upper bounds of the latency histogram, seconds.
LATENCY_S: Final = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
    30.0,
)  # fmt: skip
#: Requests that named no version that is served are counted here: names of callers are no labels.
NOWHERE: Final[VersionKey] = ("", "")


@dataclass(slots=True)
class VersionStats:
    """Totals of one version."""

    codes: list[int] = field(default_factory=lambda: [0] * (max(Code.values()) + 1))
    retries: dict[str, int] = field(default_factory=dict)
    fallbacks: dict[str, int] = field(default_factory=dict)
    hedges: dict[str, int] = field(default_factory=dict)
    cache: dict[str, int] = field(default_factory=dict)
    shadows: dict[str, int] = field(default_factory=dict)
    latency: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_S) + 1))
    latency_sum_s: float = 0.0

    def answered(self, code: Code, seconds: float) -> None:
        """A request ended with `code`, `seconds` after it came."""
        self.codes[code] += 1
        self.latency[bisect_left(LATENCY_S, seconds)] += 1
        self.latency_sum_s += seconds


class Stats:
    """Totals by version."""

    def __init__(self) -> None:
        self.versions: dict[VersionKey, VersionStats] = {}
        #: Comparisons with shadows that never reached Kafka.
        self.unpublished_shadows = 0

    def retried(self, key: VersionKey, reason: str) -> None:
        """A request was sent once more: its endpoint was "lost" or "refused" it."""
        retries = self.of(key).retries
        retries[reason] = retries.get(reason, 0) + 1

    def fell_back(self, key: VersionKey, reason: str) -> None:
        """The fallback was asked instead of the version: it had "no_endpoint", only "ejected" ones, or
        answered with the code that `reason` names."""
        fallbacks = self.of(key).fallbacks
        fallbacks[reason] = fallbacks.get(reason, 0) + 1

    def hedged(self, key: VersionKey, how: str) -> None:
        """A late request was "sent" a second time, or the second one "won"."""
        hedges = self.of(key).hedges
        hedges[how] = hedges.get(how, 0) + 1

    def cache(self, key: VersionKey, how: str) -> None:
        """The result cache was asked: a "hit", a "miss", or "joined" to an equal request under way."""
        asked = self.of(key).cache
        asked[how] = asked.get(how, 0) + 1

    def shadowed(self, key: VersionKey, how: str) -> None:
        """A copy for the shadow `key` was "dropped" or compared: the verdict's name."""
        shadows = self.of(key).shadows
        shadows[how] = shadows.get(how, 0) + 1

    def of(self, key: VersionKey) -> VersionStats:
        """The totals of `key`; the same object until it is forgotten."""
        stats = self.versions.get(key)
        if stats is None:
            stats = self.versions[key] = VersionStats()
        return stats

    def forget_all_but(self, kept: Container[VersionKey]) -> None:
        """Say nothing of other versions any more."""
        for key in [key for key in self.versions if key not in kept and key != NOWHERE]:
            del self.versions[key]
