"""`/v1/embeddings` as OpenAI's own client asks for it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest
from headrace.v1.tensor_pb2 import Code, DataType, Tensor

from services.common.bus import Record
from services.common.topics import DEPLOYMENTS
from tests.fixtures.gateway import ADMIN, OTHER_MODEL, READ_ONLY, GatewayThread, configs, failing
from tests.fixtures.waiting import PATIENCE_S, until


@pytest.fixture(scope="module", params=["hot", "asgi"])
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayThread]:
    with GatewayThread(tmp_path_factory.mktemp("gateway"), hot=request.param == "hot") as running:
        running.running.router.answer = _embed
        yield running


def _embed(request: PredictRequest) -> PredictReply:
    """Row i is [i, 1, 2, 0.5]; each row has three tokens."""
    rows = request.inputs[0].shape[0]
    vectors = b"".join(struct.pack("<4f", row, 1, 2, 0.5) for row in range(rows))
    reply = PredictReply(id=request.id, version="1")
    reply.outputs.add(name="embedding", datatype=DataType.DATA_TYPE_FP32, shape=[rows, 4], data=vectors)
    tokens = struct.pack(f"<{rows}q", *([3] * rows))
    reply.outputs.append(
        Tensor(name="headrace.tokens", datatype=DataType.DATA_TYPE_INT64, shape=[rows], data=tokens)
    )
    return reply


def _client(host: GatewayThread, key: str = ADMIN) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{host.running.base}/v1", api_key=key, max_retries=0, timeout=PATIENCE_S)


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_texts_become_vectors(host: GatewayThread, encoding: str | None) -> None:
    # Without a format the client itself asks for base64, and unpacks it.
    options: Any = {"encoding_format": encoding} if encoding else {}
    with _client(host) as client:
        answer = client.embeddings.create(model="embedder", input=["a", "b"], user="u", **options)
    vectors = [one.embedding for one in answer.data]
    if encoding == "base64":
        assert all(isinstance(one, str) for one in vectors)
    else:
        assert vectors == [[0, 1, 2, 0.5], [1, 1, 2, 0.5]]
    assert [one.index for one in answer.data] == [0, 1]
    assert answer.model == "embedder"
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 6
    sent = host.running.router.requests[-1]
    assert sent.inputs[0].data == b"\1\0\0\0a\1\0\0\0b"
    assert sent.unit == "u"


def test_a_single_text_is_a_list_of_one(host: GatewayThread) -> None:
    with _client(host) as client:
        answer = client.embeddings.create(
            model="embedder", input="one", dimensions=4, encoding_format="float"
        )
    assert [one.embedding for one in answer.data] == [[0, 1, 2, 0.5]]


@pytest.mark.parametrize(
    ("asked", "status", "param"),
    [
        ({"model": "nobody", "input": "x"}, 404, "model"),
        ({"model": "cancer", "input": "x"}, 400, "model"),
        ({"model": "embedder", "input": []}, 400, "input"),
        ({"model": "embedder", "input": ["a", 7]}, 400, "input[1]"),
        ({"model": "embedder", "input": [[1, 2]]}, 400, "input[0]"),
        ({"model": "embedder", "input": ["x"] * 2049}, 400, "input"),
        ({"model": "embedder", "input": "x", "dimensions": 3}, 400, "dimensions"),
        ({"model": "embedder", "input": "x", "encoding_format": "hex"}, 400, "encoding_format"),
        ({"model": "embedder", "input": "x", "user": "u" * 513}, 400, "user"),
        ({"model": "embedder"}, 400, "input"),
    ],
)
def test_what_is_wrong_is_named(
    host: GatewayThread, asked: dict[str, object], status: int, param: str
) -> None:
    with _client(host) as client, pytest.raises(openai.APIStatusError) as caught:
        client.post("/embeddings", body=asked, cast_to=dict)
    error = caught.value
    assert error.status_code == status
    assert error.param == param
    assert error.type == "invalid_request_error"
    assert error.code == ("model_not_found" if status == 404 else None)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/chat/completions", 404),
        ("POST", "/v1/responses", 404),
        ("POST", "/v1/embeddings/", 404),
        ("GET", "/v1/embeddings", 405),
        ("PUT", "/v1/files", 405),
    ],
)
def test_what_is_not_there_is_the_callers_mistake(
    host: GatewayThread, method: str, path: str, status: int
) -> None:
    answer = host.request(method, path, {"model": "embedder"})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (status, "invalid_request_error", None)
    assert path in error["message"]


@pytest.mark.parametrize(
    ("backends", "outputs"),
    [
        (["embedding", "embedding"], ["embedding", "headrace.tokens"]),
        (["embedding", "onnx"], []),
        (["onnx", "embedding"], []),
        (["embedding", "embedding.vector"], []),
    ],
)
def test_tokens_are_asked_for_where_every_version_counts_them(
    host: GatewayThread, backends: list[str], outputs: list[str]
) -> None:
    """The router chooses the version, and one of another backend, or whose output is called otherwise (what
    stands behind the dot), refuses an output that it does not have."""
    config = next(config for config in configs() if config.model == "embedder")
    config.model = "-".join(backends)
    signature = config.versions.pop().signature
    for number, said in enumerate(backends, 1):
        backend, _, name = said.partition(".")
        signature.outputs[0].name = name or "embedding"
        config.versions.add(version=str(number), backend=backend, signature=signature, weight=5000)
    record = Record(DEPLOYMENTS.name, config.model.encode(), config.SerializeToString())
    host.run(host.running.bus.publish([record]))
    asked = {"model": config.model, "input": "x"}
    until(lambda: host.request("POST", "/v1/embeddings", asked).status_code == 200)
    assert list(host.running.router.requests[-1].outputs) == outputs


def test_keys_count_and_failures_are_the_servers(host: GatewayThread) -> None:
    with _client(host, "hr_nobody") as client, pytest.raises(openai.AuthenticationError) as unknown:
        client.embeddings.create(model="embedder", input="x")
    assert unknown.value.code == "invalid_api_key"
    for key in (OTHER_MODEL, READ_ONLY):
        with _client(host, key) as client, pytest.raises(openai.PermissionDeniedError):
            client.embeddings.create(model="embedder", input="x")
    host.running.router.answer = failing(Code.CODE_UNAVAILABLE, "Nobody has it.", retry_after_ms=1500)
    try:
        with _client(host) as client, pytest.raises(openai.InternalServerError) as away:
            client.embeddings.create(model="embedder", input="x")
    finally:
        host.running.router.answer = _embed
    assert away.value.status_code == 503
    assert away.value.type == "server_error"
    assert away.value.response.headers["retry-after"] == "2"
