"""The tables of RESULTS.md below its verdicts: pure functions of the results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.results import CurvePoint, Point, Results, Spread, of_each_load

MAIN = "Headrace"
#: With a lag of this of its own schedule a point shows the generator.
LAG_LIMIT_US = 20_000


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows],
    ]


def fronts_of(results: Results, workload: str) -> list[str]:
    """Those that have points, in the order of the servers."""
    order = list(results.setups)
    points = [point for point in results.points if point.workload == workload]
    points.sort(key=lambda point: order.index(point.target) if point.target in order else len(order))
    return list(dict.fromkeys(point.front for point in points))


def good(points: Sequence[Point]) -> list[Point]:
    """The rounds, unless one failed: then none counts."""
    return [] if any(point.failed for point in points) else list(points)


def rates(points: Iterable[Point]) -> list[float]:
    """Answers per second of each round."""
    return [point.requests_per_s for point in points]


def connections_of(results: Results, workload: str, fronts: Iterable[str] | None = None) -> list[int]:
    """Concurrencies at which `fronts` (None: any) were measured."""
    wanted = set(fronts) if fronts is not None else None
    return sorted(
        {
            point.connections
            for point in results.points
            if point.workload == workload and (wanted is None or point.front in wanted)
        }
    )


def closed(results: Results, fronts: Sequence[str], workload: str) -> list[str]:
    """Rates and latencies by front and concurrency."""
    counts = connections_of(results, workload, fronts)
    rows = [[front, *[_cell(results.of(front, count, workload)) for count in counts]] for front in fronts]
    return table(["", *[f"c = {count}" for count in counts]], rows)


def _cell(points: Sequence[Point]) -> str:
    if not points:
        return "–"
    failed = [point for point in points if point.failed]
    if failed:
        what = ", ".join(sorted({f"{kind} {n}" for point in failed for kind, n in point.errors.items()}))
        return f"failed in {len(failed)} of {len(points)} rounds ({what or 'no answers'})"
    rate = Spread.of(rates(points))
    p50 = Spread.of([point.p50_us / 1000 for point in points])
    p99 = Spread.of([point.p99_us / 1000 for point in points])
    spread = f" ({rate.least:,.0f}–{rate.most:,.0f})" if len(points) > 1 else ""
    return f"**{rate.median:,.0f}**{spread}<br>{p50.median:.2f} / {p99.median:.2f}"


def machine(results: Results) -> list[str]:
    """Where, when, and whether anybody else was there."""
    said = results.machine
    rows = [[name, value] for name, value in said.items()]
    rows.append(["measured", f"{results.started}, plan `{results.plan}`"])
    rows.append(["load before each round", ", ".join(f"{load:g}" for load in results.load_before)])
    busy = max(results.load_before[:1], default=0.0) > float(said["cores"]) / 2
    note = ["**The machine was busy with other work when this was measured.**", ""] if busy else []
    return [*note, *table(["machine", ""], rows), ""]


def offered(points: Sequence[CurvePoint]) -> list[str]:
    """Open-loop points, each server's in the order of their load."""
    rows = []
    fronts = list(dict.fromkeys(point.front for point in points))
    for point in sorted(
        of_each_load(points), key=lambda one: (fronts.index(one.front), one.summary["offered_per_s"])
    ):
        said = point.summary
        limited = (said["lag_p99_us"] or 0) > LAG_LIMIT_US
        rows.append(
            [
                point.front,
                f"{point.fraction:.2g}×",
                f"{said['offered_per_s']:,.0f}",
                _with_least(said),
                f"{ms(said['p50_us'])} / {ms(said['p99_us'])}",
                f"{said['refused']:,}",
                f"{ms(said['refused_p99_us'])} / {ms(said['refused_max_us'])}",
                f"{said['late'] + said['unanswered']:,}",
                f"{said['abandoned']:,}",
                ", ".join(f"{kind}: {count}" for kind, count in said["other"].items()) or "–",
                f"{ms(said['lag_p99_us'])}{' (!)' if limited else ''}",
            ]
        )
    header = [
        "",
        "of capacity",
        "offered/s",
        "goodput/s",
        "p50 / p99 ms",
        "refused",
        "refusal p99 / max ms",
        "late or never",
        "no connection",
        "other",
        "generator lag p99 ms",
    ]
    return table(header, rows)


def _with_least(said: Mapping[str, Any]) -> str:
    goodput = f"{said['goodput_per_s']:,.0f}"
    return goodput if said["runs"] == 1 else f"{goodput} (least {said['least_goodput_per_s']:,.0f})"


def ms(us: float | None) -> str:
    """Milliseconds, or a dash."""
    return "–" if us is None else f"{us / 1000:.1f}"


