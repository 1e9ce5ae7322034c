"""OpenAI's files and batches through a whole gateway, on a real PostgreSQL; the worker stands in."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
from headrace.v1.batch_pb2 import BatchChunk, BatchChunkResult

from services.common.objects import ArtifactStore
from tests.fixtures.gateway import OTHER_MODEL, PREDICT_ONLY
from tests.fixtures.gateway_jobs import Jobs, jobs
from tests.fixtures.waiting import eventually_of

Json = dict[str, Any]
ENDPOINT = "/v1/models/cancer/predict"


def benign_below_15(store: ArtifactStore) -> Callable[[BatchChunk], BatchChunkResult]:
    """What a worker makes of the rows of `cancer`; row 2 of the job fails."""

    def work(chunk: BatchChunk) -> BatchChunkResult:
        path = store.local_path(chunk.input.uri.removeprefix("store://"))
        with pa.ipc.open_file(str(path)) as file:
            rows = file.read_all().column("x").to_pylist()[: chunk.rows]
        numbers = np.array([chunk.first_row + at for at in range(len(rows))], np.uint64)
        labels = np.array([int(row[0] < 15) for row in rows])
        kept = numbers != 2
        table = pa.table({"row": numbers[kept], "label": labels[kept]})
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        error = {"row": 2, "error": {"code": "INVALID_ARGUMENT", "message": "no", "field": "inputs.x"}}
        failed = [json.dumps(error)] if not kept.all() else []
        return BatchChunkResult(
            rows_done=int(kept.sum()),
            rows_failed=len(failed),
            results_inline=sink.getvalue(),
            errors_inline="\n".join(failed).encode(),
        )

    return work


def request(custom_id: str, **body: Any) -> Json:
    return {"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": body}


async def upload(here: Jobs, requests: list[Json], key: str | None = None, **fields: str) -> httpx.Response:
    content = "".join(json.dumps(one) + "\n" for one in requests).encode()
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    form = {"purpose": "batch"} | fields
    return await here.rest.post(
        "/v1/files", data=form, files={"file": ("in.jsonl", content)}, headers=headers
    )


def kept_for(seconds: int) -> Json:
    return {"anchor": "created_at", "seconds": seconds}


async def started(here: Jobs, requests: list[Json], **more: Any) -> str:
    file = (await upload(here, requests)).json()
    body = {"input_file_id": file["id"], "endpoint": ENDPOINT, "completion_window": "24h", **more}
    answer = await here.rest.post("/v1/batches", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


async def ended(here: Jobs, batch_id: str) -> Json:
    return await reaches(here, batch_id, {"completed", "failed", "cancelled", "expired"})


async def reaches(here: Jobs, batch_id: str, states: set[str]) -> Json:
    async def shown() -> Json:
        answer = await here.rest.get(f"/v1/batches/{batch_id}")
        assert answer.status_code == 200, answer.text
        body: Json = answer.json()
        return body

    return await eventually_of(shown, lambda body: body["status"] in states)


async def lines(here: Jobs, file_id: str) -> list[Json]:
    answer = await here.rest.get(f"/v1/files/{file_id}/content")
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


async def test_lines_of_many_rows_are_answered_under_their_ids(database_url: str, tmp_path: Path) -> None:
    requests = [
        request("two", inputs=[[1, 2, 3], [20, 2, 3]]),
        request("fails", input=[1, 2, 3]),
        request("wrong", inputs=[[1]]),
        request("one", input=[30, 2, 3]),
    ]
    async with jobs(database_url, tmp_path) as here:
        here.worker.instead = benign_below_15(here.worker.store)
        more = {"metadata": {"a": "b"}, "output_expires_after": kept_for(3600)}
        batch = await ended(here, await started(here, requests, **more))
        assert batch["status"] == "completed", batch
        assert batch["request_counts"] == {"total": 4, "completed": 2, "failed": 2}
        assert (batch["model"], batch["metadata"]) == ("cancer", {"a": "b"})
        times = [batch[name] for name in ("created_at", "in_progress_at", "finalizing_at", "completed_at")]
        assert times == sorted(times)
        out = {one["custom_id"]: one for one in await lines(here, batch["output_file_id"])}
        assert out["two"]["response"]["body"]["prediction"] == ["benign", "malignant"]
        assert out["one"]["response"]["body"]["prediction"] == "malignant"
        bad = {one["custom_id"]: one["response"] for one in await lines(here, batch["error_file_id"])}
        assert {name: one["status_code"] for name, one in bad.items()} == {"fails": 400, "wrong": 400}
        assert bad["fails"]["body"]["error"]["message"] == "no"
        files = (await here.rest.get("/v1/files")).json()["data"]
        assert {one["purpose"] for one in files} == {"batch", "batch_output"}  # nothing of its own is left
        outputs = [one for one in files if one["purpose"] == "batch_output"]
        assert {one["expires_at"] - one["created_at"] for one in outputs} == {3600}


async def test_a_file_of_refused_lines_needs_no_job(database_url: str, tmp_path: Path) -> None:
    async with jobs(database_url, tmp_path) as here:
        batch = await ended(here, await started(here, [request("a", inputs=[[1]])]))
        assert (batch["status"], batch["output_file_id"]) == ("completed", None)
        assert batch["request_counts"] == {"total": 1, "completed": 0, "failed": 1}
        assert here.worker.seen == []


async def test_cancelling_leaves_every_line_accounted_for(database_url: str, tmp_path: Path) -> None:
    async with jobs(database_url, tmp_path) as here:
        here.worker.gate.clear()
        batch_id = await started(here, [request("a", input=[1, 2, 3]), request("b", input=[1, 2, 3])])
        await reaches(here, batch_id, {"in_progress"})
        answer = await here.rest.post(f"/v1/batches/{batch_id}/cancel")
        assert answer.json()["status"] == "cancelling"
        here.worker.gate.set()
        batch = await ended(here, batch_id)
        assert batch["status"] == "cancelled"
        assert batch["cancelled_at"] >= batch["cancelling_at"]
        told = [one["error"]["code"] for one in await lines(here, batch["error_file_id"])]
        assert told == ["batch_cancelled", "batch_cancelled"]
        assert (await here.rest.post(f"/v1/batches/{batch_id}/cancel")).status_code == 409


async def test_what_cannot_run_says_why(database_url: str, tmp_path: Path) -> None:
    async with jobs(database_url, tmp_path) as here:
        unknown = {"custom_id": "a", "method": "POST", "url": "/v1/predict", "body": {"model": "no"}}
        batch = await ended(here, await started(here, [unknown], endpoint="/v1/predict"))
        assert batch["status"] == "failed"
        assert batch["errors"]["data"][0] == {
            "code": "model_not_found",
            "line": 1,
            "message": "There is no model 'no' in service.",
            "param": "body.model",
        }
        for body, param in (
            ({"endpoint": "/v1/chat/completions"}, "endpoint"),
            ({"completion_window": "1h"}, "completion_window"),
            ({"metadata": {"k" * 65: "v"}}, "metadata"),
            ({"output_expires_after": kept_for(60)}, "output_expires_after.seconds"),
            ({"output_expires_after": kept_for(1 << 63)}, "output_expires_after.seconds"),
            ({"input_file_id": "file-none"}, "input_file_id"),
            ({"colour": "red"}, "colour"),
        ):
            file = (await upload(here, [request("a")])).json()
            asked = {"input_file_id": file["id"], "endpoint": ENDPOINT, "completion_window": "24h"} | body
            answer = await here.rest.post("/v1/batches", json=asked)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


async def test_files_are_listed_in_pages_and_belong_to_their_key(database_url: str, tmp_path: Path) -> None:
    async with jobs(database_url, tmp_path) as here:
        ids = [(await upload(here, [request(str(n))], purpose="data")).json()["id"] for n in range(5)]
        theirs = (await upload(here, [request("x")], key=PREDICT_ONLY)).json()["id"]
        client = here.rest
        page = (await client.get("/v1/files?limit=2&purpose=data&order=asc")).json()
        assert (page["object"], page["has_more"]) == ("list", True)
        assert [one["id"] for one in page["data"]] == ids[:2] == [page["first_id"], page["last_id"]]
        rest = (await client.get(f"/v1/files?limit=9&order=asc&purpose=data&after={ids[1]}")).json()
        assert [one["id"] for one in rest["data"]] == ids[2:]
        assert not rest["has_more"]
        newest = (await client.get("/v1/files?limit=1&purpose=data")).json()
        assert newest["data"][0]["id"] == ids[-1]

        mine = {"authorization": f"Bearer {PREDICT_ONLY}"}
        other = {"authorization": f"Bearer {OTHER_MODEL}"}
        assert [one["id"] for one in (await client.get("/v1/files", headers=mine)).json()["data"]] == [theirs]
        for path in (f"/v1/files/{theirs}", f"/v1/files/{theirs}/content"):
            assert (await client.get(path, headers=mine)).status_code == 200
            answer = await client.get(path, headers=other)
            assert (answer.status_code, answer.json()["error"]["type"]) == (404, "invalid_request_error")
        assert (await client.delete(f"/v1/files/{theirs}", headers=other)).status_code == 404
        gone = (await client.delete(f"/v1/files/{theirs}", headers=mine)).json()
        assert gone == {"id": theirs, "object": "file", "deleted": True}
        assert (await client.get(f"/v1/files/{theirs}", headers=mine)).status_code == 404
        assert (await client.get(f"/v1/files?after={theirs}")).status_code == 404


async def test_uploads_have_bounds(database_url: str, tmp_path: Path) -> None:
    async with jobs(database_url, tmp_path, max_file_bytes=1000) as here:
        client = here.rest
        for data, content, status, param in (
            ({"purpose": "data"}, b"x" * 1001, 413, "file"),
            ({"purpose": "data"}, b"", 400, "file"),
            ({"purpose": "fine-tune"}, b"x", 400, "purpose"),
            ({}, b"x", 400, "purpose"),
            ({"purpose": "data", "expires_after[seconds]": "7200"}, b"x", 400, "expires_after[anchor]"),
            (
                {
                    "purpose": "data",
                    "expires_after[anchor]": "created_at",
                    "expires_after[seconds]": "1",
                },
                b"x",
                400,
                "expires_after[seconds]",
            ),
        ):
            answer = await client.post("/v1/files", data=data, files={"file": ("f", content)})
            assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
        large = await upload(here, [request("a", inputs=[[1.0] * 2000])])
        assert large.status_code == 200, "files of batches have a bound of their own"
        kept = await upload(
            here,
            [request("a")],
            **{"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"},
        )
        body = kept.json()
        assert body["expires_at"] == body["created_at"] + 3600
        assert not any(folder.name == "content" for folder in tmp_path.rglob("content"))


async def test_ids_that_nothing_can_have_are_of_nothing(database_url: str, tmp_path: Path) -> None:
    async with jobs(database_url, tmp_path) as here:
        for odd in ("file-%00", "%00", "%F0%9F%98%80", "x" * 65, "a%20b"):
            for path in (f"/v1/files/{odd}", f"/v1/files/{odd}/content", f"/v1/batches/{odd}"):
                assert (await here.rest.get(path)).status_code == 404, path
            for path in (f"/v1/files?after={odd}", f"/v1/batches?after={odd}"):
                answer = await here.rest.get(path)
                assert (answer.status_code, answer.json()["error"]["param"]) == (404, "after"), path
            assert (await here.rest.delete(f"/v1/files/{odd}")).status_code == 404
            assert (await here.rest.post(f"/v1/batches/{odd}/cancel")).status_code == 404
            assert (await here.rest.get(f"/v1/files?purpose={odd}")).json()["data"] == []
        body = {"input_file_id": "file-\0", "endpoint": ENDPOINT, "completion_window": "24h"}
        answer = await here.rest.post("/v1/batches", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input_file_id")
        for path in ("/v1/files", "/v1/batches"):
            for limit in ("00000000199999", "0", "9" * 5000, "-1", "1.0", "²"):
                answer = await here.rest.get(path, params={"limit": limit})
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, "limit"), limit
