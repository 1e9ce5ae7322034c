"""What the benchmarks conclude: capacity from an open loop, the load generator's books, verdicts."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.capacity import search
from benchmarks.load.generator import offer
from benchmarks.results import CurvePoint, Point, Results, of_each_load
from benchmarks.verdict import verdicts

RATE, SECONDS = 400.0, 0.5


def served(capacity: float) -> Callable[[float], dict[str, Any]]:
    return lambda rate: {"goodput_per_s": min(rate, capacity)}


def test_capacity_is_where_goodput_stops_growing() -> None:
    found = search(served(1000), 300)
    assert found.per_s == 1000
    assert [rate for rate, _ in found.steps] == [300, 390, 507, 659, 857, 1114]


def test_capacity_of_a_server_that_collapses_is_its_best() -> None:
    found = search(lambda rate: {"goodput_per_s": rate if rate < 500 else 10.0}, 300)
    assert found.per_s == 390


def test_a_search_ends_also_where_goodput_never_stops_growing() -> None:
    assert len(search(served(1e12), 1000).steps) == 12


async def load(
    tmp_path: Path, answer: Callable[[int], tuple[float, bytes] | None], **given: Any
) -> dict[str, object]:
    """Offer RATE for SECONDS to a server that answers request number n as `answer(n)` says: after so many
    seconds these bytes, or by hanging up."""
    requests = tmp_path / "requests"
    request = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
    requests.write_bytes(b"%d\n%s" % (len(request), request))
    count = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                count += 1
                said = answer(count)
                if said is None:
                    break
                await asyncio.sleep(said[0])
                writer.write(said[1])
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    usual = {
        "requests": requests,
        "host": "127.0.0.1",
        "port": server.sockets[0].getsockname()[1],
        "rate": RATE,
        "connections": 50,
        "seconds": SECONDS,
        "warm_up": 0.0,
        "patience": 0.3,
        "wait": 0.3,
        "begun": None,
    }
    said = await offer(argparse.Namespace(**usual | given))
    server.close()
    return said


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"
BARE = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n"
LATE = 0.45
KINDS = ("answered", "late", "refused", "unanswered", "abandoned")


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (lambda _: (0.0, OK), "answered"),
        (lambda _: (0.0, BUSY), "refused"),
        (lambda _: (LATE, OK), "late"),
        (lambda _: (60.0, OK), "unanswered"),
        (lambda _: (0.0, b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n"), "HTTP 500"),
        (lambda n: None if n % 2 else (0.0, OK), "connection lost"),
    ],
)
async def test_every_request_is_in_the_books_once(tmp_path: Path, answer: Any, kind: str) -> None:
    said: dict[str, Any] = await load(tmp_path, answer)
    books = {name: said[name] for name in KINDS} | said["other"]
    assert sum(books.values()) == RATE * SECONDS
    assert books[kind] > 0


async def test_refusals_without_a_time_to_come_back_are_told(tmp_path: Path) -> None:
    said = await load(tmp_path, lambda n: (0.0, BARE if n % 2 else BUSY))
    assert said["refused"] == RATE * SECONDS
    assert said["refused_without_retry_after"] == RATE * SECONDS / 2


def point(front: str, rate: float, p99_us: float, connections: int = 32, target: str = "") -> Point:
    return Point(
        target or front.lower(), front, "mlp", connections, 0, rate, 500, 500, p99_us, p99_us, {}, {}, None
    )


def results(points: list[Point], curves: list[CurvePoint]) -> Results:
    found = Results("now", "full", {"cores": "2"}, "wrk", 2, 1, points=points, curves=curves)
    found.setups = {one.target: "" for one in points}
    return found


def curve(fraction: float, goodput: float, **said: Any) -> CurvePoint:
    summary: dict[str, Any] = {
        "offered_per_s": 1000 * fraction,
        "goodput_per_s": goodput,
        **dict.fromkeys(("p50_us", "p90_us", "p99_us", "p999_us"), 1000.0),
        "refused": 0,
        "refused_without_retry_after": 0,
        **dict.fromkeys(("late", "unanswered", "abandoned", "not_connected"), 0),
        "lag_p99_us": 100.0,
        "refused_p99_us": None,
        "refused_max_us": None,
        "other": {},
    }
    return CurvePoint("headrace", "Headrace", "busy", fraction, summary | said)


def met(found: Results) -> dict[str, bool | None]:
    return {one.wanted: one.met for one in verdicts(found, "mlp", "busy")}


def test_triton_is_beaten_in_rate_and_tail_or_not_at_all() -> None:
    wanted = "c = 32: at least Triton's answers/s, and below its p99"
    ours = point("Headrace", 1000, 900)
    assert met(results([ours, point("Triton", 1000, 901)], []))[wanted] is True
    assert met(results([ours, point("Triton", 1001, 901)], []))[wanted] is False
    assert met(results([ours, point("Triton", 900, 900)], []))[wanted] is False
    assert met(results([ours], []))[wanted] is None


def test_the_best_python_peer_counts() -> None:
    wanted = "c = 32: at least 5× the best Python peer's answers/s"
    peers = [point("MLServer", 100, 900), point("Ray Serve", 200, 900, target="ray")]
    assert met(results([point("Headrace", 1000, 900), *peers], []))[wanted] is True
    assert met(results([point("Headrace", 999, 900), *peers], []))[wanted] is False


def test_overload_is_judged_by_the_peak_and_by_the_slowest_refusal() -> None:
    kept = "twice the capacity offered: goodput at least 90% of the peak"
    soon = "every refusal within 50 ms, with 429 or 503 and Retry-After"
    refusing = {"refused": 10, "refused_p99_us": 9000.0, "refused_max_us": 49_000.0}
    fine = met(results([], [curve(1.0, 1000), curve(2.0, 900, **refusing)]))
    assert (fine[kept], fine[soon]) == (True, True)
    slow = met(results([], [curve(1.0, 1000), curve(2.0, 899, **refusing | {"refused_max_us": 51_000.0})]))
    assert (slow[kept], slow[soon]) == (False, False)
    bare = met(results([], [curve(2.0, 900, **refusing, refused_without_retry_after=1)]))
    assert bare[soon] is False
    assert met(results([], [curve(1.0, 1000)]))[soon] is None


def test_loads_offered_again_count_by_their_medians_and_their_worst_refusals() -> None:
    kept = "twice the capacity offered: goodput at least 90% of the peak"
    soon = "every refusal within 50 ms, with 429 or 503 and Retry-After"
    refusing = {"refused": 10, "refused_p99_us": 9000.0, "refused_max_us": 49_000.0}
    lucky = curve(0.97, 1200)  # a single window of the search for the capacity
    runs = [
        curve(fraction, goodput, **refusing)
        for fraction, goodputs in ((1.0, (1000, 900, 1100)), (2.0, (910, 905, 400)))
        for goodput in goodputs
    ]
    found = met(results([], [lucky, *runs]))
    assert (found[kept], found[soon]) == (True, True)
    runs[-1].summary["refused_max_us"] = 51_000.0
    runs[-2].summary["goodput_per_s"] = 890
    found = met(results([], [lucky, *runs]))
    assert (found[kept], found[soon]) == (False, False)
    both = of_each_load(runs)
    assert [(one.fraction, one.summary["goodput_per_s"], one.summary["refused"]) for one in both] == [
        (1.0, 1000, 30),
        (2.0, 890, 30),
    ]
    assert both[1].summary["least_goodput_per_s"] == 400
