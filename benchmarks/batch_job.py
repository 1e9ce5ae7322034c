"""A job of a million rows on the platform, beside the same file through ONNX Runtime alone, pandas and Ray
Data, and what an online request notices of it: `python -m benchmarks.batch_job [--rows N] [--no-peers]`.

Writes `batch_job.json` and `BATCH.md` beside this module. Every way reads the same Parquet file (30 FP32
columns) and has one thread of ONNX Runtime; everybody but the platform writes results as one Parquet file,
the platform writes them to its store as it does always, with prediction log, events and analytics going on.
The job is the worker process's; where cores are few the online requests beside it are answered by the
routers' guests, as after `make up`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime as ort
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.environments import REPOSITORY, PeerEnvironment
from benchmarks.load.drive import OpenLoop, open_loop
from benchmarks.load.requests import Endpoint, write_requests
from benchmarks.machine import machine
from benchmarks.platform_jobs import (
    WITHIN_S,
    become_idle,
    deploy,
    job_of,
    readable,
    running,
    sampled,
    saturated,
    seconds_of,
    warmed,
)
from benchmarks.process_tree import Unavailable
from benchmarks.servers.offline_job import session
from benchmarks.workload import Dialect, cancer_workload
from deploy.embedded.server import LOOPBACK
from deploy.embedded.stack import Stack
from examples import cancer

FOLDER = Path(__file__).parent
BATCHES = (256, 1024, 4096, 16_384, 65_536)
GROUP_ROWS = 65_536
#: One after another, so that memory which grows with what was done would be seen.
JOBS = 4
ONLINE_RATE = 200.0
ONLINE_S = 10.0
ONLINE_WINDOWS = 5
PEERS = {
    "pandas": PeerEnvironment("pandas", ("pandas==2.3.3", "pyarrow==26.0.0")),
    "ray": PeerEnvironment("ray-data", ("ray[data]==2.60.0", "pandas==2.3.3")),
}


@dataclass(slots=True)
class Figures:
    """Everything measured. Rates are rows per second, memory is bytes, latencies are milliseconds."""

    rows: int
    machine: dict[str, str]
    model: dict[str, float] = field(default_factory=dict)
    best_batch: int = 0
    offline: dict[str, float] = field(default_factory=dict)
    platform: dict[str, float] = field(default_factory=dict)
    #: By part: proportional set size before the jobs, at its highest, and in the last job over the first.
    memory: dict[str, dict[str, float]] = field(default_factory=dict)
    online: dict[str, dict[str, float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--version", default="2", choices=["1", "2"], help="of the cancer example")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--no-online", action="store_true")
    parser.add_argument("--only-online", action="store_true", help="leave the other figures as they were")
    parser.add_argument("--report", action="store_true", help="only write BATCH.md anew")
    parser.add_argument("--out", type=Path, default=FOLDER)
    given = parser.parse_args()
    if given.report:
        save(Figures(**json.loads((given.out / "batch_job.json").read_text())), given.out)
        return
    figures = Figures(given.rows, machine())
    if given.only_online:
        figures = Figures(**json.loads((given.out / "batch_job.json").read_text()))
    with tempfile.TemporaryDirectory(prefix="headrace-batch-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        source = patients(folder / "rows.parquet", given.rows)
        model, _metrics = cancer.build(given.version, folder / "model")
        if not given.only_online:
            alone(figures, model, source)
            offline(figures, model, source, [] if given.no_peers else list(PEERS))
        with running(folder / "home") as stack:
            if given.only_online:
                warmed(stack, given.version, source)
            else:
                on_the_platform(figures, stack, given.version, source)
            if not given.no_online:
                online(figures, stack, given.version, source, folder)
    save(figures, given.out)


def save(figures: Figures, out: Path) -> None:
    """Both files."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "batch_job.json").write_text(json.dumps(asdict(figures), indent=1) + "\n")
    (out / "BATCH.md").write_text(report(figures))
    print(report(figures))


