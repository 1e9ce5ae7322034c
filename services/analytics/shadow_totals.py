"""What a shadow version said beside the version that callers heard, as totals that merge: the same whatever
came first, and whether it came in one record or in a thousand. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np
from headrace.v1.events_pb2 import OutputComparison, ShadowComparison, ShadowVerdict
from headrace.v1.tensor_pb2 import Code
from numpy.typing import NDArray

from services.analytics.shadow_units import DIFFERENT, ONLY_SHADOW_FAILED, ONLY_VERSION_FAILED, UnitSample

Floats = NDArray[np.float64]

#: Values are kept within 1%: bucket i holds what lies above _BASE ** (i - 1), up to _BASE ** i.
_BASE = 1.02
_LOG_BASE = math.log(_BASE)
#: 1e-12 to 1e12.
_LIMIT = 1400

#: What no sum exceeds: PostgreSQL's JSON has no infinity.
_LARGEST = float(np.finfo(np.float64).max)

#: Of a totals' slices; what comes beyond is counted together.
MOST_SLICES = 50
_OTHERS = "other"
_MAX_NAME = 300
#: Rows of more elements than that say which five are the best.
_RANKED = 5
_BY_REQUEST = (
    "verdicts", "rows", "rows_equal", "codes", "shadow_codes", "latency_us", "shadow_latency_us",
)  # fmt: skip
_BY_OUTPUT = (
    "rows_equal", "rows_same_top", "row_elements", "rows_same_top_five",
    "largest_difference", "mean_difference",
)  # fmt: skip

_VERDICTS = {
    "equal": ShadowVerdict.SHADOW_VERDICT_EQUAL,
    "different": ShadowVerdict.SHADOW_VERDICT_DIFFERENT,
    "failed": ShadowVerdict.SHADOW_VERDICT_FAILED,
    "incomparable": ShadowVerdict.SHADOW_VERDICT_INCOMPARABLE,
}


@dataclass(slots=True)
class Histogram:
    """How many values there are of each size, zeros apart; negative ones and NaN are none."""

    zeros: int = 0
    counts: dict[int, int] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return self.zeros + sum(self.counts.values())

    def add(self, values: Floats) -> None:
        """Count all of `values`."""
        self.zeros += int(np.count_nonzero(values == 0))
        positive = values[(values > 0) & np.isfinite(values)]
        places = np.clip(np.ceil(np.log(positive) / _LOG_BASE), -_LIMIT, _LIMIT).astype(np.int64)
        for place, number in zip(*np.unique(places, return_counts=True), strict=True):
            self.counts[int(place)] = self.counts.get(int(place), 0) + int(number)

    def merge(self, other: Histogram) -> None:
        """Count what `other` has counted."""
        self.zeros += other.zeros
        for place, number in other.counts.items():
            self.counts[place] = self.counts.get(place, 0) + number

    def quantile(self, share: float) -> float | None:
        """What `share` (0 … 1) of the values lies at or below, within 1%; None while there is none."""
        rank = share * self.count - self.zeros
        if not self.count:
            return None
        if rank <= 0 or not self.counts:
            return 0.0
        place = 0
        for place in sorted(self.counts):
            rank -= self.counts[place]
            if rank <= 1e-9:
                break
        return 2 * _BASE**place / (_BASE + 1)

    def to_json(self) -> dict[str, Any]:
        return {"zeros": self.zeros, "counts": {str(place): n for place, n in self.counts.items()}}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Self:
        return cls(stored["zeros"], {int(place): n for place, n in stored["counts"].items()})


_OUTPUT_SUMS = (
    "rows", "rows_equal", "scored", "rows_same_top", "ranked", "rows_same_top_five",
    "requests", "sum_of_means",
)  # fmt: skip


@dataclass(slots=True)
class OutputTotals:
    """One output over the requests that were compared: rows that agree, rows whose best class is the same one
    (of numbers with several columns; `scored` rows have them) or whose best five are (with more columns than
    that; `ranked` rows), and of numbers the largest difference in each
    request, and the sum over requests of the mean one."""

    kind: int = 0
    rows: int = 0
    rows_equal: int = 0
    scored: int = 0
    rows_same_top: int = 0
    ranked: int = 0
    rows_same_top_five: int = 0
    requests: int = 0
    sum_of_means: float = 0.0
    largest: float = 0.0
    differences: Histogram = field(default_factory=Histogram)

    def merge(self, other: OutputTotals) -> None:
        """Count what `other` has counted."""
        self.kind = self.kind or other.kind
        for name in _OUTPUT_SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.sum_of_means = min(self.sum_of_means, _LARGEST)
        self.largest = max(self.largest, other.largest)
        self.differences.merge(other.differences)


@dataclass(slots=True)
class ShadowTotals:
    """`only_*` count requests that failed on one side and not on the other; cancelled ones count as neither.
    Latencies, in microseconds, are of requests that both sides answered: `latency_gaps` is the sum of shadow
    minus version, `latency_squares` that of its squares. `units` samples whose requests they are; totals from
    before there was such a sample, and slices, have none."""

    requests: int = 0
    equal: int = 0
    different: int = 0
    failed: int = 0
    incomparable: int = 0
    rows: int = 0
    rows_equal: int = 0
    errors: int = 0
    shadow_errors: int = 0
    only_errors: int = 0
    only_shadow_errors: int = 0
    answered: int = 0
    latency_gaps: int = 0
    latency_squares: float = 0.0
    latency: Histogram = field(default_factory=Histogram)
    shadow_latency: Histogram = field(default_factory=Histogram)
    outputs: dict[str, OutputTotals] = field(default_factory=dict)
    units: UnitSample = field(default_factory=UnitSample)
    #: The same of requests with one value of the attribute that the deployment names, by "attribute=value".
    slices: dict[str, ShadowTotals] = field(default_factory=dict)

    @classmethod
    def of(cls, record: ShadowComparison) -> Self:
        """The totals of one record. Raises ValueError where its columns are not of one length."""
        n, rest = divmod(len(record.request_ids), 16)
        verdicts, rows, rows_equal = (
            _column(getattr(record, name), n, name) for name in ("verdicts", "rows", "rows_equal")
        )
        codes, shadow_codes, ours, theirs = (
            _column(getattr(record, name), n, name)
            for name in ("codes", "shadow_codes", "latency_us", "shadow_latency_us")
        )
        if rest:
            raise ValueError("request_ids are cut")
        totals = cls(requests=n, rows=int(rows.sum()), rows_equal=int(rows_equal.sum()))
        for name, verdict in _VERDICTS.items():
            setattr(totals, name, int(np.count_nonzero(verdicts == verdict)))
        failed, shadow_failed = _failed(codes), _failed(shadow_codes)
        totals.errors, totals.shadow_errors = int(failed.sum()), int(shadow_failed.sum())
        totals.only_errors = int((failed & ~shadow_failed).sum())
        totals.only_shadow_errors = int((shadow_failed & ~failed).sum())
        both = (codes == Code.CODE_OK) & (shadow_codes == Code.CODE_OK)
        gaps = (theirs - ours)[both]
        totals.answered, totals.latency_gaps = int(both.sum()), int(gaps.sum())
        totals.latency_squares = float(np.sum(gaps.astype(np.float64) ** 2))
        totals.latency.add(ours[both].astype(np.float64))
        totals.shadow_latency.add(theirs[both].astype(np.float64))
        shown = DIFFERENT * (verdicts != ShadowVerdict.SHADOW_VERDICT_EQUAL)
        shown |= ONLY_VERSION_FAILED * (failed & ~shadow_failed)
        shown |= ONLY_SHADOW_FAILED * (shadow_failed & ~failed)
        if record.unit_hashes and len(record.unit_hashes) != n:
            raise ValueError(f"unit_hashes has {len(record.unit_hashes)} entries for {n} requests")
        totals.units = UnitSample.of(record.unit_hashes, record.request_ids, record.compared_at_us, shown)
        for output in record.outputs:
            totals.outputs[output.name] = _output(output, rows, n)
        if record.slices:
            totals._slice(record, _column(record.slices, n, "slices"))
        return totals

    def _slice(self, record: ShadowComparison, slices: NDArray[np.int64]) -> None:
        if slices.max() >= len(record.slice_names):
            raise ValueError("slices name what is not there")
        for place in np.unique(slices):
            # PostgreSQL's JSON has no NUL, and what a caller says of itself may be long.
            name = f"{record.slice_by}={record.slice_names[place]}".replace("\0", "\ufffd")[:_MAX_NAME]
            part = ShadowTotals.of(_part(record, np.flatnonzero(slices == place).tolist()))
            part.units = UnitSample()
            self.slices.setdefault(name, ShadowTotals()).merge(part)

    def merge(self, other: ShadowTotals) -> None:
        """Count what `other` has counted."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.latency.merge(other.latency)
        self.shadow_latency.merge(other.shadow_latency)
        self.units.merge(other.units)
        for name, output in other.outputs.items():
            self.outputs.setdefault(name, OutputTotals()).merge(output)
        for name, part in other.slices.items():
            known = name in self.slices or len(self.slices) < MOST_SLICES
            self.slices.setdefault(name if known else _OTHERS, ShadowTotals()).merge(part)

    def to_json(self) -> dict[str, Any]:
        """For storage."""
        return {
            **{name: getattr(self, name) for name in _SUMS},
            "latency": self.latency.to_json(),
            "shadow_latency": self.shadow_latency.to_json(),
            "units": self.units.to_json() if len(self.units.units) else None,
            "outputs": {name: _output_json(output) for name, output in self.outputs.items()},
            "slices": {name: part.to_json() for name, part in self.slices.items()},
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Self:
        """What `to_json` wrote."""
        return cls(
            **{name: stored[name] for name in _SUMS},
            latency=Histogram.from_json(stored["latency"]),
            shadow_latency=Histogram.from_json(stored["shadow_latency"]),
            units=UnitSample.from_json(stored["units"]) if stored.get("units") else UnitSample(),
            outputs={
                name: OutputTotals(**{**output, "differences": Histogram.from_json(output["differences"])})
                for name, output in stored["outputs"].items()
            },
            slices={name: cls.from_json(part) for name, part in stored.get("slices", {}).items()},
        )


_SUMS = tuple(
    column.name
    for column in fields(ShadowTotals)
    if column.name not in ("latency", "shadow_latency", "outputs", "units", "slices")
)


def _part(record: ShadowComparison, places: Sequence[int]) -> ShadowComparison:
    """The requests of `record` at `places`, without the slices."""
    part = ShadowComparison(request_ids=bytes(16 * len(places)))
    outputs = [(output, part.outputs.add(name=output.name, kind=output.kind)) for output in record.outputs]
    for names, whole, chosen in ((_BY_REQUEST, record, part), *((_BY_OUTPUT, *both) for both in outputs)):
        for name in names:
            if values := getattr(whole, name):
                getattr(chosen, name).extend([values[place] for place in places])
    return part


def _output_json(output: OutputTotals) -> dict[str, Any]:
    stored = {column.name: getattr(output, column.name) for column in fields(output)}
    return stored | {"differences": output.differences.to_json()}


def _column(values: Any, n: int, name: str) -> NDArray[np.int64]:
    """One entry per request; a column that is absent is all zero."""
    given = values[:] or [0] * n
    if len(given) != n:
        raise ValueError(f"{name} has {len(given)} entries for {n} requests")
    return np.array(given, dtype=np.int64)


def _failed(codes: NDArray[np.int64]) -> NDArray[np.bool_]:
    return ~np.isin(codes, (Code.CODE_OK, Code.CODE_CANCELLED))


def _output(output: OutputComparison, rows: NDArray[np.int64], n: int) -> OutputTotals:
    equal, same_top, elements, same_five = (
        _column(getattr(output, name), n, name)
        for name in ("rows_equal", "rows_same_top", "row_elements", "rows_same_top_five")
    )
    # A single column has no best class: nothing is said of it then. Older records do not tell.
    classes = elements > 1 if output.row_elements else np.full(n, same_top.any())
    largest, means = (
        np.array(getattr(output, name)[:] or [0.0] * n, dtype=np.float64)
        for name in ("largest_difference", "mean_difference")
    )
    if largest.size != n or means.size != n:
        raise ValueError("differences and requests are not as many")
    compared, numbers = rows > 0, output.kind == OutputComparison.KIND_NUMBER
    totals = OutputTotals(
        kind=int(output.kind),
        rows=int(rows.sum()),
        rows_equal=int(equal.sum()),
        scored=int(rows[classes].sum()),
        rows_same_top=int(same_top.sum()),
        ranked=int(rows[elements > _RANKED].sum()),
        rows_same_top_five=int(same_five.sum()),
        requests=int(compared.sum()),
    )
    if numbers:
        with np.errstate(over="ignore"):
            totals.sum_of_means = min(float(np.sum(means[compared & np.isfinite(means)])), _LARGEST)
        totals.largest = float(np.max(largest[compared & np.isfinite(largest)], initial=0.0))
        totals.differences.add(largest[compared])
    return totals
