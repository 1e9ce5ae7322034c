"""Calls about batches, files and dead letters, of both clients against one scripted gateway."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from headrace_client import AsyncHeadrace, Batch, DeadlineExceeded, Headrace, InvalidRequest
from headrace_client import async_batch_calls as later
from headrace_client import batch_calls as calls

Answer = Callable[[httpx.Request], httpx.Response]


def job(status: str, completed: int = 0) -> dict[str, Any]:
    return {
        "batch_id": "b1",
        "model": "m",
        "version": "1",
        "status": status,
        "counts": {"total": 9, "completed": completed, "failed": 0},
        "rows_per_s": None,
        "time_left_s": None,
    }


def event(number: int, status: str, completed: int) -> str:
    return f"id: {number}\nevent: progress\ndata: {json.dumps(job(status, completed))}\n\n"


class Script:
    """Answers requests in turn and keeps them."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def sync(self) -> Headrace:
        return Headrace("http://gateway", "hr_k", transport=httpx.MockTransport(self))

    def awaited(self) -> AsyncHeadrace:
        return AsyncHeadrace("http://gateway", "hr_k", transport=httpx.MockTransport(self))


class Pieces(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body as it comes over a slow connection."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        yield from self._pieces

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "RECONNECT_S", 0.0)
    monkeypatch.setattr(later, "RECONNECT_S", 0.0)


async def test_a_job_is_submitted_with_what_was_given_only() -> None:
    script = Script(*(httpx.Response(202, json={"batch_id": "b1"}) for _ in range(2)))
    with script.sync() as client:
        assert client.batches.submit("m", [[1]], priority="low", idempotency_key="k") == "b1"
    async with script.awaited() as later_client:
        assert await later_client.batches.submit("m", input_uri="store://x", exclude_from=("drift",)) == "b1"
    bodies = [json.loads(request.content) for request in script.asked]
    assert bodies[0] == {"model": "m", "inputs": [[1]], "priority": "low"}
    assert bodies[1] == {"model": "m", "input_uri": "store://x", "exclude_from": ["drift"]}
    assert [request.headers.get("idempotency-key") for request in script.asked] == ["k", None]


def broken() -> list[httpx.Response | Exception]:
    """Two events, a lost connection, a gateway that is away, and the end."""
    return [
        httpx.Response(200, text="retry: 1\n\n" + event(1, "validating", 0) + event(2, "in_progress", 3)),
        httpx.ConnectError("gone"),
        httpx.Response(503, json={"detail": "away"}),
        httpx.Response(200, text=": still there\n\n" + event(5, "completed", 9)),
    ]


async def test_watching_survives_broken_connections() -> None:
    script = Script(*broken(), *broken())
    with script.sync() as client:
        seen = list(client.batches.watch("b1"))
    async with script.awaited() as later_client:
        awaited = [one async for one in later_client.batches.watch("b1")]
    assert [(one.status, one.completed) for one in seen] == [
        ("validating", 0),
        ("in_progress", 3),
        ("completed", 9),
    ]
    assert awaited == seen
    assert [request.headers.get("last-event-id") for request in script.asked] == [None, "2", "2", "2"] * 2


async def test_waiting_ends_with_the_last_state() -> None:
    done = httpx.Response(200, text=event(1, "failed", 1))
    with Script(done).sync() as client:
        assert client.batches.wait("b1").status == "failed"
    async with Script(httpx.Response(200, text=event(1, "expired", 1))).awaited() as later_client:
        assert (await later_client.batches.wait("b1")).ended


def never_heard_of(request: httpx.Request) -> httpx.Response:
    """A connection that stays silent: what the client allows it ends it."""
    allowed = request.extensions["timeout"]["read"]
    if allowed > 1.0:
        raise AssertionError(f"the client would wait for {allowed} s")
    raise httpx.ReadTimeout("nothing came", request=request)


async def test_a_silent_stream_is_not_waited_for_beyond_the_time_given() -> None:
    silent = httpx.MockTransport(never_heard_of)
    client = Headrace("http://gateway", "hr_k", transport=silent)
    with client, pytest.raises(DeadlineExceeded, match="b1 has not ended in time"):
        client.batches.wait("b1", timeout=0.01)
    async with AsyncHeadrace("http://gateway", "hr_k", transport=silent) as later_client:
        with pytest.raises(DeadlineExceeded, match="b1 has not ended in time"):
            await later_client.batches.wait("b1", timeout=0.01)


