"""What a run found, as data: written as JSON beside the report that is made from it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True)
class Point:
    """One closed-loop run. `cpu_us` is CPU time per answered request by part of the server (the generator's
    own is not in it); `rows_per_batch` where the server tells."""

    target: str
    front: str
    workload: str
    connections: int
    round: int
    requests_per_s: float
    p50_us: float
    p90_us: float
    p99_us: float
    p999_us: float
    errors: dict[str, int]
    cpu_us: dict[str, float]
    rows_per_batch: float | None

    @property
    def failed(self) -> bool:
        """Something other than a good answer came back."""
        return bool(self.errors) or not self.requests_per_s


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One open-loop run at `fraction` of the capacity; `summary` as the generator printed it."""

    target: str
    front: str
    workload: str
    fraction: float
    summary: dict[str, Any]


#: Of an open-loop run: what is added up over runs of the same load, and of what the worst is kept.
_ADDED = ("refused", "refused_without_retry_after", "late", "unanswered", "abandoned", "not_connected")
_WORST = ("refused_p99_us", "refused_max_us", "lag_p99_us")
_MIDDLE = ("offered_per_s", "goodput_per_s", "p50_us", "p90_us", "p99_us", "p999_us")


def of_each_load(points: Sequence[CurvePoint]) -> list[CurvePoint]:
    """One point of those of the same server, workload and load: medians, but the sum of all refusals and
    failures, and the worst of their times. Its summary says over how many `runs`, and which goodput the
    worst of them had (`least_goodput_per_s`)."""
    alike: dict[tuple[str, str, float], list[CurvePoint]] = {}
    for point in points:
        alike.setdefault((point.front, point.workload, point.fraction), []).append(point)
    return [replace(runs[0], summary=_together([run.summary for run in runs])) for runs in alike.values()]


def _together(runs: list[dict[str, Any]]) -> dict[str, Any]:
    def values(name: str) -> list[float]:
        return [run[name] for run in runs if run[name] is not None]

    failures: Counter[str] = Counter()
    for run in runs:
        failures.update(run["other"])
    return {
        **runs[0],
        **{name: median(found) if (found := values(name)) else None for name in _MIDDLE},
        **{name: sum(run[name] for run in runs) for name in _ADDED},
        **{name: max(values(name), default=None) for name in _WORST},
        "other": dict(failures),
        "runs": len(runs),
        "least_goodput_per_s": min(run["goodput_per_s"] for run in runs),
    }


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one part of a server after load."""

    target: str
    part: str
    pss: int
    rss: int
    serving: bool


@dataclass(slots=True)
class Results:
    """Everything of one run."""

    started: str
    plan: str
    machine: dict[str, str]
    generator: str
    seconds: float
    rounds: int
    points: list[Point] = field(default_factory=list)
    curves: list[CurvePoint] = field(default_factory=list)
    #: Answers per second that the open loop found, by workload and front.
    capacities: dict[str, dict[str, float]] = field(default_factory=dict)
    memory: list[Memory] = field(default_factory=list)
    direct: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    setups: dict[str, str] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    instructions: dict[str, Any] = field(default_factory=dict)
    #: Batching efficiency by model, see batching.py.
    batching: dict[str, Any] = field(default_factory=dict)
    #: What the plan had no time for.
    left_out: list[str] = field(default_factory=list)
    #: One-minute load average before each round: what else the machine was doing.
    load_before: list[float] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """What `save` wrote."""
        said = json.loads(path.read_text())
        said["points"] = [Point(**point) for point in said["points"]]
        said["curves"] = [CurvePoint(**point) for point in said["curves"]]
        said["memory"] = [Memory(**one) for one in said["memory"]]
        return cls(**said)

    def of(self, front: str, connections: int, workload: str) -> list[Point]:
        """All rounds of one cell."""
        return [
            point
            for point in self.points
            if (point.front, point.connections, point.workload) == (front, connections, workload)
        ]


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and most over the rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Of at least one value."""
        return cls(median(values), min(values), max(values))
