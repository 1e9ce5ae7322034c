"""What was to be reached, what was measured, and whether that is it. The first table of RESULTS.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.instructions import difference
from benchmarks.results import CurvePoint, Point, Results, Spread, of_each_load
from benchmarks.tables import MAIN, connections_of, fronts_of, good, rates, table

TRITON = "Triton"
SINGLE_PROCESS = frozenset({"mlserver", "kserve"})
TIMES_PYTHON = 5.0
GOODPUT_KEPT = 0.9
REFUSED_WITHIN_US = 50_000
BATCHING_EFFICIENCY = 0.9
#: Counting varies by this much between runs of one commit.
INSTRUCTIONS_GROWTH = 0.05


@dataclass(frozen=True, slots=True)
class Verdict:
    """One line; `met` is None where it was not measured."""

    wanted: str
    got: str
    met: bool | None


def verdicts(results: Results, main: str, overload: str) -> list[Verdict]:
    """In the order of the goals. `main` and `overload` are names of workloads."""
    return [
        *[_triton(results, main, count) for count in (32, 128)],
        *[_python(results, main, count) for count in (32, 128)],
        _single(results, main),
        _grpc(results, main),
        _doubled(results, main),
        *_overloaded(results, overload),
        *_batching(results),
        _instructions(results),
    ]


def verdict_table(found: Iterable[Verdict]) -> list[str]:
    """Lines of Markdown."""
    said = {True: "**met**", False: "not met", None: "not measured"}
    return table(["wanted", "got", ""], [[one.wanted, one.got, said[one.met]] for one in found])


def _rate(points: list[Point]) -> float:
    return Spread.of(rates(points)).median


def _p99_ms(points: list[Point]) -> float:
    return Spread.of([point.p99_us for point in points]).median / 1000


def _p50_us(points: list[Point]) -> float:
    return Spread.of([point.p50_us for point in points]).median


def _triton(results: Results, workload: str, count: int) -> Verdict:
    wanted = f"c = {count}: at least Triton's answers/s, and below its p99"
    own, other = (good(results.of(front, count, workload)) for front in (MAIN, TRITON))
    if not own or not other:
        return Verdict(wanted, "–", None)
    times = _rate(own) / _rate(other)
    got = (
        f"{_rate(own):,.0f} against {_rate(other):,.0f} ({times:.2f}×); "
        f"p99 {_p99_ms(own):.1f} against {_p99_ms(other):.1f} ms"
    )
    return Verdict(wanted, got, times >= 1 and _p99_ms(own) < _p99_ms(other))


def _peers(results: Results, workload: str, count: int, *, grpc: bool = False) -> list[list[Point]]:
    """The Python peers' good points, one list for each front."""
    found = []
    for front in fronts_of(results, workload):
        points = good(results.of(front, count, workload))
        if points and points[0].target not in {"headrace", "triton"} and front.endswith(", gRPC") == grpc:
            found.append(points)
    return found


def _python(results: Results, workload: str, count: int) -> Verdict:
    wanted = f"c = {count}: at least {TIMES_PYTHON:g}× the best Python peer's answers/s"
    own, peers = good(results.of(MAIN, count, workload)), _peers(results, workload, count)
    if not own or not peers:
        return Verdict(wanted, "–", None)
    best = max(peers, key=_rate)
    times = _rate(own) / _rate(best)
    got = f"{times:.1f}× ({best[0].front}: {_rate(best):,.0f}/s)"
    return Verdict(wanted, got, times >= TIMES_PYTHON)


def _single(results: Results, workload: str) -> Verdict:
    wanted = "c = 1: p50 at most the best single-process peer's"
    own = good(results.of(MAIN, 1, workload))
    peers = [points for points in _peers(results, workload, 1) if points[0].target in SINGLE_PROCESS]
    if not own or not peers:
        return Verdict(wanted, "–", None)
    best = min(peers, key=_p50_us)
    got = f"{_p50_us(own) / 1000:.2f} against {_p50_us(best) / 1000:.2f} ms ({best[0].front})"
    return Verdict(wanted, got, _p50_us(own) <= _p50_us(best))


def _grpc(results: Results, workload: str) -> Verdict:
    wanted = "gRPC front: at least the best Python peer's calls/s"
    front = f"{MAIN}, gRPC"
    shown, met = [], []
    for count in connections_of(results, workload, [front]):
        own, peers = good(results.of(front, count, workload)), _peers(results, workload, count, grpc=True)
        if own and peers:
            best = max(peers, key=_rate)
            met.append(_rate(own) >= _rate(best))
            shown.append(f"c = {count}: {_rate(own):,.0f} against {_rate(best):,.0f} ({best[0].front})")
    return Verdict(wanted, "; ".join(shown) or "–", all(met) if met else None)


