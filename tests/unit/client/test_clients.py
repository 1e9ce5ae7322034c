"""Both clients against a gateway that is a function."""

from __future__ import annotations

import json
from collections.abc import Callable
from email.parser import BytesParser
from email.policy import HTTP
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from headrace_client import (
    AsyncHeadrace,
    Conflict,
    ConnectionFailed,
    DeadlineExceeded,
    Headrace,
    HeadraceError,
    InvalidRequest,
    NotFound,
    Outcome,
    PermissionDenied,
    RateLimited,
    Unauthenticated,
    Unavailable,
)
from headrace_client.tensors import decode_answer, encode_request

Handler = Callable[[httpx.Request], httpx.Response]
ANSWER = {
    "request_id": "0f" * 16,
    "model": "cancer",
    "version": "2",
    "variant": "challenger",
    "prediction": ["benign"],
    "outputs": {"probabilities": [[0.1, 0.9]]},
    "cached": False,
    "latency_ms": 1.25,
}


def client(handler: Handler, **options: Any) -> Headrace:
    return Headrace("http://gateway", "hr_key", transport=httpx.MockTransport(handler), **options)


def problem(status: int, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    body = {"type": "about:blank", "title": "no", "status": status, "detail": "no good", **fields}
    return httpx.Response(status, json=body, headers=headers or {})


def test_predict_sends_what_is_given_and_reads_the_answer() -> None:
    seen: list[httpx.Request] = []

    def gateway(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json=ANSWER)

    rows = np.arange(4, dtype=np.float32).reshape(2, 2)
    answer = client(gateway).predict("cancer", rows, user_id="alice", version="champion")
    assert answer.variant == "challenger"
    assert answer.outputs == ANSWER["outputs"]
    assert answer.confidence is None
    assert (seen[0].method, seen[0].url.path) == ("POST", "/v1/predict")
    assert seen[0].headers["authorization"] == "Bearer hr_key"
    assert json.loads(seen[0].content) == {
        "model": "cancer",
        "inputs": [[0.0, 1.0], [2.0, 3.0]],
        "user_id": "alice",
        "version": "champion",
    }


async def test_the_async_client_asks_the_same() -> None:
    bodies: list[bytes] = []

    def gateway(request: httpx.Request) -> httpx.Response:
        bodies.append(request.content)
        return httpx.Response(200, json=ANSWER)

    sync = client(gateway).predict("cancer", [1.0], user_id=7, single=True)
    async with AsyncHeadrace("http://gateway", transport=httpx.MockTransport(gateway)) as asynchronous:
        assert await asynchronous.predict("cancer", [1.0], user_id=7, single=True) == sync
    assert bodies[0] == bodies[1]
    assert json.loads(bodies[0])["input"] == [1.0]


def test_nan_is_refused_before_it_is_sent() -> None:
    def gateway(request: httpx.Request) -> httpx.Response:
        raise AssertionError(request)

    with pytest.raises(ValueError, match="not JSON compliant"):
        client(gateway).predict("cancer", [[float("nan")]])


def test_a_frame_is_refused_with_what_can_be_sent() -> None:
    class Frame:
        def to_numpy(self) -> None: ...

    with pytest.raises(TypeError, match="Frame cannot be sent as JSON: its to_numpy"):
        client(lambda request: httpx.Response(500)).predict("cancer", Frame())
    with pytest.raises(TypeError, match=r"object cannot be sent as JSON$"):
        client(lambda request: httpx.Response(500)).predict("cancer", object())


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InvalidRequest),
        (401, Unauthenticated),
        (403, PermissionDenied),
        (404, NotFound),
        (409, Conflict),
        (413, InvalidRequest),
        (422, InvalidRequest),
        (429, RateLimited),
        (500, HeadraceError),
        (503, Unavailable),
        (504, DeadlineExceeded),
    ],
)
def test_errors_are_typed_and_carry_what_the_server_said(status: int, kind: type[HeadraceError]) -> None:
    def gateway(request: httpx.Request) -> httpx.Response:
        return problem(status, code="SOME_CODE", field="inputs.x", request_id="ab" * 16)

    with pytest.raises(kind) as caught:
        client(gateway).predict("cancer", [[1.0]])
    error = caught.value
    assert type(error) is kind
    assert (error.status, error.code, error.field) == (status, "SOME_CODE", "inputs.x")
    assert (error.message, error.request_id) == ("no good", "ab" * 16)


def test_an_error_in_the_open_inference_shape_is_read_too() -> None:
    def gateway(request: httpx.Request) -> httpx.Response:
        return httpx.Response(400, json={"error": "inputs.x: wrong shape"})

    with pytest.raises(InvalidRequest, match="wrong shape"):
        client(gateway).infer("cancer", {"x": np.zeros((1, 2))})


