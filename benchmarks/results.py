"""What a run found, as data: written as JSON beside the report that is made from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
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
