"""A job of 200,000 rows while everything around it dies, in an order that a seed decides: it completes, and
each row has exactly one result, the right one."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
from headrace_client import Headrace, HeadraceError
from onnx import TensorProto, helper, numpy_helper

from deploy.embedded.stack import Stack
from examples import cancer
from tests.e2e.batch import ENDED, Json, Patients
from tests.fixtures.servers import kafka_home
from tests.fixtures.waiting import PATIENCE_S

ROWS = 200_000
SEED = int(os.environ.get("CHAOS_SEED", "20261121"))
#: The longest wait for progress before the next one dies.
NO_PROGRESS_S = 2.0
WITHIN_S = 400.0
MODEL = "slow-cancer"
#: Width of the two layers that keep a worker busy, so that the job lasts for some seconds.
WIDTH = 1024


def _asked(client: httpx.Client, method: str, path: str, **more: Any) -> httpx.Response | None:
    """The answer; None where nobody was there, or nobody could answer for now."""
    try:
        answer = client.request(method, path, **more)
    except httpx.TransportError:
        return None
    return None if answer.status_code in {499, 502, 503, 504} else answer


def _until(
    client: httpx.Client, method: str, path: str, within_s: float = PATIENCE_S, **more: Any
) -> httpx.Response:
    deadline = time.monotonic() + within_s
    while (answer := _asked(client, method, path, **more)) is None:
        assert time.monotonic() < deadline, f"{path} was not answered"
        time.sleep(0.2)
    return answer


def _deploy(stack: Stack, folder: Path) -> None:
    """The logistic regression of `cancer`, with an output beside it that takes long to compute."""
    path, _metrics = cancer.build("1", folder)
    model = onnx.load(str(path))
    rng = np.random.default_rng(SEED)
    shapes = {"w1": (30, WIDTH), "w2": (WIDTH, WIDTH)}
    model.graph.initializer.extend(
        numpy_helper.from_array(rng.normal(0, 0.01, shape).astype(np.float32), name)
        for name, shape in shapes.items()
    )
    axes = numpy_helper.from_array(np.array([1], np.int64), "axes")
    model.graph.initializer.append(axes)
    model.graph.node.extend(
        [
            helper.make_node("MatMul", ["features", "w1"], ["h1"]),
            helper.make_node("Relu", ["h1"], ["r1"]),
            helper.make_node("MatMul", ["r1", "w2"], ["h2"]),
            helper.make_node("ReduceMean", ["h2", "axes"], ["work"], keepdims=0),
        ]
    )
    model.graph.output.append(helper.make_tensor_value_info("work", TensorProto.FLOAT, ["n"]))
    path.write_bytes(model.SerializeToString())
    row = [cancer.load().held_out_rows[0].tolist()]
    with Headrace(stack.rest_url, stack.admin_key) as client:
        client.push_model(MODEL, path, version="1")
        client.deploy(MODEL, {"1": 100})
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                client.predict(MODEL, row)
            except HeadraceError:
                assert time.monotonic() < deadline
                time.sleep(0.2)
            else:
                return


def _kill_in_any_order(stack: Stack, client: httpx.Client, job: str, broker: str, seed: int) -> list[str]:
    """SIGKILL the parts, one after another, while the job runs; what died while it still ran."""
    dice = random.Random(seed)
    victims = [*dice.sample(["worker-0", "worker-1", "worker-2"], 2), "gateway", broker, "postgres"]
    dice.shuffle(victims)
    shares = sorted(dice.uniform(0.02, 0.6) for _ in victims)
    died: list[str] = []
    for victim, share in zip(victims, shares, strict=True):
        if _at(client, job, share * ROWS) in ENDED:
            break
        stack.kill(victim)
        died.append(victim)
    return died


def _at(client: httpx.Client, job: str, rows: float) -> str:
    """The state of the job once so many rows are done, or after a while: whoever would tell may be dead."""
    state, deadline = "", time.monotonic() + NO_PROGRESS_S
    while time.monotonic() < deadline and state not in ENDED:
        answer = _asked(client, "GET", f"/v1/batch/{job}")
        if answer is not None:
            told = answer.json()
            state = told["status"]
            if told["counts"]["completed"] >= rows:
                break
        time.sleep(0.05)
    return state


def _survives(stack: Stack, broker: str, seed: int, tmp_path: Path) -> None:
    patients = Patients.some(ROWS)
    folder = stack.home / "data"
    folder.mkdir(exist_ok=True)
    path = patients.parquet(folder / "patients.parquet", group=8192)
    headers = {"authorization": f"Bearer {stack.admin_key}"}
    with httpx.Client(base_url=stack.rest_url, headers=headers, timeout=10) as client:
        body = {"model": MODEL, "version": "1", "input_uri": path.as_uri(), "output_format": "parquet"}
        key = {"idempotency-key": f"chaos-{seed}"}
        job = _until(client, "POST", "/v1/batch", json=body, headers=key).json()["batch_id"]
        died = _kill_in_any_order(stack, client, job, broker, seed)
        deadline = time.monotonic() + WITHIN_S
        while True:
            answer = _until(client, "GET", f"/v1/batch/{job}")
            told: Json = answer.json()
            if told["status"] in ENDED:
                break
            assert time.monotonic() < deadline, (seed, died, told)
            time.sleep(0.3)
        assert told["status"] == "completed", (seed, died, told)
        assert len(died) == 5, f"the job was over before everything had died: {died}"
        assert told["counts"] == {"total": ROWS, "completed": ROWS, "failed": 0}, (seed, died, told)
        again = _until(client, "POST", "/v1/batch", json=body, headers=key).json()["batch_id"]
        assert again == job
        results = tmp_path / "results.parquet"
        results.write_bytes(_until(client, "GET", f"/v1/batch/{job}/results").content)
    table = pq.read_table(results)
    assert np.array_equal(table.column("row").to_numpy(), np.arange(ROWS)), (seed, died)
    assert np.array_equal(table.column("label").to_numpy(), patients.labels), (seed, died)


def test_each_row_once_whatever_dies_over_a_broker_in_memory(
    new_platform: Callable[..., Stack], tmp_path: Path
) -> None:
    """The embedded broker forgets everything: chunks are published again from the database."""
    stack = new_platform(workers=3)
    _deploy(stack, tmp_path)
    _survives(stack, "tansu", SEED, tmp_path)


@pytest.mark.kafka
def test_each_row_once_whatever_dies_over_apache_kafka(
    new_platform: Callable[..., Stack], tmp_path: Path
) -> None:
    home = kafka_home()
    if home is None:
        pytest.skip("no Apache Kafka here: set KAFKA_HOME")
    stack = new_platform(workers=3, kafka_home=Path(home))
    _deploy(stack, tmp_path)
    _survives(stack, "kafka", SEED + 1, tmp_path)
