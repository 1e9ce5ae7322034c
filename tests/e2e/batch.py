"""Jobs against a running platform: inputs to submit, and what to expect of their results."""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from examples import cancer
from tests.fixtures.waiting import PATIENCE_S

Json = dict[str, Any]
ENDED = {"completed", "failed", "cancelled", "expired"}


@dataclass(frozen=True, slots=True)
class Patients:
    """Rows FP32 [n, 30] near those of the data set, and what scikit-learn says to each."""

    rows: NDArray[np.float32]
    labels: NDArray[np.int64]
    columns: list[str]

    @classmethod
    def some(cls, count: int, seed: int = 7) -> Patients:
        """The same for the same seed. Rows near the border between the classes are left out: there FP32 in
        one order of operations says the one, in another the other."""
        data = cancer.load()
        known = np.concatenate([data.train_rows, data.held_out_rows])
        rng = np.random.default_rng(seed)
        model: Any = cancer.train("1", data)
        probability = np.abs(model.predict_proba(known)[:, 1] - 0.5)
        clear = known[probability > 0.05]
        rows = clear[rng.integers(0, len(clear), count)]
        scaled = (rows * (1 + rng.normal(0, 1e-4, (count, 1)))).astype(np.float32)
        return cls(scaled, model.predict(scaled), data.columns)

    def parquet(self, path: Path, group: int = 16_384, **columns: Any) -> Path:
        """A column per measurement, and the further `columns`."""
        given = {name: pa.array(self.rows[:, at]) for at, name in enumerate(self.columns)}
        pq.write_table(pa.table({**columns, **given}), path, row_group_size=group)
        return path


def submitted(client: httpx.Client, **body: Any) -> str:
    """The id of a new job."""
    answer = client.post("/v1/batch", json=body)
    assert answer.status_code == 202, answer.text
    assert answer.json()["status"] in {"validating", "in_progress", "completed"}
    return str(answer.json()["batch_id"])


def ended(client: httpx.Client, batch_id: str, within_s: float = PATIENCE_S) -> Json:
    """The job once it has ended."""
    deadline = time.monotonic() + within_s
    while True:
        answer = client.get(f"/v1/batch/{batch_id}")
        assert answer.status_code == 200, answer.text
        body: Json = answer.json()
        if body["status"] in ENDED:
            return body
        if time.monotonic() > deadline:
            pytest.fail(f"{batch_id} has not ended: {body}")
        time.sleep(0.1)


def lines(client: httpx.Client, path: str) -> list[Json]:
    """JSON Lines at `path`."""
    answer = client.get(path)
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def uploaded(client: httpx.Client, path: Path, purpose: str = "data") -> Json:
    """The file as the platform keeps it."""
    with path.open("rb") as file:
        answer = client.post("/v1/files", data={"purpose": purpose}, files={"file": (path.name, file)})
    assert answer.status_code == 200, answer.text
    body: Json = answer.json()
    return body


def check_results(results: list[Json], patients: Patients, rows: list[int] | None = None) -> None:
    """Every row once, in order, with scikit-learn's answer."""
    wanted = list(range(len(patients.rows))) if rows is None else rows
    assert [one["row"] for one in results] == wanted
    assert [one["outputs"]["label"] for one in results] == patients.labels[wanted].tolist()


@dataclass
class Receiver:
    """Takes callbacks on loopback. The first `refused` get a 500."""

    secret: str = ""
    refused: int = 0
    hang_s: float = 0.0
    port: int = 0
    seen: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    def verified(self, secret: str) -> list[Json]:
        """The bodies of all calls; fails on a signature that is not right."""
        bodies = []
        for headers, body in self.seen:
            told = dict(part.split("=", 1) for part in headers["x-headrace-signature"].split(","))
            mac = hmac.new(secret.encode(), f"{told['t']}.".encode() + body, hashlib.sha256).hexdigest()
            assert hmac.compare_digest(mac, told["v1"])
            assert abs(time.time() - int(told["t"])) < 120
            bodies.append(json.loads(body))
        return bodies


@contextmanager
def receiving(refused: int = 0, hang_s: float = 0.0) -> Iterator[Receiver]:
    """A receiver while the block runs."""
    receiver = Receiver(refused=refused, hang_s=hang_s)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if receiver.hang_s:
                time.sleep(receiver.hang_s)
            receiver.seen.append(({name.lower(): value for name, value in self.headers.items()}, body))
            self.send_response(500 if len(receiver.seen) <= receiver.refused else 204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    receiver.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
