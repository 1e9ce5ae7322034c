"""The tour's traffic, against a gateway that only listens."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import numpy as np

from examples import cancer, traffic


class Gateway:
    """Answers what the tour asks, and tells what it was asked."""

    def __init__(self, running: list[str], stop_after: int = 0, stop: threading.Event | None = None) -> None:
        self.asked: list[dict[str, Any]] = []
        self._running = running
        self._stop_after = stop_after
        self._stop = stop
        self._lock = threading.Lock()

    def answer(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if path == "/v1/predict":
            with self._lock:
                self.asked.append(json.loads(request.content))
                if self._stop is not None and len(self.asked) >= self._stop_after:
                    self._stop.set()
                return httpx.Response(200, json={"request_id": str(len(self.asked)), "version": "1"})
        if path == "/v1/outcomes":
            return httpx.Response(202, json={})
        if path == "/v1/experiments":
            return httpx.Response(
                200, json={"experiments": [{"experiment_id": one} for one in self._running]}
            )
        if path.endswith("/results"):
            return httpx.Response(200, json={"summary": f"what {path.split('/')[3]} shows"})
        return httpx.Response(200, json={"summary": "what the split shows", "warnings": ["it is early"]})

    def client(self) -> httpx.Client:
        return httpx.Client(base_url="http://gateway", transport=httpx.MockTransport(self.answer))


def test_steady_users_are_new_ones_with_the_measurements_of_ever() -> None:
    stop = threading.Event()
    gateway = Gateway([], stop_after=40, stop=stop)
    with gateway.client() as client:
        sent = traffic.steady(client, rate=10_000, stop=stop)
    assert 40 <= len(gateway.asked) <= sent
    users = [asked["user_id"] for asked in gateway.asked]
    assert len(set(users)) == len(users)
    known = {tuple(row) for row in cancer.load().held_out_rows.tolist()}
    assert {tuple(asked["inputs"][0]) for asked in gateway.asked} <= known
    again = threading.Event()
    other = Gateway([], stop_after=1, stop=again)
    with other.client() as client:
        traffic.steady(client, rate=10_000, stop=again)
    assert not set(users) & {asked["user_id"] for asked in other.asked}


def test_while_an_experiment_runs_its_own_results_are_told() -> None:
    """Its users are not of the deployment's split, of which the comparison knows."""
    with Gateway(["exp_1"]).client() as client:
        assert list(traffic.better(client)) == ["exp_1: what exp_1 shows"]
    with Gateway([]).client() as client:
        assert list(traffic.better(client)) == [
            "what the split shows",
            "warning: it is early",
            "every number: headrace compare cancer 1 2 --json",
        ]


def test_the_tour_shifts_one_measurement_alone() -> None:
    data = cancer.load()
    plain, shifted = (next(traffic.patients(data, shift)) for shift in (0.0, 2.0))
    moved = np.array(shifted.row) != np.array(plain.row)
    assert [data.columns[place] for place in np.flatnonzero(moved)] == [traffic.SHIFTED]
