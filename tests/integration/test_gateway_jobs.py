"""Jobs through a whole gateway, on a real PostgreSQL: submitted, cut, published, counted, read, cancelled."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from headrace.v1.batch_pb2 import BatchChunkResult, BatchJob
from headrace.v1.tensor_pb2 import Code

from services.common.bus import Record
from services.common.topics import JOB_RESULTS, JOBS, KEYS, dead_letters
from tests.fixtures.gateway import OTHER_MODEL, PREDICT_ONLY, READ_ONLY, api_key
from tests.fixtures.gateway_jobs import Jobs, jobs
from tests.fixtures.jobs import arrow_of, lines_of, numbers, parquet_of
from tests.fixtures.metrics import metrics_at
from tests.fixtures.waiting import PATIENCE_S, eventually, eventually_of


async def test_every_format_gives_every_row_once(database_url: str, tmp_path: Path) -> None:
    values = numbers(5000)
    async with jobs(database_url, tmp_path) as here:
        (here.data / "a.jsonl").write_bytes(lines_of(values))
        (here.data / "a.csv").write_bytes(b"note,x\r\n" + b"".join(b'"a\nb",%d\r\n' % int(v) for v in values))
        (here.data / "a.parquet").write_bytes(parquet_of(values))
        (here.data / "a.arrow").write_bytes(arrow_of(values))
        for name in ("a.jsonl", "a.csv", "a.parquet", "a.arrow"):
            batch_id = await here.submitted(input_uri=f"file://{here.data}/{name}")
            job = await here.ended(batch_id)
            assert job["status"] == "completed", (name, job)
            assert job["counts"] == {"total": 5000, "completed": 5000, "failed": 0}, name
            assert job["rows_per_s"] > 0
            found = await here.lines(f"/v1/batch/{batch_id}/results")
            assert [line["row"] for line in found] == list(range(5000)), name
            assert [line["outputs"]["doubled"] for line in found] == [2 * value for value in values], name
            assert await here.lines(f"/v1/batch/{batch_id}/errors") == []


async def test_rows_fail_alone(database_url: str, tmp_path: Path) -> None:
    values = [1.0, -1.0, 2.0, -2.0, 3.0]
    async with jobs(database_url, tmp_path) as here:
        for inline_bytes in (10_000, 10):  # errors and results in the record, and as objects
            here.worker.inline_bytes = inline_bytes
            batch_id = await here.submitted(inputs=[{"x": value} for value in values])
            job = await here.ended(batch_id)
            assert (job["status"], job["counts"]) == ("completed", {"total": 5, "completed": 3, "failed": 2})
            found = await here.lines(f"/v1/batch/{batch_id}/results")
            assert [(line["row"], line["outputs"]["doubled"]) for line in found] == [(0, 2), (2, 4), (4, 6)]
            errors = await here.lines(f"/v1/batch/{batch_id}/errors")
            assert [(line["row"], line["error"]["field"]) for line in errors] == [(1, "x"), (3, "x")]


async def test_a_chunk_that_fails_fails_its_rows(database_url: str, tmp_path: Path) -> None:
    async with jobs(database_url, tmp_path) as here:
        told = BatchChunkResult(code=Code.CODE_INTERNAL, message="It broke.")
        here.worker.instead = lambda _chunk: told
        batch_id = await here.submitted(inputs=[{"x": 1}, {"x": 2}])
        job = await here.ended(batch_id)
        assert (job["status"], job["counts"]) == ("completed", {"total": 2, "completed": 0, "failed": 2})
        errors = await here.lines(f"/v1/batch/{batch_id}/errors")
        assert errors == [
            {"row": row, "error": {"code": "INTERNAL", "message": "It broke."}} for row in (0, 1)
        ]
        assert await here.lines(f"/v1/batch/{batch_id}/results") == []


async def test_what_is_wrong_with_the_input_fails_the_job(database_url: str, tmp_path: Path) -> None:
    async with jobs(database_url, tmp_path) as here:
        (here.data / "magic.parquet").write_bytes(b"PAR2" + b"x" * 100)
        (here.data / "short.parquet").write_bytes(parquet_of(numbers(100))[:-20])
        (here.data / "long.jsonl").write_bytes(b'{"x": 1}\n' * 3 + b"[" * (9 << 20))
        (here.data / "open.csv").write_bytes(b'x,y\n1,"a\n')
        (here.data / "none.arrow").write_bytes(b"")
        wanted = {
            "magic.parquet": "does not begin with PAR1",
            "short.parquet": "does not end with PAR1",
            "long.jsonl": "Line 4 is longer than 8388608 bytes",
            "open.csv": "Line 2: a quoted value is not closed",
            "none.arrow": "does not begin with ARROW1",
        }
        for name, reason in wanted.items():
            batch_id = await here.submitted(input_uri=f"file://{here.data}/{name}")
            job = await here.ended(batch_id)
            assert job["status"] == "failed", name
            assert reason in job["error"]["message"], job["error"]
            assert job["error"]["field"] == "input_uri"
            assert job["error"]["code"] == "INVALID_ARGUMENT"

        # A wrong column is found by the worker, and ends the job for all chunks.
        told = BatchChunkResult(code=Code.CODE_INVALID_ARGUMENT, message="No column y.", field="y")
        here.worker.instead = lambda _chunk: told
        (here.data / "x.csv").write_bytes(b"x\n" + b"1\n" * 20_000)
        job = await here.ended(await here.submitted(input_uri=f"file://{here.data}/x.csv"))
        assert (job["status"], job["error"]["field"]) == ("failed", "y")


async def test_what_is_wrong_is_named(shared_jobs: Jobs) -> None:
    wrong: list[tuple[dict[str, Any], int, str]] = [
        ({"model": "cancer"}, 422, "inputs"),
        ({"model": "cancer", "inputs": []}, 422, "inputs"),
        ({"model": "cancer", "inputs": {"x": 1}}, 422, "inputs"),
        ({"model": "nothing", "inputs": [1]}, 404, "model"),
        ({"model": "cancer", "version": "9", "inputs": [1]}, 404, "version"),
        ({"model": "cancer", "input_uri": "file:///etc/passwd", "input_format": "jsonl"}, 403, "input_uri"),
        ({"model": "cancer", "input_uri": "http://127.0.0.1/x.csv"}, 422, "input_uri"),
        ({"model": "cancer", "input_uri": "store://files/other/x.csv"}, 404, "input_uri"),
        ({"model": "cancer", "input_uri": "store://jobs/other/x.csv"}, 403, "input_uri"),
        ({"model": "cancer", "input_uri": "store://files/a/x.dat"}, 422, "input_format"),
        ({"model": "cancer", "inputs": [1], "callback_url": "http://10.0.0.1/"}, 403, "callback_url"),
        ({"model": "cancer", "inputs": [1], "callback_url": "ftp://127.0.0.1/"}, 422, "callback_url"),
        ({"model": "cancer", "inputs": [1], "expires_in_s": 0}, 422, "expires_in_s"),
        ({"model": "cancer", "inputs": [1], "metadata": {"a": "\u0000"}}, 422, "metadata.a"),
        ({"model": "cancer", "inputs": [1], "job_id": "mine"}, 422, "job_id"),
        ({"model": "cancer", "inputs": [1], "colour": "red"}, 422, "colour"),
    ]
    for body, status, field in wrong:
        answer = await shared_jobs.rest.post("/v1/batch", json=body)
        assert (answer.status_code, answer.json().get("field")) == (status, field), (body, answer.text)


@pytest.fixture
async def shared_jobs(database_url: str, tmp_path: Path) -> AsyncIterator[Jobs]:
    async with jobs(database_url, tmp_path) as here:
        yield here


async def test_jobs_belong_to_their_key(shared_jobs: Jobs) -> None:
    here = shared_jobs
    own = {"authorization": f"Bearer {PREDICT_ONLY}"}
    batch_id = (
        await here.rest.post("/v1/batch", json={"model": "cancer", "inputs": [1]}, headers=own)
    ).json()["batch_id"]
    for headers, status in ((own, 200), ({}, 200), ({"authorization": f"Bearer {OTHER_MODEL}"}, 404)):
        for path in ("", "/results?partial=true", "/errors?partial=true", "/events"):
            if path != "/events" or status != 200:
                answer = await here.rest.get(f"/v1/batch/{batch_id}{path}", headers=headers)
                assert answer.status_code == status, (path, answer.text)
    reader = {"authorization": f"Bearer {READ_ONLY}"}
    assert (await here.rest.get(f"/v1/batch/{batch_id}", headers=reader)).status_code == 403
    other = {"authorization": f"Bearer {OTHER_MODEL}"}
    assert (await here.rest.get("/v1/batch", headers=other)).json() == {"batches": [], "has_more": False}
    body = {"model": "cancer", "inputs": [1]}
    assert (await here.rest.post("/v1/batch", json=body, headers=other)).status_code == 403
    assert (await here.rest.delete(f"/v1/batch/{batch_id}", headers=other)).status_code == 404
    for name in ("nothing", "%00", "a%00b", "x" * 300):
        assert (await here.rest.get(f"/v1/batch/{name}")).status_code == 404


async def test_uploaded_files_belong_to_their_key_however_they_are_written(shared_jobs: Jobs) -> None:
    here = shared_jobs
    made = await here.rest.post("/v1/files", files={"file": ("x.jsonl", b"1\n")}, data={"purpose": "data"})
    assert made.status_code == 200, made.text
    uri = f"store://files/{made.json()['id']}/x.jsonl"
    body = {"model": "cancer", "input_format": "jsonl"}
    assert (await here.rest.post("/v1/batch", json=body | {"input_uri": uri})).status_code == 202
    own = {"authorization": f"Bearer {PREDICT_ONLY}"}
    folder = uri.rpartition("/")[0]
    for written in (uri, f"STORE{uri[5:]}", f" {uri}", f"{uri}/", "store://files", "store://files/", folder):
        for form in ("jsonl", "images"):
            asked = {"model": "cancer", "input_uri": written, "input_format": form}
            answer = await here.rest.post("/v1/batch", json=asked, headers=own)
            assert answer.status_code in (403, 404, 422), (written, answer.text)
            assert answer.json()["field"] == "input_uri"


async def test_an_admin_for_some_models_sees_nobody_elses_files_and_batches(shared_jobs: Jobs) -> None:
    """What is in them may be about any model."""
    here = shared_jobs
    some = "hr_admincancerx_" + "C" * 43
    key = api_key(some, ["admin"], models=["cancer"])
    await here.running.bus.publish([Record(KEYS.name, key.key_id.encode(), key.SerializeToString())])
    theirs = {"authorization": f"Bearer {some}"}
    await eventually_of(
        lambda: here.rest.get("/v1/files", headers=theirs), lambda said: said.status_code != 401, PATIENCE_S
    )
    line = b'{"custom_id": "a", "method": "POST", "url": "/v1/predict", "body": {"model": "none"}}\n'
    made = await here.rest.post("/v1/files", files={"file": ("x.jsonl", line)}, data={"purpose": "batch"})
    file_id = made.json()["id"]
    asked = {"input_file_id": file_id, "endpoint": "/v1/predict", "completion_window": "24h"}
    batch_id = (await here.rest.post("/v1/batches", json=asked)).json()["id"]
    for path in (f"/v1/files/{file_id}", f"/v1/files/{file_id}/content", f"/v1/batches/{batch_id}"):
        assert (await here.rest.get(path)).status_code == 200, path
        assert (await here.rest.get(path, headers=theirs)).status_code == 404, path
    for path in ("/v1/files", "/v1/batches"):
        assert (await here.rest.get(path, headers=theirs)).json()["data"] == []
    assert (await here.rest.delete(f"/v1/files/{file_id}", headers=theirs)).status_code == 404
    assert (await here.rest.post(f"/v1/batches/{batch_id}/cancel", headers=theirs)).status_code == 404
    body = {"model": "cancer", "input_uri": made.json()["uri"]}
    answer = await here.rest.post("/v1/batch", json=body, headers=theirs)
    assert (answer.status_code, answer.json()["field"]) == (404, "input_uri")


async def test_the_list_is_paged_and_filtered(shared_jobs: Jobs) -> None:
    here = shared_jobs
    made = [await here.submitted(inputs=[number]) for number in range(5)]
    for batch_id in made:
        await here.ended(batch_id)
    seen: list[str] = []
    after: dict[str, str] = {}
    while True:
        page = (await here.rest.get("/v1/batch", params={"limit": "2", "model": "cancer", **after})).json()
        seen += [job["batch_id"] for job in page["batches"]]
        if not page["has_more"]:
            break
        after = {"after": seen[-1]}
    assert seen == made[::-1]
    assert (await here.rest.get("/v1/batch?status=failed")).json()["batches"] == []
    assert (await here.rest.get("/v1/batch?status=done")).json()["field"] == "status"
    assert (await here.rest.get("/v1/batch?limit=0")).json()["field"] == "limit"
    assert (await here.rest.get("/v1/batch?after=nothing")).status_code == 404


async def test_an_idempotency_key_makes_one_job(shared_jobs: Jobs) -> None:
    here = shared_jobs
    headers = {"idempotency-key": "order-17"}
    body = {"model": "cancer", "inputs": [{"x": 1}]}
    answers = await asyncio.gather(
        *(here.rest.post("/v1/batch", json=body, headers=headers) for _ in range(8))
    )
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["batch_id"] for answer in answers}) == 1
    other = await here.rest.post("/v1/batch", json={"model": "cancer", "inputs": [2]}, headers=headers)
    assert (other.status_code, other.json()["field"]) == (409, "Idempotency-Key")
    own = {"authorization": f"Bearer {PREDICT_ONLY}", **headers}
    mine = await here.rest.post("/v1/batch", json=body, headers=own)
    assert mine.json()["batch_id"] != answers[0].json()["batch_id"]


async def test_cancelling_keeps_what_is_finished(database_url: str, tmp_path: Path) -> None:
    async with jobs(database_url, tmp_path) as here:
        (here.data / "x.csv").write_bytes(b"x\n" + b"1\n" * 100_000)
        batch_id = await here.submitted(input_uri=f"file://{here.data}/x.csv")
        await here.until(batch_id, lambda job: job["counts"]["completed"] > 0)
        here.worker.gate.clear()
        answer = await here.rest.delete(f"/v1/batch/{batch_id}")
        assert answer.status_code == 202
        assert answer.json()["status"] in ("cancelling", "cancelled")
        assert (await here.rest.get(f"/v1/batch/{batch_id}/results")).status_code in (200, 409)
        here.worker.gate.set()
        job = await here.ended(batch_id)
        assert job["status"] == "cancelled"
        done = job["counts"]["completed"]
        assert 0 < done < 100_000
        assert len(await here.lines(f"/v1/batch/{batch_id}/results")) == done
        assert here.worker.stopped[batch_id]
        assert (await here.rest.delete(f"/v1/batch/{batch_id}")).status_code == 202  # again is fine
        said = await _metrics_with(here, 'headrace_batch_jobs_ended_total{state="cancelled"} 1.0')
        assert f'headrace_batch_rows_total{{outcome="completed"}} {float(done)}' in said
        assert 'headrace_gateway_lag{topic="batch.results.v1"}' in said
        assert 'headrace_gateway_dead_letters{topic="batch.jobs.v1"} 0.0' in said


async def test_a_job_that_is_cancelled_before_it_began_is_counted(database_url: str, tmp_path: Path) -> None:
    async with jobs(database_url, tmp_path) as here:
        here.worker.gate.clear()
        batch_id = await here.submitted(inputs=[1, 2, 3])
        assert (await here.rest.delete(f"/v1/batch/{batch_id}")).status_code == 202
        here.worker.gate.set()
        await here.ended(batch_id)
        await _metrics_with(here, 'headrace_batch_jobs_ended_total{state="cancelled"} 1.0')


async def _metrics_with(here: Jobs, line: str) -> str:
    """What the gateway exports, once `line` is in it."""
    port = here.running.gateway.ops_port
    return await eventually_of(lambda: metrics_at(port), lambda said: line in said)


async def test_a_job_expires(database_url: str, tmp_path: Path) -> None:
    async with jobs(database_url, tmp_path) as here:
        here.worker.gate.clear()
        batch_id = await here.submitted(inputs=[1, 2, 3], expires_in_s=1)
        await eventually(lambda: batch_id in here.worker.stopped)
        here.worker.gate.set()
        job = await here.ended(batch_id)
        assert job["status"] == "expired"
        assert job["counts"]["completed"] == 0


async def test_results_as_parquet(shared_jobs: Jobs) -> None:
    here = shared_jobs
    values = numbers(3000)
    (here.data / "a.jsonl").write_bytes(lines_of(values))
    batch_id = await here.submitted(input_uri=f"file://{here.data}/a.jsonl", output_format="parquet")
    await here.ended(batch_id)
    for query in ("", "?format=parquet"):
        answer = await here.rest.get(f"/v1/batch/{batch_id}/results{query}")
        table = pq.read_table(io.BytesIO(answer.content))
        assert table.column_names == ["row", "custom_id", "doubled"]
        assert table.column("row").to_pylist() == list(range(3000))
        assert table.column("doubled").to_pylist() == [2 * value for value in values]
    told = await here.rest.get(f"/v1/batch/{batch_id}/results?format=jsonl")
    assert len(told.text.splitlines()) == 3000
    assert (await here.rest.get(f"/v1/batch/{batch_id}/results?format=xml")).json()["field"] == "format"


async def test_progress_as_events(shared_jobs: Jobs) -> None:
    here = shared_jobs
    here.worker.gate.clear()
    batch_id = await here.submitted(inputs=[{"x": 1}])
    events: list[tuple[str, dict[str, Any]]] = []
    async with here.rest.stream("GET", f"/v1/batch/{batch_id}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        kind = ""
        async for line in answer.aiter_lines():
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            if line.startswith("data: "):
                events.append((kind, json.loads(line.removeprefix("data: "))))
                here.worker.gate.set()
    assert [kind for kind, _ in events][-1] == "end"
    assert {kind for kind, _ in events[:-1]} == {"progress"}
    assert events[-1][1]["status"] == "completed"
    assert events[-1][1]["counts"]["completed"] == 1


async def test_producers_submit_over_kafka(shared_jobs: Jobs) -> None:
    here = shared_jobs
    message = BatchJob(job_id="from-kafka", model="cancer", inputs_json=b'[{"x": 4}]')
    as_json = {"model": "cancer", "inputs": [{"x": 5}], "job_id": "as-json"}
    key = (("x-api-key", PREDICT_ONLY.encode()),)
    await here.running.bus.publish(
        [
            Record(JOBS.name, b"k", message.SerializeToString()),
            Record(JOBS.name, b"k", message.SerializeToString()),  # again: the same job
            Record(JOBS.name, b"j", json.dumps(as_json).encode(), key),
            Record(JOBS.name, b"key-is-id", b'{"model": "cancer", "inputs": [{"x": 6}]}'),
            Record(JOBS.name, b"b", b"\xff\xff"),
            Record(JOBS.name, b"b", b'{"model": "nothing", "inputs": [1]}'),
        ]
    )
    for batch_id, doubled in (("from-kafka", 8), ("as-json", 10), ("key-is-id", 12)):
        await here.ended(batch_id)
        found = await here.lines(f"/v1/batch/{batch_id}/results")
        assert [line["outputs"]["doubled"] for line in found] == [doubled]
    own = {"authorization": f"Bearer {PREDICT_ONLY}"}
    assert (await here.rest.get("/v1/batch/as-json", headers=own)).status_code == 200
    assert (await here.rest.get("/v1/batch/from-kafka", headers=own)).status_code == 404
    dead = here.running.bus.records(dead_letters(JOBS, "gateway").name)
    assert len(dead) == 2


async def test_a_result_that_is_none_is_put_aside(shared_jobs: Jobs) -> None:
    here = shared_jobs
    batch_id = await here.submitted(inputs=[{"x": 1}])
    await here.ended(batch_id)
    strange = [
        b"\xff",
        BatchChunkResult(job_id=f"{batch_id}\0").SerializeToString(),
        BatchChunkResult(job_id=batch_id, results_object="models/secret").SerializeToString(),
        BatchChunkResult(job_id=batch_id, results_object=f"jobs/{batch_id}/../x").SerializeToString(),
    ]
    unknown = BatchChunkResult(job_id="nobody", index=7).SerializeToString()
    await here.running.bus.publish([Record(JOB_RESULTS.name, b"k", value) for value in [*strange, unknown]])
    second = await here.submitted(inputs=[{"x": 2}])
    assert (await here.ended(second))["status"] == "completed"
    dead = here.running.bus.records(dead_letters(JOB_RESULTS, "gateway").name)
    assert len(dead) == len(strange)


async def test_a_key_has_a_bounded_number_of_jobs(database_url: str, tmp_path: Path) -> None:
    async with jobs(database_url, tmp_path, batch_max_jobs_per_key=2) as here:
        here.worker.gate.clear()
        large = [{"x": 1}] * 20_000  # stored before the job is
        first = [await here.submitted(inputs=large) for _ in range(2)]
        answer = await here.rest.post("/v1/batch", json={"model": "cancer", "inputs": large})
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert {one.path.split("/")[2] for one in await here.worker.store.list("files")} == set(first)
        here.worker.gate.set()
        for batch_id in first:
            assert (await here.ended(batch_id))["status"] == "completed"
        await here.submitted(inputs=[1])


async def test_a_record_that_is_handled_twice_at_once_is_one_job(shared_jobs: Jobs) -> None:
    here = shared_jobs
    rows = json.dumps([{"x": number} for number in range(20_000)]).encode()
    message = BatchJob(job_id="twice", model="cancer", inputs_json=rows).SerializeToString()
    await here.running.bus.publish([Record(JOBS.name, str(n).encode(), message) for n in range(8)])
    job = await here.until("twice", lambda one: one["ended_at"] is not None)
    assert (job["status"], job["counts"]["completed"]) == ("completed", 20_000)
    assert len(await here.worker.store.list("files/inline/twice")) == 1


async def test_rows_that_came_with_a_job_lie_apart_from_files_and_once(shared_jobs: Jobs) -> None:
    here, store = shared_jobs, shared_jobs.worker.store
    made = await here.rest.post("/v1/files", files={"file": ("x.jsonl", b"1\n")}, data={"purpose": "data"})
    file_id = made.json()["id"]
    rows = [{"x": number} for number in range(20_000)]
    message = BatchJob(job_id=file_id, model="cancer", inputs_json=json.dumps(rows).encode())
    await here.running.bus.publish([Record(JOBS.name, b"k", message.SerializeToString())])
    await here.until(file_id, lambda one: one["ended_at"] is not None)
    assert [one.path for one in await store.list(f"files/{file_id}")] == [f"files/{file_id}/x.jsonl"]
    body = {"model": "cancer", "inputs": rows}
    headers = {"idempotency-key": "once"}
    answers = await asyncio.gather(
        *(here.rest.post("/v1/batch", json=body, headers=headers) for _ in range(6))
    )
    assert {answer.status_code for answer in answers} == {202}
    (batch_id,) = {answer.json()["batch_id"] for answer in answers}
    folders = [one.path.split("/")[2] for one in await store.list("files/inline")]
    assert sorted(folders) == sorted([file_id, batch_id])
