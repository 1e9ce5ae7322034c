"""Closed-loop load on a gRPC front by h2load: every connection has one call under way."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.load.requests import Endpoint

#: Answers whose data is this much smaller than a good one's are errors: gRPC says 200 to everything.
SMALLEST_SHARE = 0.8
_COUNTS = re.compile(r"requests: .* (\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout")
_DATA = re.compile(r"traffic: .*\((\d+)\) data")


def grpc_loop(
    endpoint: Endpoint, frame: Path, connections: int, seconds: float, answer_bytes: int
) -> dict[str, Any]:
    """Call `endpoint` with the message of `frame`. Gives answered calls, seconds, sorted latencies in µs and
    errors by kind. `answer_bytes` is the size of a good answer, its prefix included."""
    log = frame.with_suffix(".h2load")
    log.unlink(missing_ok=True)
    argv = ["h2load", "-t1", f"-c{connections}", "-m1", f"-D{max(1, round(seconds))}", "--warm-up-time=500ms"]
    argv += ["-d", str(frame), "--log-file", str(log), "-H", "content-type: application/grpc"]
    for name, value in (("te", "trailers"), *endpoint.headers):
        argv += ["-H", f"{name.lower()}: {value}"]
    done = subprocess.run(
        [*argv, f"http://{endpoint.host}:{endpoint.port}{endpoint.path}"],
        capture_output=True,
        text=True,
        timeout=seconds + 60,
        check=False,
    )
    counts, data = _COUNTS.search(done.stdout), _DATA.search(done.stdout)
    if counts is None or data is None:
        return _failed(f"h2load: {done.stderr.strip()[-200:] or 'says nothing'}")
    succeeded, failed, errored, timed_out = (int(count) for count in counts.groups())
    kinds = {"failed": failed, "errored": errored, "timeout": timed_out}
    errors = {kind: count for kind, count in kinds.items() if count}
    if not succeeded:
        return _failed("no answers")
    if int(data[1]) < SMALLEST_SHARE * answer_bytes * succeeded:
        errors["answers without data"] = succeeded - int(data[1]) // answer_bytes
    fields = [line.split("\t") for line in log.read_text().splitlines()]
    times = sorted(float(took) for _start, status, took, *_more in fields if status == "200")
    return {"answered": succeeded, "seconds": max(1, round(seconds)), "times_us": times, "errors": errors}


def _failed(why: str) -> dict[str, Any]:
    return {"answered": 0, "seconds": 1.0, "times_us": [], "errors": {why: 1}}