def _of(results: Results, workload: str) -> list[CurvePoint]:
    return of_each_load(
        [point for point in results.curves if (point.front, point.workload) == (MAIN, workload)]
    )


def _repeated(points: list[CurvePoint]) -> list[CurvePoint]:
    """Those loads that were offered most often: not the single windows of the search for the capacity, of
    which the best is the luckiest."""
    most = max((point.summary["runs"] for point in points), default=0)
    return [point for point in points if point.summary["runs"] == most]


def _kept(said: Mapping[str, Any], peak: float) -> str:
    share = said["goodput_per_s"] / peak if peak else 0.0
    runs = f", median of {said['runs']} windows" if said["runs"] > 1 else ""
    return (
        f"{said['goodput_per_s']:,.0f} of {peak:,.0f}/s ({share:.0%}{runs}, "
        f"least {said['least_goodput_per_s']:,.0f})"
    )


def _doubled(results: Results, workload: str) -> Verdict:
    wanted = "goodput does not fall when offered load doubles beyond capacity (tiny model, machine saturated)"
    points = _repeated(_of(results, workload))
    beyond = [point.summary for point in points if point.fraction >= 2]
    if not beyond:
        return Verdict(wanted, "–", None)
    peak = max(point.summary["goodput_per_s"] for point in points)
    worst = min(beyond, key=lambda said: float(said["goodput_per_s"]))
    return Verdict(wanted, _kept(worst, peak), worst["goodput_per_s"] >= GOODPUT_KEPT * peak)


def _overloaded(results: Results, workload: str) -> list[Verdict]:
    kept = f"twice the capacity offered: goodput at least {GOODPUT_KEPT:.0%} of the peak"
    soon = f"every refusal within {REFUSED_WITHIN_US / 1000:g} ms, with 429 or 503 and Retry-After"
    points = _of(results, workload)
    peak = max((point.summary["goodput_per_s"] for point in _repeated(points)), default=0.0)
    found = []
    for fraction in (2.0, 4.0):
        at = [point.summary for point in points if point.fraction == fraction]
        wanted = kept if fraction == 2 else kept.replace("twice", "four times")
        if not at:
            found.append(Verdict(wanted, "–", None))
            continue
        said = at[0]
        p99 = (said["p99_us"] or 0) / 1000
        got = f"{_kept(said, peak)}, p99 of the accepted {p99:,.0f} ms"
        found.append(Verdict(wanted, got, said["goodput_per_s"] >= GOODPUT_KEPT * peak))
    refusals = [point.summary for point in points if point.summary["refused"]]
    if not refusals:
        return [*found, Verdict(soon, "nothing was refused", None)]
    longest = max(said["refused_max_us"] for said in refusals)
    bare = sum(said["refused_without_retry_after"] for said in refusals)
    lost = sum(sum(said["other"].values()) for said in refusals)
    refused = sum(said["refused"] for said in refusals)
    p99 = max(said["refused_p99_us"] for said in refusals)
    got = (
        f"{refused:,} refused; at most {longest / 1000:.0f} ms (p99 {p99 / 1000:.0f}), "
        f"{bare} without Retry-After, {lost} other failures"
    )
    return [*found, Verdict(soon, got, longest <= REFUSED_WITHIN_US and not bare and not lost)]


def _batching(results: Results) -> list[Verdict]:
    wanted = f"batching efficiency at least {BATCHING_EFFICIENCY:.0%}"
    if not results.batching:
        return [Verdict(wanted, "–", None)]
    lines: dict[str, list[dict[str, Any]]] = {}
    for name, said in results.batching.items():
        lines.setdefault(said.get("model", name), []).append(said)
    return [_most_efficient(f"{wanted}: {model}", of_model) for model, of_model in lines.items()]


def _most_efficient(wanted: str, lines: list[dict[str, Any]]) -> Verdict:
    """Of the ways that requests may come, the best; how large they were and which way they came is said."""
    best = max(lines, key=lambda said: float(said["efficiency"]))
    got = f"{best['efficiency']:.1%}"
    if "way" in best:
        got += f" ({best['request_rows']:,} rows a request, {best['way']})"
    return Verdict(wanted, got, best["efficiency"] >= BATCHING_EFFICIENCY)


def _instructions(results: Results) -> Verdict:
    wanted = "instructions per request: not above the number that is kept"
    grown = difference(results.instructions)
    if grown is None:
        return Verdict(wanted, "–", None)
    worst = max(grown.values())
    got = ", ".join(f"c = {count}: {change:+.1%}" for count, change in grown.items())
    return Verdict(wanted, got, worst <= INSTRUCTIONS_GROWTH)