def direct(results: Results) -> list[str]:
    """What serving costs above calling the runtime."""
    rows = []
    for name, said in results.direct.items():
        served = [
            Spread.of(rates(points)).median * said["rows_per_request"]
            for count in connections_of(results, name)
            for front in (MAIN, f"{MAIN}, V2 binary")
            if (points := good(results.of(front, count, name)))
        ]
        if not served:
            continue
        single = good(results.of(MAIN, 1, name))
        p50 = Spread.of([point.p50_us for point in single]).median if single else None
        batch, best = max(said["rows_per_s"].items(), key=lambda item: float(item[1]))
        sizes = [point.rows_per_batch for point in results.points if point.workload == name]
        largest = max((size for size in sizes if size), default=None)
        rows.append(
            [
                said["title"],
                f"{said['p50_us']:,.0f}",
                f"{p50 - said['p50_us']:,.0f}" if p50 is not None else "–",
                f"{float(best):,.0f} (batch {batch})",
                f"{max(served):,.0f}",
                f"{largest:.1f}" if largest else "–",
            ]
        )
    header = [
        "",
        "direct p50 µs",
        "Headrace adds at c = 1, µs",
        "best offline rows/s",
        "most rows/s served",
        "largest mean batch",
    ]
    return table(header, rows)


def batching(results: Results) -> list[str]:
    """Rows per second served over the best that the runtime does offline."""
    rows = [
        [
            name,
            f"{said['offline_rows_per_s']:,.0f} (batch {said['offline_batch']})",
            f"{said['served_rows_per_s']:,.0f}",
            f"{said['efficiency']:.1%} ({said['lowest']:.0%} to {said['highest']:.0%})",
        ]
        for name, said in results.batching.items()
    ]
    return table(["", "best offline rows/s", "served rows/s", "batching efficiency (turns)"], rows)


def cpu(results: Results, workload: str, count: int) -> list[str]:
    """CPU time per answer of each server's processes."""
    rows = []
    for front in fronts_of(results, workload):
        points = good(results.of(front, count, workload))
        if not points:
            continue
        parts = {part for point in points for part in point.cpu_us}
        medians = {
            part: Spread.of([point.cpu_us.get(part, 0.0) for point in points]).median for part in parts
        }
        listed = sorted(medians.items(), key=lambda item: -item[1])
        spread = ", ".join(f"{part} {us:.0f}" for part, us in listed if us >= 0.5) if len(listed) > 1 else ""
        rows.append([front, f"{sum(medians.values()):,.0f}", spread])
    return table(["", "µs", "by process"], rows)


def hops(results: Results, workload: str) -> list[str]:
    """CPU time per answer of each process of Headrace, by concurrency."""
    counts = connections_of(results, workload, [MAIN])
    by_count = {count: good(results.of(MAIN, count, workload)) for count in counts}
    parts = dict.fromkeys(part for points in by_count.values() for point in points for part in point.cpu_us)
    medians = {
        part: [
            Spread.of([point.cpu_us.get(part, 0.0) for point in points]).median if points else 0.0
            for points in by_count.values()
        ]
        for part in parts
    }
    rows = [[part, *[f"{us:,.0f}" for us in each]] for part, each in medians.items()]
    rows.append(["together", *[f"{sum(each):,.0f}" for each in zip(*medians.values(), strict=True)]])
    return table(["", *[f"c = {count}" for count in counts]], rows)


def memory(results: Results) -> list[str]:
    """PSS after load."""
    rows = []
    for target in dict.fromkeys(one.target for one in results.memory):
        parts = [one for one in results.memory if one.target == target]
        serving = sum(one.pss for one in parts if one.serving)
        each = ", ".join(f"{one.part} {one.pss / 2**20:.0f}" for one in parts) if len(parts) > 1 else ""
        rows.append(
            [
                results.titles.get(target, target),
                f"{serving / 2**20:,.0f}",
                f"{sum(one.pss for one in parts) / 2**20:,.0f}",
                f"{sum(one.rss for one in parts) / 2**20:,.0f}",
                each,
            ]
        )
    return table(["", "serving, MiB", "everything, MiB", "everything as RSS, MiB", "by process"], rows)


def setups(results: Results) -> list[str]:
    """Versions and settings, and what is missing."""
    rows = [[results.titles[name], results.versions[name], setup] for name, setup in results.setups.items()]
    lines = [*table(["", "version", "set up as"], rows), ""]
    missing = [*results.absent.values(), *[f"{what}: no time" for what in results.left_out]]
    if missing:
        lines += ["Not measured:", "", *[f"- {reason}" for reason in missing], ""]
    return lines