async def test_lists_go_on_page_by_page() -> None:
    def pages() -> list[httpx.Response]:
        second = job("completed") | {"batch_id": "b2"}
        return [
            httpx.Response(200, json={"batches": [job("completed")], "has_more": True}),
            httpx.Response(200, json={"batches": [second], "has_more": False}),
        ]

    script = Script(*pages(), *pages())
    with script.sync() as client:
        assert [one.id for one in client.batches.list(model="m")] == ["b1", "b2"]
    async with script.awaited() as later_client:
        assert [one.id async for one in later_client.batches.list(model="m")] == ["b1", "b2"]
    assert script.asked[1].url.params["after"] == script.asked[3].url.params["after"] == "b1"


async def test_results_are_read_line_by_line_and_written_to_files(tmp_path: Path) -> None:
    text = '{"row": 0}\n{"row": 1}\n'
    script = Script(*(httpx.Response(200, text=text) for _ in range(4)))
    with script.sync() as client:
        assert [one["row"] for one in client.batches.results("b1")] == [0, 1]
        assert client.batches.download("b1", tmp_path / "sync", format="parquet") == len(text)
    async with script.awaited() as later_client:
        assert [one["row"] async for one in later_client.batches.errors("b1", partial=True)] == [0, 1]
        assert await later_client.files.download("file-1", tmp_path / "async") == len(text)
    assert (tmp_path / "sync").read_text() == (tmp_path / "async").read_text() == text
    assert [str(request.url.query, "ascii") for request in script.asked] == [
        "format=jsonl",
        "format=parquet",
        "partial=true",
        "",
    ]


async def test_lines_end_at_line_feeds_only() -> None:
    odd = "a\u2028b\u2029c\x85d\x1ce\x0bf"
    text = "\r\n".join(json.dumps({"row": row, "text": odd}, ensure_ascii=False) for row in range(2))
    told = json.dumps(job("completed") | {"metadata": {"note": odd}}, ensure_ascii=False)

    def answers() -> list[httpx.Response]:
        pieces = [bytes([byte]) for byte in text.encode()]
        return [
            httpx.Response(200, stream=Pieces(pieces)),
            httpx.Response(200, text=f"id: 1\ndata: {told}\n\n"),
        ]

    with Script(*answers()).sync() as client:
        assert [(one["row"], one["text"]) for one in client.batches.results("b1")] == [(0, odd), (1, odd)]
        assert client.batches.wait("b1").body["metadata"] == {"note": odd}
    async with Script(*answers()).awaited() as later_client:
        lines = [(one["row"], one["text"]) async for one in later_client.batches.errors("b1")]
        assert lines == [(0, odd), (1, odd)]
        assert (await later_client.batches.wait("b1")).body["metadata"] == {"note": odd}


def answered(results: list[Any], errors: list[Any] | None = None) -> list[httpx.Response]:
    """What a gateway says of a job's results, and of its errors."""
    texts = ["".join(json.dumps(one) + "\n" for one in lines) for lines in (results, errors or [])]
    return [httpx.Response(200, text=text) for text in texts]


async def test_inputs_and_answers_are_joined_by_custom_id() -> None:
    results = [
        {"row": 0, "custom_id": "7", "outputs": {"y": 1}},
        {"row": 2, "custom_id": "b", "outputs": {"y": 2}},
    ]
    unread = {"row": 3, "error": {"code": "INVALID_ARGUMENT"}}
    errors = [{"row": 1, "custom_id": "a", "error": {"code": "INTERNAL"}}, unread]
    rows: list[dict[str, Any]] = [{"id": "b", "outputs": "mine"}, {"id": "a"}, {"id": 7}, {"id": "new"}]
    expected = [
        {"custom_id": "b", "input": rows[0], "outputs": {"y": 2}},
        {"custom_id": "a", "input": rows[1], "error": {"code": "INTERNAL"}},
        {"custom_id": "7", "input": rows[2], "outputs": {"y": 1}},
        {"custom_id": "new", "input": rows[3]},
    ]
    script = Script(*answered(results, errors))
    with script.sync() as client:
        assert list(client.batches.join("b1", iter(rows), on="id")) == expected
    assert [request.url.path for request in script.asked] == ["/v1/batch/b1/results", "/v1/batch/b1/errors"]
    async with Script(*answered(results, errors)).awaited() as later_client:
        assert [one async for one in later_client.batches.join("b1", rows, on="id")] == expected