@pytest.mark.parametrize("status", [429, 503])
def test_what_was_refused_with_a_time_is_sent_again(status: int) -> None:
    answers = [problem(status, {"retry-after": "0"}), httpx.Response(200, json=ANSWER)]
    assert client(lambda request: answers.pop(0)).predict("cancer", [[1.0]]).version == "2"
    assert answers == []


def test_retries_end() -> None:
    count = 0

    def gateway(request: httpx.Request) -> httpx.Response:
        nonlocal count
        count += 1
        return problem(429, {"retry-after": "0"})

    with pytest.raises(RateLimited) as caught:
        client(gateway, retries=2).predict("cancer", [[1.0]])
    assert count == 3
    assert caught.value.retry_after == 0


@pytest.mark.parametrize(
    "answer",
    [
        problem(503),  # nobody said that trying again helps
        problem(500, {"retry-after": "0"}),  # may have been carried out
        problem(429, {"retry-after": "3600"}),  # beyond the caller's patience
    ],
)
def test_what_may_have_been_carried_out_or_takes_too_long_is_not_sent_again(answer: httpx.Response) -> None:
    answers = [answer]
    with pytest.raises(HeadraceError):
        client(lambda request: answers.pop(0)).predict("cancer", [[1.0]])
    assert answers == []


def test_a_connection_that_never_came_about_is_tried_again_and_one_that_broke_is_not() -> None:
    failures: list[Exception] = [httpx.ConnectError("refused")]

    def gateway(request: httpx.Request) -> httpx.Response:
        if failures:
            raise failures.pop(0)
        return httpx.Response(200, json=ANSWER)

    assert client(gateway).predict("cancer", [[1.0]]).version == "2"
    failures.append(httpx.ReadError("reset"))
    with pytest.raises(ConnectionFailed, match="cannot be reached"):
        client(gateway).predict("cancer", [[1.0]])
    failures.append(httpx.ReadTimeout("slow"))
    with pytest.raises(DeadlineExceeded):
        client(gateway).predict("cancer", [[1.0]])


def test_infer_carries_arrays_both_ways() -> None:
    seen: list[httpx.Request] = []

    def gateway(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        head: dict[str, Any] = {"model_name": "m", "model_version": "3", "id": "q"}
        vector, text = np.array([1.5, 2.5], "<f4").tobytes(), b"\x02\x00\x00\x00ok"
        head["outputs"] = [
            {"name": "y", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": len(vector)}},
            {"name": "t", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(text)}},
            {"name": "j", "datatype": "INT64", "shape": [1, 2], "data": [3, 4]},
        ]
        text_head = json.dumps(head).encode()
        headers = {"inference-header-content-length": str(len(text_head))}
        return httpx.Response(200, content=text_head + vector + text, headers=headers)

    inputs = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "s": np.array(["a", "bc"])}
    answer = client(gateway).infer("a/b", inputs, version="3", outputs=["y"])
    assert seen[0].url.raw_path == b"/v2/models/a%2Fb/versions/3/infer"
    assert answer.version == "3"
    np.testing.assert_array_equal(answer.outputs["y"], np.array([1.5, 2.5], np.float32))
    assert answer.outputs["t"].tolist() == [b"ok"]
    assert answer.outputs["j"].tolist() == [[3, 4]]
    length = int(seen[0].headers["inference-header-content-length"])
    head = json.loads(seen[0].content[:length])
    assert [(t["name"], t["datatype"], t["shape"]) for t in head["inputs"]] == [
        ("x", "FP32", [2, 3]),
        ("s", "BYTES", [2]),
    ]
    assert seen[0].content[length:] == inputs["x"].tobytes() + b"\x01\0\0\0a\x02\0\0\0bc"


def test_an_array_without_a_datatype_is_named() -> None:
    with pytest.raises(ValueError, match="x: there is no datatype for complex128"):
        encode_request({"x": np.array([1j])})
    for item in (3, True, None, 1.5):
        with pytest.raises(ValueError, match=f"x: {item} is neither text nor bytes"):
            encode_request({"x": np.array(["a", item], dtype=object)})


def test_an_answer_in_json_alone_is_read() -> None:
    body = {"model_name": "m", "outputs": [{"name": "s", "datatype": "BYTES", "shape": [1], "data": ["é"]}]}
    assert decode_answer(json.dumps(body).encode(), None).outputs["s"].tolist() == ["é".encode()]