def patients(path: Path, rows: int) -> Path:
    """Rows near those of the data set."""
    data = cancer.load()
    known = np.concatenate([data.train_rows, data.held_out_rows])
    rng = np.random.default_rng(7)
    schema = pa.schema([(name, pa.float32()) for name in data.columns])
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, rows, GROUP_ROWS):
            count = min(GROUP_ROWS, rows - first)
            some = known[rng.integers(0, len(known), count)] * rng.normal(1, 0.01, (count, 30))
            columns = [pa.array(column.astype(np.float32)) for column in some.T]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=GROUP_ROWS)
    return path


def alone(figures: Figures, model: Path, source: Path) -> None:
    """ONNX Runtime over rows that are in memory already, by batch: no way from file to file reaches it."""
    loaded = session(str(model))
    table = pq.ParquetFile(source).read_row_group(0)
    rows = np.stack([column.to_numpy() for column in table.columns], axis=1)
    for batch in BATCHES:
        if batch <= len(rows):
            figures.model[str(batch)] = max(_rate(loaded, rows, batch) for _ in range(3))
    figures.best_batch = int(max(figures.model, key=lambda batch: figures.model[batch]))


def _rate(loaded: ort.InferenceSession, rows: Any, batch: int) -> float:
    name = loaded.get_inputs()[0].name
    began = time.perf_counter()
    for first in range(0, len(rows), batch):
        loaded.run(None, {name: rows[first : first + batch]})
    return len(rows) / (time.perf_counter() - began)


def offline(figures: Figures, model: Path, source: Path, peers: list[str]) -> None:
    """From file to file without a platform."""
    for way in ("ort", *peers):
        environment = PEERS.get(way)
        try:
            if environment is not None:
                environment.install()
            took = [_offline(way, environment, model, source, figures.best_batch) for _ in range(2)]
        except Unavailable as error:
            figures.left_out[way] = str(error)
            continue
        figures.offline[way] = figures.rows / min(took)
        print(f"{way}: {figures.offline[way]:,.0f} rows/s", flush=True)


