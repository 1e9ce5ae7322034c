"""Jobs over many rows on the whole platform: every way in, every way to fail, and what comes out."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
import pytest
from aiokafka import AIOKafkaProducer
from headrace.v1.batch_pb2 import BatchJob
from headrace_client import AsyncHeadrace, Headrace

from deploy.embedded.blueprint import python_path
from deploy.embedded.configuration import REPOSITORY
from deploy.embedded.secret_files import load_or_create
from deploy.embedded.stack import Stack
from tests.e2e.batch import Json, Patients, check_results, ended, lines, receiving, submitted, uploaded
from tests.fixtures.waiting import PATIENCE_S, eventually_of, patience

PATIENTS = Patients.some(3000)
#: Texts that keep two workers for some ten seconds.
TEXTS = 10_000


@pytest.fixture
def client(platform: Stack) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {platform.admin_key}"}
    with httpx.Client(base_url=platform.rest_url, headers=headers, timeout=PATIENCE_S) as client:
        yield client


@pytest.fixture
def data(platform: Stack) -> Path:
    """The folder that inputs may be read from by `file://`."""
    folder = platform.home / "data"
    folder.mkdir(exist_ok=True)
    return folder


def write(patients: Patients, folder: Path, kind: str) -> Path:
    """The rows as a file of `kind`."""
    path = folder / f"patients.{kind}"
    table = pa.table({name: pa.array(patients.rows[:, at]) for at, name in enumerate(patients.columns)})
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=700)
    elif kind == "arrow":
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table, 700)
    elif kind == "csv":
        pc.write_csv(table, str(path))
    else:
        path.write_text("".join(json.dumps(row.tolist()) + "\n" for row in patients.rows))
    return path


# Ways in.


@pytest.mark.parametrize("kind", ["parquet", "arrow", "csv", "jsonl"])
def test_files_are_answered_as_scikit_learn_does(client: httpx.Client, data: Path, kind: str) -> None:
    path = write(PATIENTS, data, kind)
    uri = path.as_uri() if kind in {"parquet", "csv"} else uploaded(client, path)["uri"]
    job = ended(client, submitted(client, model="cancer", version="1", input_uri=uri))
    assert job["status"] == "completed", job
    assert job["counts"] == {"total": 3000, "completed": 3000, "failed": 0}
    assert job["rows_per_s"] > 0
    results = lines(client, f"/v1/batch/{job['batch_id']}/results")
    check_results(results, PATIENTS)
    assert np.allclose([sum(one["outputs"]["probabilities"]) for one in results], 1, atol=1e-6)
    assert lines(client, f"/v1/batch/{job['batch_id']}/errors") == []


def test_inline_rows_keep_their_ids_and_come_as_parquet_too(client: httpx.Client, tmp_path: Path) -> None:
    columns = PATIENTS.columns
    rows = [
        {"custom_id": f"p-{number}", **dict(zip(columns, row.tolist(), strict=True))}
        for number, row in enumerate(PATIENTS.rows[:50])
    ]
    job = ended(client, submitted(client, model="cancer", inputs=rows, output_format="parquet"))
    assert job["status"] == "completed", job
    (tmp_path / "results.parquet").write_bytes(client.get(f"/v1/batch/{job['batch_id']}/results").content)
    table = pq.read_table(tmp_path / "results.parquet")
    assert table.column("custom_id").to_pylist() == [f"p-{number}" for number in range(50)]
    assert table.column("label").to_pylist() == PATIENTS.labels[:50].tolist()
    told = lines(client, f"/v1/batch/{job['batch_id']}/results?format=jsonl")
    assert [one["custom_id"] for one in told] == table.column("custom_id").to_pylist()


async def test_records_of_kafka_are_jobs_once(platform: Stack, client: httpx.Client) -> None:
    rows = PATIENTS.rows[:20].tolist()
    run = os.urandom(4).hex()
    as_json = {"model": "cancer", "version": "1", "inputs": rows, "metadata": {"from": "json"}}
    as_proto = BatchJob(job_id=f"proto-{run}", model="cancer", inputs_json=json.dumps(rows).encode())
    producer = AIOKafkaProducer(bootstrap_servers=platform.kafka_bootstrap_servers)
    await producer.start()
    try:
        for _ in range(2):  # a producer that is not sure sends again
            await producer.send_and_wait(
                "batch.jobs.v1",
                json.dumps(as_json).encode(),
                key=f"json-{run}".encode(),
                headers=[("content-type", b"application/json")],
            )
            await producer.send_and_wait(
                "batch.jobs.v1",
                as_proto.SerializeToString(),
                headers=[("content-type", b"application/x-protobuf")],
            )
        await producer.send_and_wait("batch.jobs.v1", b'{"model": ', key=b"broken")
    finally:
        await producer.stop()
    for job_id in (f"json-{run}", f"proto-{run}"):
        await asyncio.to_thread(_appears, client, job_id)
        job = await asyncio.to_thread(ended, client, job_id)
        assert job["counts"] == {"total": 20, "completed": 20, "failed": 0}, job
        labels = [one["outputs"]["label"] for one in lines(client, f"/v1/batch/{job_id}/results")]
        assert labels == PATIENTS.labels[:20].tolist()
    await asyncio.to_thread(_broken_record_is_set_aside, platform)


async def test_the_documented_producers_work(platform: Stack, client: httpx.Client) -> None:
    text = (REPOSITORY / "proto" / "README.md").read_text()
    script = textwrap.dedent(
        text[text.index("    import asyncio, json") : text.index("The same with `kcat`")]
    )
    run = os.urandom(4).hex()
    script = script.replace("127.0.0.1:19092", platform.kafka_bootstrap_servers).replace("job-1", f"py-{run}")
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script)
    async with patience("the documented producer to end"):
        assert await process.wait() == 0
    line = re.search(r"printf '(.*)\\n' \|", text)
    assert line is not None
    key, _, value = line[1].partition("\\t")
    async with AIOKafkaProducer(bootstrap_servers=platform.kafka_bootstrap_servers) as producer:
        await producer.send_and_wait("batch.jobs.v1", value.encode(), key=f"{key}-{run}".encode())
    for job_id in (f"py-{run}", f"job-2-{run}"):
        await asyncio.to_thread(_appears, client, job_id)
        job = await asyncio.to_thread(ended, client, job_id)
        assert job["counts"] == {"total": 1, "completed": 1, "failed": 0}, job


def _appears(client: httpx.Client, job_id: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while client.get(f"/v1/batch/{job_id}").status_code == 404:
        assert time.monotonic() < deadline, f"{job_id} never became a job"
        time.sleep(0.1)


def _broken_record_is_set_aside(platform: Stack) -> None:
    queue = "batch.jobs.v1.gateway.dlq"
    with Headrace(platform.rest_url, platform.admin_key) as sdk:
        deadline = time.monotonic() + PATIENCE_S
        while not (letters := sdk.dead_letters.show(queue)):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert letters[0]["topic"] == "batch.jobs.v1"
        assert letters[0]["value"] == '{"model": '
        assert letters[0]["reason"]
        assert queue in {one["topic"] for one in sdk.dead_letters.queues() if one["waiting"]}
        # It comes back to lie there once more: it is still broken. It may lie there more than once.
        assert sdk.dead_letters.replay(queue) >= 1
        while sdk.dead_letters.show(queue) in ([], letters):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert sdk.dead_letters.replay(queue) >= 1


def test_openai_clients_run_batches(platform: Stack, tmp_path: Path) -> None:
    endpoint = "/v1/models/cancer/predict"
    bodies: list[Json] = [{"inputs": [row.tolist()]} for row in PATIENTS.rows[:30]]
    bodies[3] = {"inputs": PATIENTS.rows[30:35].tolist(), "outputs": ["label"]}
    bodies[4] = {"input": PATIENTS.rows[4].tolist()}
    bodies[5] = {"inputs": [[1.0, 2.0]]}
    asked = [
        {"custom_id": f"c{number}", "method": "POST", "url": endpoint, "body": body}
        for number, body in enumerate(bodies)
    ]
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in asked))
    with openai.OpenAI(base_url=f"{platform.rest_url}/v1", api_key=platform.admin_key) as client:
        file = client.files.create(file=path, purpose="batch")
        assert (file.object, file.filename, file.purpose) == ("file", "requests.jsonl", "batch")
        assert file.bytes == path.stat().st_size
        batch = client.batches.create(
            input_file_id=file.id,
            endpoint=endpoint,  # type: ignore[arg-type]  # a route of ours
            completion_window="24h",
            metadata={"who": "e2e"},
        )
        assert batch.status == "validating"
        batch = _finished(client, batch.id)
        assert batch.status == "completed", batch
        assert batch.metadata == {"who": "e2e"}
        counts = batch.request_counts
        assert counts is not None
        assert (counts.total, counts.completed, counts.failed) == (30, 29, 1)
        assert batch.output_file_id
        assert batch.error_file_id
        out = _lines_of(client, batch.output_file_id)
        wrong = _lines_of(client, batch.error_file_id)
        assert [one["custom_id"] for one in out] == [f"c{n}" for n in range(30) if n != 5]
        names = ["malignant", "benign"]
        for one in out:
            number = int(one["custom_id"][1:])
            body = one["response"]["body"]
            rows = range(30, 35) if number == 3 else [number]
            expected: Any = [names[PATIENTS.labels[row]] for row in rows]
            assert body["prediction"] == (expected[0] if number == 4 else expected)
            assert one["error"] is None
            assert one["response"]["status_code"] == 200
        assert wrong[0]["custom_id"] == "c5"
        assert wrong[0]["response"]["status_code"] == 400
        assert wrong[0]["response"]["body"]["error"]["param"] == "inputs[0]"
        assert batch.id in [one.id for one in client.batches.list(limit=2)]
        assert {file.id, batch.output_file_id} <= {one.id for one in client.files.list()}
        client.files.delete(file.id)
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(file.id)


def test_an_openai_batch_of_embeddings_equals_the_online_route(platform: Stack, tmp_path: Path) -> None:
    texts = [["water drives the turbine"], ["a mill", "a stone"], ["é"]]
    asked = [
        {
            "custom_id": str(number),
            "method": "POST",
            "url": "/v1/embeddings",
            "body": {"model": "minilm", "input": some, "encoding_format": "base64" if number else "float"},
        }
        for number, some in enumerate(texts)
    ]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in asked))
    with openai.OpenAI(base_url=f"{platform.rest_url}/v1", api_key=platform.admin_key) as client:
        file = client.files.create(file=path, purpose="batch")
        made = client.batches.create(
            input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h"
        )
        batch = _finished(client, made.id)
        assert batch.status == "completed", batch
        assert batch.output_file_id
        for one, some in zip(_lines_of(client, batch.output_file_id), texts, strict=True):
            online = client.embeddings.create(model="minilm", input=some)
            assert online.usage.prompt_tokens > len(some)
            assert one["response"]["body"]["usage"] == online.usage.to_dict()
            for told, expected in zip(one["response"]["body"]["data"], online.data, strict=True):
                vector = told["embedding"]
                if isinstance(vector, str):
                    vector = np.frombuffer(base64.b64decode(vector), "<f4")
                assert np.allclose(vector, expected.embedding, atol=1e-5)


def test_what_is_no_openai_batch_says_which_line(platform: Stack, tmp_path: Path) -> None:
    path = tmp_path / "wrong.jsonl"
    good = {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/predict",
        "body": {"model": "cancer", "inputs": []},
    }
    path.write_text("\n".join(json.dumps(one) for one in (good, good | {"method": "GET"}, good)))
    with openai.OpenAI(
        base_url=f"{platform.rest_url}/v1", api_key=platform.admin_key, max_retries=0
    ) as client:
        file = client.files.create(file=path, purpose="batch")
        for endpoint, param in (("/v1/chat/completions", "endpoint"), ("/v1/moderations", "endpoint")):
            with pytest.raises(openai.BadRequestError) as refused:
                client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")  # type: ignore[arg-type]  # on purpose
            assert refused.value.param == param
        with pytest.raises(openai.BadRequestError) as missing:
            client.batches.create(input_file_id="file-no", endpoint="/v1/embeddings", completion_window="24h")
        assert missing.value.param == "input_file_id"
        batch = client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/predict",  # type: ignore[arg-type]  # a route of ours
            completion_window="24h",
        )
        batch = _finished(client, batch.id)
        assert batch.status == "failed"
        assert batch.errors is not None
        assert batch.errors.data is not None
        found = [(one.line, one.code) for one in batch.errors.data]
        assert found == [(2, "duplicate_custom_id"), (3, "duplicate_custom_id")]
        with pytest.raises(openai.ConflictError):
            client.batches.cancel(batch.id)


def _finished(client: openai.OpenAI, batch_id: str) -> openai.types.Batch:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        batch = client.batches.retrieve(batch_id)
        if batch.status in {"completed", "failed", "expired", "cancelled"}:
            return batch
        assert time.monotonic() < deadline, batch
        time.sleep(0.1)


def _lines_of(client: openai.OpenAI, file_id: str) -> list[Json]:
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


async def test_single_predictions_are_answered_later(platform: Stack) -> None:
    row = PATIENTS.rows[0].tolist()
    async with AsyncHeadrace(platform.rest_url, platform.admin_key) as sdk:
        online = await sdk.predict("cancer", row, single=True, version="1")
        key = os.urandom(4).hex()
        ids = [
            await sdk.async_predictions.submit("cancer", row, single=True, version="1", idempotency_key=key)
            for _ in range(2)
        ]
        assert ids[0] == ids[1]
        answer = await eventually_of(
            lambda: sdk.async_predictions.get(ids[0], wait_s=20), lambda one: one.status == "completed"
        )
        assert answer.result is not None
        assert answer.result["prediction"] == online.prediction
        assert answer.result["outputs"] == online.outputs
        assert answer.result["confidence"] == pytest.approx(online.confidence)
        assert answer.result["version"] == "1"


# What goes wrong.


def test_a_poisoned_row_fails_alone(client: httpx.Client, data: Path) -> None:
    path = data / "poisoned.jsonl"
    rows = [json.dumps(row.tolist()) for row in PATIENTS.rows[:1000]]
    bad = {10: "[1, 2]", 500: "{", 501: '["x"]', 999: "null"}
    for at, text in bad.items():
        rows[at] = text
    path.write_text("\n".join(rows))
    job = ended(client, submitted(client, model="cancer", version="1", input_uri=path.as_uri()))
    assert job["status"] == "completed", job
    assert job["counts"] == {"total": 1000, "completed": 996, "failed": 4}
    results = lines(client, f"/v1/batch/{job['batch_id']}/results")
    check_results(results, PATIENTS, [row for row in range(1000) if row not in bad])
    errors = lines(client, f"/v1/batch/{job['batch_id']}/errors")
    assert [one["row"] for one in errors] == sorted(bad)
    assert all(one["error"]["message"] and one["error"]["code"] for one in errors)


def test_inputs_that_cannot_be_read_fail_the_job_clearly(client: httpx.Client, data: Path) -> None:
    good = write(PATIENTS, data, "parquet")
    (data / "cut.parquet").write_bytes(good.read_bytes()[:-50])
    (data / "text.parquet").write_text("this is no Parquet file")
    table = pq.read_table(good)
    pq.write_table(table.drop_columns(["mean radius"]), data / "missing.parquet")
    pq.write_table(table.append_column("shoe size", pa.array([1.0] * 3000)), data / "more.parquet")
    with (data / "endless.jsonl").open("wb") as file:
        file.truncate(2 << 30)  # 2 GB of one line; takes no space
    expected = {
        "cut.parquet": None,
        "text.parquet": None,
        "missing.parquet": "mean radius",
        "more.parquet": "shoe size",
        "endless.jsonl": "Line 1",
    }
    jobs = {name: submitted(client, model="cancer", input_uri=(data / name).as_uri()) for name in expected}
    for name, word in expected.items():
        job = ended(client, jobs[name])
        assert job["status"] == "failed", (name, job)
        assert job["error"]["code"] in {"INVALID_ARGUMENT", "DATA_LOSS"}, (name, job)
        told = f"{job['error'].get('field', '')} {job['error']['message']}"
        assert word is None or word in told, (name, job)
    (data / "endless.jsonl").unlink()


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"model": "nobody", "inputs": [[1]]}, 404, "model"),
        ({"model": "cancer", "version": "9", "inputs": [[1]]}, 404, "version"),
        ({"model": "cancer"}, 422, "inputs"),
        ({"model": "cancer", "inputs": []}, 422, "inputs"),
        ({"model": "cancer", "input_uri": "file:///etc/passwd", "input_format": "csv"}, 403, "input_uri"),
        ({"model": "cancer", "input_uri": "store://blobs/x.parquet"}, 403, "input_uri"),
        ({"model": "cancer", "input_uri": "http://127.0.0.1/x.csv"}, 422, "input_uri"),
        ({"model": "cancer", "input_uri": "store://files/file-none/x.csv"}, 404, "input_uri"),
        ({"model": "cancer", "inputs": [[1]], "callback_url": "http://10.0.0.1/x"}, 403, "callback_url"),
        ({"model": "cancer", "inputs": [[1]], "priority": "now"}, 422, "priority"),
    ],
)
def test_what_cannot_be_a_job_is_refused_with_its_field(
    client: httpx.Client, body: Json, status: int, field: str
) -> None:
    answer = client.post("/v1/batch", json=body)
    assert (answer.status_code, answer.json()["field"]) == (status, field), answer.text


def test_an_input_that_is_not_there_is_told_so(client: httpx.Client, data: Path) -> None:
    answer = client.post("/v1/batch", json={"model": "cancer", "input_uri": (data / "no.csv").as_uri()})
    assert answer.status_code == 404, answer.text
    assert answer.json()["field"] == "input_uri"


# While it runs.


@pytest.fixture(scope="module")
def texts(platform: Stack) -> str:
    """Enough texts to keep the workers for a while."""
    folder = platform.home / "data"
    folder.mkdir(exist_ok=True)
    path = folder / "texts.jsonl"
    words = " ".join(["turbine"] * 30)
    path.write_text("".join(json.dumps(f"{number} {words}") + "\n" for number in range(TEXTS)))
    return path.as_uri()


def test_cancelling_stops_and_keeps_what_was_done(client: httpx.Client, texts: str) -> None:
    batch_id = submitted(client, model="minilm", input_uri=texts, priority="low")
    deadline = time.monotonic() + PATIENCE_S
    while client.get(f"/v1/batch/{batch_id}").json()["counts"]["completed"] == 0:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    answer = client.delete(f"/v1/batch/{batch_id}")
    assert answer.status_code == 202
    job = ended(client, batch_id)
    assert job["status"] == "cancelled"
    assert 0 < job["counts"]["completed"] < TEXTS
    results = lines(client, f"/v1/batch/{batch_id}/results")
    assert len({one["row"] for one in results}) == len(results) == job["counts"]["completed"]
    assert client.delete(f"/v1/batch/{batch_id}").status_code == 202


def test_a_job_expires(client: httpx.Client, texts: str) -> None:
    job = ended(client, submitted(client, model="minilm", input_uri=texts, expires_in_s=2))
    assert job["status"] == "expired"
    results = lines(client, f"/v1/batch/{job['batch_id']}/results")
    assert len(results) == job["counts"]["completed"] < TEXTS


def test_progress_is_followed_to_the_end(platform: Stack, client: httpx.Client, data: Path) -> None:
    path = Patients.some(60_000).parquet(data / "followed.parquet")
    batch_id = submitted(client, model="cancer", version="2", input_uri=path.as_uri())
    with Headrace(platform.rest_url, platform.admin_key) as sdk:
        seen = list(sdk.batches.watch(batch_id, timeout=PATIENCE_S))
    assert seen[-1].status == "completed"
    assert seen[-1].completed == 60_000
    done = [one.completed for one in seen]
    assert done == sorted(done)
    with client.stream("GET", f"/v1/batch/{batch_id}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = answer.read().decode()
    assert "event: end\n" in text


def test_callbacks_are_signed_repeated_and_hold_nothing_up(platform: Stack, client: httpx.Client) -> None:
    secret = load_or_create(platform.home).callback_secret
    rows = PATIENTS.rows[:5].tolist()
    with receiving(hang_s=60) as stuck, receiving(refused=1) as receiver:
        hanging = submitted(client, model="cancer", inputs=rows, callback_url=stuck.url)
        batch_id = submitted(client, model="cancer", inputs=rows, callback_url=receiver.url)
        assert ended(client, hanging)["status"] == "completed"
        assert ended(client, batch_id)["status"] == "completed"
        deadline = time.monotonic() + PATIENCE_S
        while len(receiver.seen) < 2:  # the first was refused
            assert time.monotonic() < deadline
            time.sleep(0.1)
        bodies = receiver.verified(secret)
    assert [body["batch_id"] for body in bodies] == [batch_id, batch_id]
    assert bodies[0]["status"] == "completed"
    assert bodies[0]["counts"]["completed"] == 5
    deliveries = {headers["x-headrace-delivery"] for headers, _body in receiver.seen}
    assert len(deliveries) == 1


def test_the_command_line_does_it_all(platform: Stack, tmp_path: Path) -> None:
    path = write(PATIENTS, tmp_path, "csv")

    def headrace(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "headrace_client", *words],
            cwd=REPOSITORY,
            env={
                **os.environ,
                "PYTHONPATH": python_path(),
                "HEADRACE_URL": platform.rest_url,
                "HEADRACE_API_KEY": platform.admin_key,
            },
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    batch_id = headrace(
        "batch", "submit", "cancer", "--input", str(path), "--version", "1", "--watch"
    ).strip()
    assert json.loads(headrace("batch", "status", batch_id))["status"] == "completed"
    assert batch_id in headrace("batch", "list", "--json")
    output = tmp_path / "out.parquet"
    headrace("batch", "results", batch_id, "-o", str(output), "--format", "parquet")
    assert pq.read_table(output).column("label").to_pylist() == PATIENTS.labels.tolist()
    assert headrace("batch", "errors", batch_id) == ""
    assert "batch.jobs.v1.gateway.dlq" in headrace("dlq", "list")


def test_jobs_belong_to_their_key(platform: Stack, client: httpx.Client) -> None:
    made = client.post("/v1/keys", json={"name": "other", "scopes": ["predict"]}).json()["key"]
    mine = submitted(client, model="cancer", inputs=PATIENTS.rows[:1].tolist())
    headers = {"authorization": f"Bearer {made}"}
    with httpx.Client(base_url=platform.rest_url, headers=headers, timeout=PATIENCE_S) as other:
        theirs = _submitted_once_known(other)
        assert ended(other, theirs)["status"] == "completed"
        assert [one["batch_id"] for one in other.get("/v1/batch").json()["batches"]] == [theirs]
        for path in (f"/v1/batch/{mine}", f"/v1/batch/{mine}/results", f"/v1/batch/{mine}/events"):
            assert other.get(path).status_code == 404
        assert other.get("/v1/dlq").status_code == 403
    assert client.get(f"/v1/batch/{theirs}").status_code == 200


def _submitted_once_known(client: httpx.Client) -> str:
    """A new key takes a moment to reach the gateway."""
    deadline = time.monotonic() + PATIENCE_S
    body = {"model": "cancer", "inputs": PATIENTS.rows[:2].tolist()}
    while (answer := client.post("/v1/batch", json=body)).status_code == 401:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["batch_id"])