def test_outcomes_leave_out_what_is_absent() -> None:
    bodies: list[Any] = []

    def gateway(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return httpx.Response(202, json={"accepted": 2, "event_ids": ["e1", "e2"]})

    given = [Outcome("r1", label="benign"), Outcome("r2", metric="revenue", value=0.0, row=1, event_id="e2")]
    assert client(gateway).outcomes(given) == ["e1", "e2"]
    assert bodies == [
        [
            {"request_id": "r1", "label": "benign"},
            {"request_id": "r2", "metric": "revenue", "value": 0.0, "event_id": "e2", "row": 1},
        ]
    ]


def parts_of(request: httpx.Request) -> list[tuple[str, str | None, bytes]]:
    head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
    message = BytesParser(policy=HTTP).parsebytes(head + request.content)
    return [
        (
            str(part.get_param("name", header="content-disposition")),
            part.get_filename(),
            bytes(part.get_content()),
        )
        for part in message.iter_parts()
    ]


async def test_push_streams_metadata_and_files_with_progress(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "model.onnx").write_bytes(b"\x00\xff" * 300_000)
    (tmp_path / "sub" / "tokenizer.json").write_text("{}")
    seen: list[httpx.Request] = []

    def gateway(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return problem(409, code="ALREADY_EXISTS")
        seen.append(request)
        return httpx.Response(201, json={"version": "7"})

    told: list[tuple[int, int]] = []
    pushed = client(gateway).push_model(
        "m", tmp_path, version="7", metadata={"metrics": {"f1": 0.5}}, progress=lambda *at: told.append(at)
    )
    async with AsyncHeadrace("http://gateway", transport=httpx.MockTransport(gateway)) as asynchronous:
        assert await asynchronous.push_model("m", [tmp_path], version="7") == pushed == {"version": "7"}
    first = parts_of(seen[0])
    assert int(seen[0].headers["content-length"]) == len(seen[0].content)
    assert json.loads(first[0][2]) == {"metrics": {"f1": 0.5}, "version": "7"}
    assert [(name, filename) for name, filename, _ in first] == [
        ("metadata", None),
        ("files", "model.onnx"),
        ("files", "sub/tokenizer.json"),
    ]
    assert first[1][2] == b"\x00\xff" * 300_000
    assert parts_of(seen[1])[1:] == first[1:]
    assert told[-1] == (600_002, 600_002)
    assert [sent for sent, _ in told] == sorted(sent for sent, _ in told)


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.onnx").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"would both be model\.onnx"):
        client(lambda request: problem(500)).push_model(
            "m", [tmp_path / "a" / "model.onnx", tmp_path / "b" / "model.onnx"]
        )


def test_models_are_listed_page_by_page() -> None:
    pages = {
        None: {"models": [{"name": "a"}], "next": "a"},
        "a": {"models": [{"name": "b"}], "next": None},
    }

    def gateway(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=pages[request.url.params.get("after")])

    assert [model["name"] for model in client(gateway).models()] == ["a", "b"]


async def test_versions_are_listed_page_by_page() -> None:
    pages: dict[str | None, Any] = {
        None: {"versions": [{"version": "1"}], "next": "1"},
        "1": {"versions": [{"version": "2"}], "next": None},
    }

    def gateway(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=pages[request.url.params.get("after")])

    async with AsyncHeadrace("http://gateway", transport=httpx.MockTransport(gateway)) as asynchronous:
        assert await asynchronous.versions("m") == client(gateway).versions("m")
    assert [found["version"] for found in client(gateway).versions("m")] == ["1", "2"]
    pages[None] = {"versions": [{"version": "1"}, {"version": "2"}]}  # an earlier release has no pages
    assert [found["version"] for found in client(gateway).versions("m")] == ["1", "2"]


def test_management_calls_say_what_they_mean() -> None:
    seen: list[tuple[str, str, Any]] = []

    def gateway(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else None
        seen.append((request.method, str(request.url.raw_path, "ascii"), body))
        key = {"key": "hr_x", "key_id": "x", "name": "n", "scopes": ["read"]}
        return httpx.Response(200, json={"alerts": [], "versions": [], **key})

    asking = client(gateway)
    asking.deploy("m", {"1": 90, "2": 10}, variants={"2": "challenger"}, pool="gpu")
    asking.set_alias("m", "champion", "2")
    asking.undeploy("m")
    asking.compare("m", "1", "2", "error_rate")
    assert asking.alerts("m", "open") == []
    assert asking.create_key("n", ["read"], rate_per_second=5, models=["m"]).key == "hr_x"
    assert seen == [
        (
            "PUT",
            "/v1/deployments/m",
            {
                "versions": [
                    {"version": "1", "weight": 90},
                    {"version": "2", "weight": 10, "variant": "challenger"},
                ],
                "pool": "gpu",
            },
        ),
        ("PUT", "/v1/models/m/aliases/champion", {"version": "2"}),
        ("DELETE", "/v1/deployments/m", None),
        ("GET", "/v1/analytics/models/m/compare?a=1&b=2&metric=error_rate", None),
        ("GET", "/v1/drift/alerts?model=m&state=open", None),
        (
            "POST",
            "/v1/keys",
            {"name": "n", "scopes": ["read"], "rate_per_second": 5, "burst": 0, "models": ["m"]},
        ),
    ]