@pytest.mark.parametrize(
    ("results", "rows", "said"),
    [
        ([{"row": 0, "outputs": {}}], [{"custom_id": "a"}], "Row 0 of the batch has no custom_id."),
        (
            [{"row": n, "custom_id": "a", "outputs": {}} for n in range(2)],
            [{"custom_id": "a"}],
            "The custom_id 'a' stands in several rows of the batch.",
        ),
        ([], [{"x": 1}], "A row has no 'custom_id'."),
    ],
)
def test_what_cannot_be_joined_says_why(results: list[Any], rows: list[Any], said: str) -> None:
    with Script(*answered(results)).sync() as client, pytest.raises(ValueError, match=said):
        list(client.batches.join("b1", rows))


async def test_files_are_sent_as_forms_of_known_length(tmp_path: Path) -> None:
    path = tmp_path / 'ro"ws.csv'
    path.write_bytes(b"a,b\n1,2\n" * 100_000)
    kept = {
        "id": "file-1",
        "filename": "rows.csv",
        "purpose": "data",
        "bytes": 800_000,
        "created_at": 1_750_000_000,
        "uri": "store://files/file-1/rows.csv",
    }
    script = Script(*(httpx.Response(200, json=kept) for _ in range(2)))
    told: list[tuple[int, int]] = []
    with script.sync() as client:
        assert client.files.upload(path, progress=lambda *at: told.append(at)).uri == kept["uri"]
    async with script.awaited() as later_client:
        assert (await later_client.files.upload(path, purpose="batch")).id == "file-1"
    assert told[-1] == (800_000, 800_000)
    for request in script.asked:
        assert int(request.headers["content-length"]) == len(request.content)
        assert path.read_bytes() in request.content
        assert b'filename="ro%22ws.csv"' in request.content
    assert b'name="purpose"\r\n\r\nbatch' in script.asked[1].content


async def test_errors_in_openais_shape_are_read_too() -> None:
    said = {"error": {"message": "No such file.", "type": "x", "param": "id", "code": None}}
    script = Script(httpx.Response(400, json=said), httpx.Response(422, json={"detail": "d", "field": "f"}))
    with script.sync() as client, pytest.raises(InvalidRequest) as refused:
        client.files.get("x")
    assert (refused.value.message, refused.value.field) == ("No such file.", "id")
    async with script.awaited() as later_client:
        with pytest.raises(InvalidRequest):
            [one async for one in later_client.batches.results("b1")]


async def test_predictions_for_later_and_dead_letters() -> None:
    pending = {"id": "r1", "status": "completed", "result": {"prediction": 1}}

    def answers() -> list[httpx.Response]:
        return [
            httpx.Response(202, json={"id": "r1"}),
            httpx.Response(200, json=pending),
            httpx.Response(200, json={"queues": [{"topic": "t.dlq", "waiting": 1}]}),
            httpx.Response(200, json={"records": [{"reason": "r"}]}),
            httpx.Response(200, json={"replayed": 1}),
        ]

    script = Script(*answers(), *answers())
    with script.sync() as client:
        assert client.async_predictions.submit("m", [1], single=True) == "r1"
        assert client.async_predictions.get("r1", wait_s=3).result == {"prediction": 1}
        assert client.dead_letters.queues()[0]["waiting"] == 1
        assert client.dead_letters.show("t.dlq", limit=2)[0]["reason"] == "r"
        assert client.dead_letters.replay("t.dlq") == 1
    async with script.awaited() as later_client:
        assert await later_client.async_predictions.submit("m", [1], single=True) == "r1"
        assert (await later_client.async_predictions.get("r1", wait_s=3)).ended
        assert (await later_client.dead_letters.queues())[0]["topic"] == "t.dlq"
        assert await later_client.dead_letters.show("t.dlq", limit=2) == [{"reason": "r"}]
        assert await later_client.dead_letters.replay("t.dlq") == 1
    assert json.loads(script.asked[0].content) == {"input": [1]}
    assert script.asked[0].url.path == "/v1/models/m/predict:async"


def test_a_batch_says_whether_it_has_ended() -> None:
    assert [Batch.read(job(status)).ended for status in ("validating", "cancelling", "cancelled")] == [
        False,
        False,
        True,
    ]
