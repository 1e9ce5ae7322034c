"""A gateway with more requests than the platform can answer refuses, at once and with a time to come back, on
every front; what can wait is refused first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from headrace.v1.tensor_pb2 import Code
from open_inference import open_inference_pb2 as oip_pb2
from open_inference import open_inference_pb2_grpc as oip_grpc

from services.gateway.rest.app import Parts, rest_app
from tests.fixtures.gateway import (
    PREDICT_ONLY,
    GatewayThread,
    answer_like_a_worker,
    failing,
    running_gateway,
)
from tests.fixtures.waiting import PATIENCE_S

BODY = {"model": "cancer", "inputs": [[10.0, 2.0, 3.0]]}


@pytest.fixture(scope="module", params=["hot", "asgi"])
def gateway(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayThread]:
    state = tmp_path_factory.mktemp(f"gateway-{request.param}")
    with GatewayThread(state, hot=request.param == "hot") as running:
        yield running


@pytest.fixture
def full(gateway: GatewayThread) -> Iterator[GatewayThread]:
    """With room for nothing more."""
    admission = gateway.running.gateway.admission
    usual, admission.limit = admission.limit, 0
    yield gateway
    admission.limit = usual


@pytest.mark.parametrize("path", ["/v1/predict", "/v2/models/cancer/infer"])
def test_rest(full: GatewayThread, path: str) -> None:
    before = len(full.running.router.requests)
    answer = full.request("POST", path, BODY)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert "more requests" in json.dumps(answer.json())
    assert len(full.running.router.requests) == before


def test_a_wrong_key_is_still_a_wrong_key(full: GatewayThread) -> None:
    answer = full.request("POST", "/v1/predict", BODY, authorization="Bearer nobody")
    assert answer.status_code == 401


def test_grpc(full: GatewayThread) -> None:
    contents = oip_pb2.InferTensorContents(fp32_contents=[10.0, 2.0, 3.0])
    tensor = oip_pb2.ModelInferRequest.InferInputTensor(
        name="x", datatype="FP32", shape=[1, 3], contents=contents
    )
    asked = oip_pb2.ModelInferRequest(model_name="cancer", inputs=[tensor])
    with grpc.insecure_channel(f"127.0.0.1:{full.running.gateway.grpc_port}") as channel:
        stub = oip_grpc.GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(asked, timeout=PATIENCE_S, metadata=(("x-api-key", PREDICT_ONLY),))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    trailing: dict[str, object] = {one.key: one.value for one in caught.value.trailing_metadata()}
    assert trailing["grpc-retry-pushback-ms"] == "1000"


@pytest.mark.parametrize(
    ("code", "status"), [(Code.CODE_RESOURCE_EXHAUSTED, 429), (Code.CODE_UNAVAILABLE, 503)]
)
def test_what_a_worker_refuses_says_when_to_come_back(
    gateway: GatewayThread, code: Code, status: int
) -> None:
    router = gateway.running.router
    router.answer = failing(code, "the queue of the model is full", retry_after_ms=2400)
    try:
        answer = gateway.request("POST", "/v1/predict", BODY)
    finally:
        router.answer = answer_like_a_worker
    assert answer.status_code == status
    assert answer.headers["retry-after"] == "3"


async def test_a_gateway_is_not_ready_before_it_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[dict[str, str]] = []

    def recorded(parts: Parts) -> object:
        said.append(parts.health.reasons())
        return rest_app(parts)

    monkeypatch.setattr("services.gateway.app.rest_app", recorded)
    async with running_gateway(tmp_path) as running:
        assert "ports" in said[0]
        assert running.gateway.health.ready
