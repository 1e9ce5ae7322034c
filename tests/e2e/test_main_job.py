"""What a newcomer does with the platform, and what the platform promises about it."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections import Counter
from pathlib import Path

import numpy as np

from deploy.embedded.blueprint import python_path
from deploy.embedded.configuration import REPOSITORY
from deploy.embedded.stack import Stack
from examples import cancer
from tests.e2e.rest import caller, predict_all, settled, total
from tests.fixtures.asking import until

REFERENCE = Path(__file__).parents[1] / "integration" / "data" / "minilm_reference.json"


async def test_a_thousand_requests_are_right_sticky_split_and_counted(platform: Stack) -> None:
    data = cancer.load()
    rows = np.concatenate([data.train_rows, data.held_out_rows])
    places = np.arange(1000) % len(rows)
    run = uuid.uuid4().hex[:8]
    users = [f"{run}-{number % 500}" for number in range(1000)]
    async with caller(platform) as client:
        before = await settled(platform, client, "cancer")
        answers = await predict_all(client, "cancer", rows[places], users)
        await until(client, "/v1/analytics/models/cancer", lambda shown: total(shown) >= before + 1000)
        assert await settled(platform, client, "cancer") == before + 1000

    labels = {
        version: [data.classes[int(label)] for label in cancer.train(version, data).predict(rows)]
        for version in ("1", "2")
    }
    for place, answer in zip(places, answers, strict=True):
        assert answer["prediction"] == [labels[answer["version"]][place]]
    version_of: dict[str, set[str]] = {}
    for user, answer in zip(users, answers, strict=True):
        version_of.setdefault(user, set()).add(answer["version"])
    assert all(len(versions) == 1 for versions in version_of.values())
    shares = Counter(next(iter(versions)) for versions in version_of.values())
    # 500 users at 10%: 50 expected, standard deviation 6.7; four of them either way.
    assert 23 <= shares["2"] <= 77


async def test_the_answer_says_what_was_answered_and_analytics_can_look_it_up(platform: Stack) -> None:
    data = cancer.load()
    async with caller(platform) as client:
        row = data.held_out_rows[0]
        body = {"model": "cancer", "inputs": [row.tolist()], "user_id": "somebody", "version": "2"}
        answer = (await client.post("/v1/predict", json=body)).json()
        assert answer["model"] == "cancer"
        assert answer["version"] == "2"
        assert answer["cached"] is False
        assert 0 < answer["latency_ms"] < 10_000
        assert set(answer["outputs"]) == {"label", "probabilities"}

        single = {"model": "cancer", "input": row.tolist()}
        shaped = (await client.post("/api/v1/predict", json=single)).json()
        assert shaped["prediction"] in data.classes
        assert 0.5 <= shaped["confidence"] <= 1

        path = f"/v1/analytics/predictions/{answer['request_id']}"
        found = await until(client, path, lambda shown: shown["version"] == "2")
        version = (await client.get("/v1/models/cancer/versions/2")).json()
        assert found["artifact_digest"] == version["artifact_digest"]


async def test_named_columns_rows_and_tensors_are_the_same_request(platform: Stack) -> None:
    data = cancer.load()
    rows = data.held_out_rows[:3]
    columns = {name: column.tolist() for name, column in zip(data.columns, rows.T, strict=True)}
    objects = [dict(zip(data.columns, row.tolist(), strict=True)) for row in rows]
    forms = [rows.tolist(), columns, objects, {"features": rows.tolist()}]
    async with caller(platform) as client:
        answers = []
        for inputs in forms:
            body = {"model": "cancer", "inputs": inputs, "version": "champion"}
            answer = await client.post("/v1/predict", json=body)
            assert answer.status_code == 200, answer.text
            answers.append(answer.json()["outputs"])
    assert answers[0] == answers[1] == answers[2] == answers[3]


async def test_embeddings_are_those_of_sentence_transformers(platform: Stack) -> None:
    reference = json.loads(REFERENCE.read_text())
    async with caller(platform) as client:
        body = {"model": "minilm", "inputs": reference["sentences"]}
        answer = (await client.post("/v1/embed", json=body)).json()
    assert answer["dimensions"] == 384
    assert np.allclose(answer["embeddings"], reference["embeddings"], atol=2e-6)


async def test_outcomes_reach_the_comparison(platform: Stack) -> None:
    data = cancer.load()
    count = 1600  # the smaller arm needs 100 users for the always-valid interval
    users = [f"labelled-{uuid.uuid4().hex[:12]}" for _ in range(count)]
    rows = data.held_out_rows[np.arange(count) % len(data.held_out_rows)]
    truth = data.held_out_labels[np.arange(count) % len(data.held_out_rows)]
    async with caller(platform) as client:
        answers = await predict_all(client, "cancer", rows, users)
        outcomes = [
            {"request_id": answer["request_id"], "model": "cancer", "label": data.classes[int(label)]}
            for answer, label in zip(answers, truth, strict=True)
        ]
        posted = await client.post("/v1/outcomes", json=outcomes)
        assert posted.status_code == 202, posted.text
        path = "/v1/analytics/models/cancer/compare?a=1&b=2&metric=accuracy"
        shown = await until(client, path, lambda body: body["a"]["units"] + body["b"]["units"] >= count)
    assert 0.9 < shown["a"]["mean"] <= 1
    for result in (shown["absolute"], shown["sequential"]):
        low, high = result["interval"]
        assert low <= result["estimate"] <= high
        assert 0 <= result["p_value"] <= 1
    assert shown["sequential"]["always_valid"]
    assert not shown["absolute"]["always_valid"]
    assert any("Peeking" in warning for warning in shown["warnings"])


def test_a_real_triton_client_speaks_to_it(platform: Stack) -> None:
    """In a process of its own: the client's messages have the names of ours."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.triton_session", platform.rest_url, platform.grpc_address],
        input=platform.admin_key,
        cwd=REPOSITORY,
        env={"PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "every check passed"


def test_the_tour_ends_with_an_alert(platform: Stack) -> None:
    where = ["--url", platform.rest_url, "--key-file", str(platform.configuration.admin_key_file)]
    done = subprocess.run(
        [sys.executable, "-m", "examples.traffic", *where, "--requests", "800"],
        cwd=REPOSITORY,
        env={"PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mean radius of cancer/1 has shifted" in done.stdout
