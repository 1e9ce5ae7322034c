"""The tour: users, labels, an experiment, and data that drift. `python -m examples.traffic`

Replays the held-out patients of `cancer` as users, posts what was true for each, asks analytics whether
version 2 is better than version 1, then shifts one measurement until drift raises an alert. With `--steady`
users come at an even pace, their measurements as they always were, until they are told to stop: what
experiments and rollouts are watched with.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count as numbers
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from examples import cancer

MODEL = "cancer"
SHIFTED = "mean radius"
ALERT_WITHIN_S = 60.0
AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Patient:
    """One request: who asks, the 30 measurements, and what was true."""

    user: str
    row: list[float]
    label: str


def patients(data: cancer.Data, shift: float = 0.0, prefix: str = "patient") -> Iterator[Patient]:
    """Requests of held-out rows, again and again, each of a user of its own; `shift` moves one column by that
    many of its standard deviations."""
    rows: NDArray[np.float32] = data.held_out_rows.copy()
    column = data.columns.index(SHIFTED)
    rows[:, column] += shift * rows[:, column].std()
    for number in numbers():
        place = number % len(rows)
        yield Patient(
            user=f"{prefix}-{number}",
            row=rows[place].tolist(),
            label=data.classes[int(data.held_out_labels[place])],
        )


def send(client: httpx.Client, patient: Patient) -> dict[str, Any]:
    """One prediction, and its label as the outcome."""
    body = {"model": MODEL, "inputs": [patient.row], "user_id": patient.user}
    answer = _json(client.post("/v1/predict", json=body))
    outcome = {"request_id": answer["request_id"], "label": patient.label}
    _json(client.post("/v1/outcomes", json=outcome | {"model": MODEL}))
    return answer


def replay(client: httpx.Client, requests: Iterator[Patient]) -> list[dict[str, Any]]:
    """Send all of `requests`, several at once."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda patient: send(client, patient), requests))


def tour(client: httpx.Client, count: int) -> int:
    """0 when every part showed what it should."""
    data = cancer.load()
    print(f"1. {count} patients ask for a diagnosis, and each diagnosis gets its true label.")
    answers = replay(client, islice(patients(data), count))
    shares = Counter(answer["version"] for answer in answers)
    print("   answered by", ", ".join(f"version {v}: {n}" for v, n in sorted(shares.items())))

    print("2. Is version 2 better than version 1?")
    time.sleep(2)  # outcomes travel through Kafka
    for line in better(client):
        print(f"   {line}")

    print(f"3. {SHIFTED!r} moves by two standard deviations; drift should notice.")
    deadline = time.monotonic() + ALERT_WITHIN_S
    while time.monotonic() < deadline:
        replay(client, islice(patients(data, shift=2.0), count))
        alerts = _json(client.get("/v1/drift/alerts", params={"model": MODEL, "state": "open"}))["alerts"]
        shifted = [alert for alert in alerts if alert["feature"] == SHIFTED]
        if shifted:
            for alert in shifted:
                print(f"   {alert['severity']}: {alert['message']}")
            return 0
    print(f"   no alert on {SHIFTED!r} within {ALERT_WITHIN_S:g} s")
    return 1


def better(client: httpx.Client) -> Iterator[str]:
    """What is known of version 2 against version 1. The users of an experiment are divided by its weights and
    not by the deployment's: while one runs, its own results say it."""
    running = _json(client.get("/v1/experiments", params={"model": MODEL, "status": "running"}))[
        "experiments"
    ]
    for experiment in running:
        results = _json(client.get(f"/v1/experiments/{experiment['experiment_id']}/results"))
        yield f"{experiment['experiment_id']}: {results['summary']}"
    if running:
        return
    question = {"a": "1", "b": "2", "metric": "accuracy"}
    verdict = _json(client.get(f"/v1/analytics/models/{MODEL}/compare", params=question))
    yield verdict["summary"]
    yield from (f"warning: {warning}" for warning in verdict["warnings"])
    yield f"every number: headrace compare {MODEL} 1 2 --json"


def steady(client: httpx.Client, rate: float, stop: threading.Event) -> int:
    """Some `rate` users a second, none of whom was here before, until `stop`; how many there were. A gateway
    that answers more slowly is asked more slowly."""
    users = patients(cancer.load(), prefix=f"patient-{uuid.uuid4().hex[:8]}")
    taking = threading.Lock()
    began = time.monotonic()
    sent = 0

    def keep_asking() -> None:
        nonlocal sent
        while not stop.is_set():
            with taking:
                patient, due = next(users), began + sent / rate
                sent += 1
            if stop.wait(max(0.0, due - time.monotonic())):
                return
            send(client, patient)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        asking = [pool.submit(keep_asking) for _ in range(AT_ONCE)]
        try:
            for one in asking:
                one.result()
        finally:
            stop.set()
    return sent


def _json(answer: httpx.Response) -> dict[str, Any]:
    if not answer.is_success:
        raise SystemExit(f"{answer.request.method} {answer.request.url}: {answer.status_code} {answer.text}")
    body: dict[str, Any] = answer.json()
    return body


def main() -> int:
    """Read the arguments and give the tour."""
    parser = argparse.ArgumentParser(prog="python -m examples.traffic", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the gateway answers")
    parser.add_argument("--key-file", type=Path, default=Path(".headrace/admin.key"))
    parser.add_argument("--requests", type=int, default=1500, help="requests per part of the tour")
    parser.add_argument(
        "--steady", action="store_true", help="no tour: users who do not change, until Ctrl-C or kill"
    )
    parser.add_argument("--rate", type=float, default=200.0, help="users a second with --steady")
    arguments = parser.parse_args()
    if arguments.rate <= 0:
        parser.error("--rate is above 0")
    headers = {"authorization": f"Bearer {arguments.key_file.read_text().strip()}"}
    limits = httpx.Limits(max_connections=AT_ONCE)
    with httpx.Client(base_url=arguments.url, headers=headers, timeout=30, limits=limits) as client:
        if not arguments.steady:
            return tour(client, arguments.requests)
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        print(f"{arguments.rate:g} users a second come to {MODEL}; Ctrl-C ends it.", flush=True)
        print(f"{steady(client, arguments.rate, stop)} users came.")
        return 0


if __name__ == "__main__":
    sys.exit(main())