def _offline(way: str, environment: PeerEnvironment | None, model: Path, source: Path, batch: int) -> float:
    target = source.parent / f"{way}-{time.monotonic_ns()}.parquet"
    python = sys.executable if environment is None else str(environment.python)
    variables = (environment or PEERS["pandas"]).environ()
    done = subprocess.run(
        [
            python,
            "-m",
            "benchmarks.servers.offline_job",
            way,
            str(model),
            str(source),
            str(target),
            str(batch),
        ],
        cwd=REPOSITORY,
        env=variables | {"RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=False,
    )
    if done.returncode != 0:
        raise Unavailable(f"ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def on_the_platform(figures: Figures, stack: Stack, version: str, source: Path) -> None:
    """Jobs from their submission to `completed`, and the results of one as Parquet."""
    headers = {"authorization": f"Bearer {stack.admin_key}"}
    with httpx.Client(base_url=stack.rest_url, headers=headers, timeout=60) as client:
        deploy(client, version, source.parent / "model" / "model.onnx")
        uri = readable(stack, source)
        job_of(client, version, uri)  # the first one finds everything cold
        times = []
        with sampled(stack) as samples:
            for _ in range(JOBS):
                job = job_of(client, version, uri)
                times.append(seconds_of(job))
                if job["counts"]["completed"] != figures.rows:
                    raise RuntimeError(f"not every row was answered: {job}")
        took = statistics.median(times)
        began = time.perf_counter()
        size = 0
        with client.stream("GET", f"/v1/batch/{job['batch_id']}/results?format=parquet") as answer:
            for piece in answer.iter_bytes():
                size += len(piece)
        figures.platform = {
            "rows_per_s": figures.rows / took,
            "seconds": took,
            "seconds_of_results": time.perf_counter() - began,
            "bytes_of_results": size,
        }
    for part, values in samples.items():
        quarter = len(values) // 4 or 1
        figures.memory[part] = {
            "before": values[0],
            "peak": max(values),
            "growth": float(np.mean(values[-quarter:]) / np.mean(values[:quarter])),
        }
    print(f"platform: {figures.platform['rows_per_s']:,.0f} rows/s", flush=True)


def online(figures: Figures, stack: Stack, version: str, source: Path, folder: Path) -> None:
    """An open loop of one-row requests, while nothing else runs and while jobs saturate the worker."""
    headers = {"authorization": f"Bearer {stack.admin_key}"}
    port = stack.configuration.ports["GATEWAY_HTTP_PORT"]
    endpoint = Endpoint(
        LOOPBACK,
        port,
        "/v1/predict",
        Dialect.NATIVE,
        "cancer",
        (("Authorization", headers["authorization"]),),
    )
    requests = write_requests(folder / "requests.bin", endpoint, cancer_workload(folder / "workload"))
    load = OpenLoop(connections=16, seconds=ONLINE_S, rate=ONLINE_RATE, ahead=True)
    windows: dict[str, list[dict[str, float]]] = {"idle": [], "during jobs": []}
    rates: list[float] = []
    for _ in range(ONLINE_WINDOWS):
        become_idle(stack)
        windows["idle"].append(told(open_loop(endpoint, requests, load)))
        with saturated(stack, version, readable(stack, source), headers) as done:
            time.sleep(1.0)
            began, before = time.perf_counter(), done()
            windows["during jobs"].append(told(open_loop(endpoint, requests, load)))
            rates.append((done() - before) / (time.perf_counter() - began))
    for name, found in windows.items():
        # The median window: a machine of two processors is interrupted now and then.
        middle = sorted(found, key=lambda window: window["p99_us"])[len(found) // 2]
        figures.online[name] = middle | {
            "p99_us_least": min(window["p99_us"] for window in found),
            "p99_us_most": max(window["p99_us"] for window in found),
        }
    figures.online["during jobs"]["rows_per_s"] = statistics.median(rates)


def told(summary: dict[str, Any]) -> dict[str, float]:
    """What counts of the generator's summary."""
    return {name: value for name, value in summary.items() if isinstance(value, int | float)}


def report(figures: Figures) -> str:
    """The figures as Markdown."""
    best = figures.model[str(figures.best_batch)]
    lines = [
        f"# A job of {figures.rows:,} rows",
        "",
        "Written by `python -m benchmarks.batch_job`; its docstring says what is compared.",
        f"{figures.machine['processor']}, {figures.machine['cores']} cores.",
        "",
        "| way | rows/s | of ONNX Runtime from file to file |",
        "|---|---:|---:|",
    ]
    rates = {f"ONNX Runtime, rows in memory, batch {figures.best_batch}": best}
    rates["ONNX Runtime from file to file"] = figures.offline["ort"]
    rates["Headrace, from submission to completed"] = figures.platform["rows_per_s"]
    rates |= {way: rate for way, rate in figures.offline.items() if way != "ort"}
    lines += [f"| {way} | {rate:,.0f} | {rate / figures.offline['ort']:.0%} |" for way, rate in rates.items()]
    lines += [f"| {way} | left out: {why} | |" for way, why in figures.left_out.items()]
    lines += ["", "| part | MB before | at most | last job / first job |", "|---|---:|---:|---:|"]
    lines += [
        f"| {part} | {told['before'] / 1e6:.0f} | {told['peak'] / 1e6:.0f} | {told['growth']:.2f} |"
        for part, told in sorted(figures.memory.items())
    ]
    if figures.online:
        ratio = figures.online["during jobs"]["p99_us"] / figures.online["idle"]["p99_us"]
        rate = figures.online["during jobs"]["rows_per_s"]
        lines += [
            "",
            f"Online requests of one row, {ONLINE_RATE:.0f}/s in an open loop, windows of {ONLINE_S:.0f} s,",
            f"of {ONLINE_WINDOWS} the median (least and most in brackets). While two jobs at a time run at",
            f"{rate:,.0f} rows/s together, p99 is {ratio:.1f} times its idle value.",
            "",
            "| meanwhile | p50 ms | p99 ms | answered |",
            "|---|---:|---:|---:|",
        ]
        lines += [
            f"| {name} | {told['p50_us'] / 1e3:.1f} | {told['p99_us'] / 1e3:.1f} "
            f"({told['p99_us_least'] / 1e3:.1f}–{told['p99_us_most'] / 1e3:.1f}) | {told['answered']:.0f} |"
            for name, told in figures.online.items()
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
