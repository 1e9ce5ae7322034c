"""The Open Inference Protocol as a client of another server sees it: tritonclient over HTTP and gRPC.

It runs in a process of its own, since its descriptors of the protocol and ours cannot live in one."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress

import grpc
import httpx
import pytest
from google.protobuf.json_format import MessageToDict
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from headrace.v1.dataplane_pb2 import Priority
from headrace.v1.tensor_pb2 import Code
from open_inference import open_inference_pb2 as oip
from open_inference import open_inference_pb2_grpc as oip_grpc

from tests.fixtures.gateway import (
    ADMIN,
    OTHER_MODEL,
    READ_ONLY,
    SLOW,
    GatewayThread,
    answer_like_a_worker,
    failing,
)
from tests.fixtures.waiting import PATIENCE_S


@pytest.fixture(scope="module", params=["hot", "asgi"])
def gateway(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayThread]:
    with GatewayThread(tmp_path_factory.mktemp("gateway"), hot=request.param == "hot") as running:
        yield running


@pytest.fixture
def stub(gateway: GatewayThread) -> Iterator[oip_grpc.GRPCInferenceServiceStub]:
    with grpc.insecure_channel(f"127.0.0.1:{gateway.running.gateway.grpc_port}") as channel:
        yield oip_grpc.GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
    gateway.running.router.answer = answer_like_a_worker


_HTTP_CLIENT = """
import json, sys
import numpy as np
import tritonclient.http as triton
port, key = sys.argv[1:]
headers = {"Authorization": "Bearer " + key}
client = triton.InferenceServerClient("127.0.0.1:" + port)
assert client.is_server_live() and client.is_server_ready()
assert client.is_model_ready("cancer", headers=headers)
found = {"server": client.get_server_metadata(headers=headers)["extensions"]}
found["model"] = client.get_model_metadata("cancer", headers=headers)
found["config"] = client.get_model_config("cancer", headers=headers)["max_batch_size"]
found["index"] = client.get_model_repository_index(headers=headers)
rows = np.array([[10, 2, 3], [20, 1, 1]], dtype=np.float32)
for name, binary_in, binary_out, algorithm in (
    ("json", False, False, None), ("binary", True, True, None), ("mixed", True, False, "gzip"),
    ("deflate", False, True, "deflate"),
):
    given = triton.InferInput("x", [2, 3], "FP32")
    given.set_data_from_numpy(rows, binary_data=binary_in)
    outputs = [triton.InferRequestedOutput(n, binary_data=binary_out) for n in ("label", "probabilities")]
    answer = client.infer("cancer", [given], model_version="2", outputs=outputs, request_id="r-1",
                          headers=dict(headers), request_compression_algorithm=algorithm)
    found[name] = [answer.as_numpy("label").tolist(), answer.as_numpy("probabilities").tolist(),
                   answer.get_response()["model_version"], answer.get_response()["id"]]
texts = triton.InferInput("text", [2], "BYTES")
texts.set_data_from_numpy(np.array(["a", "Stra\\u00dfe"], dtype=object))
found["bytes"] = client.infer("embedder", [texts], headers=headers).as_numpy("embedding").shape
try:
    client.infer("nope", [texts], headers=headers)
except triton.InferenceServerException as error:
    found["error"] = [error.status(), error.message()]
for binary in (True, False):
    best = triton.InferRequestedOutput("probabilities", binary_data=binary, class_count=1)
    mine = {"Authorization": headers["Authorization"]}  # the client adds to those that it is given
    answer = client.infer("cancer", [given], outputs=[best], headers=mine)
    found.setdefault("classes", []).append(answer.as_numpy("probabilities").astype(str).tolist())
stats = client.get_inference_statistics("cancer", headers=headers)["model_stats"][0]
found["stats"] = [stats["name"], *(stats["inference_stats"][name] for name in ("cache_hit", "cache_miss"))]
found["all stats"] = [one["name"] for one in client.get_inference_statistics(headers=headers)["model_stats"]]
given = triton.InferInput("x", [1, 3], "FP32")
given.set_data_from_numpy(rows[:1])
for level in (1, 2, 7):
    client.infer("cancer", [given], priority=level, headers=headers)
client.load_model("cancer", headers=headers)
try:
    client.load_model("cancer", headers=headers, config='{"max_batch_size": 3}')
except triton.InferenceServerException as error:
    found["loaded otherwise"] = error.status()
print(json.dumps(found))
"""

_GRPC_CLIENT = """
import json, sys
import numpy as np
import tritonclient.grpc as triton
port, key = sys.argv[1:]
headers = {"authorization": "Bearer " + key}
client = triton.InferenceServerClient("127.0.0.1:" + port)
assert client.is_server_live() and client.is_server_ready()
assert client.is_model_ready("cancer", headers=headers)
assert not client.is_model_ready("nope", headers=headers)
assert not client.is_model_ready("cancer", "9", headers=headers)
found = {"server": list(client.get_server_metadata(headers=headers).extensions)}
found["model"] = client.get_model_metadata("cancer", headers=headers).platform
config = client.get_model_config("cancer", headers=headers, as_json=True)["config"]
versions = config["version_policy"]["specific"]["versions"]
found["config"] = [config["max_batch_size"], config["input"], versions]
client.load_model("cancer", headers=headers)
for call, arguments in ((client.load_model, {"config": "{}"}), (client.unload_model, {})):
    try:
        call("cancer", headers=headers, **arguments)
    except triton.InferenceServerException as error:
        found.setdefault("repository", []).append(error.status())
found["index"] = [m.name for m in client.get_model_repository_index(headers=headers).models]
given = triton.InferInput("x", [2, 3], "FP32")
given.set_data_from_numpy(np.array([[10, 2, 3], [20, 1, 1]], dtype=np.float32))
answer = client.infer("cancer", [given], headers=headers, request_id="r-2", client_timeout=5)
found["infer"] = [answer.as_numpy("label").tolist(), answer.as_numpy("probabilities").tolist(),
                  answer.get_response().id]
for count in (1, 5):
    best = triton.InferRequestedOutput("probabilities", class_count=count)
    answer = client.infer("cancer", [given], outputs=[best], headers=headers)
    found.setdefault("classes", []).append(answer.as_numpy("probabilities").astype(str).tolist())
all_stats = client.get_inference_statistics(headers=headers).model_stats
found["stats"] = [[one.name, one.version] for one in all_stats]
heard = []
client.start_stream(lambda result, error: heard.append((result, error)), headers=headers)
for number in range(300):
    client.async_stream_infer("cancer", [given], request_id=str(number), enable_empty_final_response=True)
client.async_stream_infer("nope", [given])
client.stop_stream()
results = [result for result, _ in heard[:-1]]
found["stream"] = [result.get_response().id for result in results]
found["labels"] = [result.as_numpy("label").tolist() for result in results]
found["final"] = [one.get_response().parameters["triton_final_response"].bool_param for one in results]
found["refused"] = heard[-1][1].message()
client.start_stream(lambda result, error: heard.append((result, error)),
                    headers=headers | {"triton_grpc_error": "true"})
client.async_stream_infer("nope", [given])
client.stop_stream()
found["ended"] = heard[-1][1].status()
for level in (1, 2, 7):
    client.infer("cancer", [given], priority=level, headers=headers)
texts = triton.InferInput("text", [2], "BYTES")
texts.set_data_from_numpy(np.array(["a", "Stra\\u00dfe"], dtype=object))
found["bytes"] = client.infer("embedder", [texts], headers=headers).as_numpy("embedding").shape
try:
    client.infer("nope", [texts], headers={"x-api-key": key})
except triton.InferenceServerException as error:
    found["error"] = [error.status(), error.message()]
print(json.dumps(found))
"""


def run_client(script: str, port: int) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", script, str(port), ADMIN],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_tritonclient_over_http(gateway: GatewayThread) -> None:
    found = run_client(_HTTP_CLIENT, gateway.running.port)
    expected = [[1, 0], [[0.125, 0.875], [0.75, 0.25]], "2", "r-1"]
    assert found["json"] == found["binary"] == found["mixed"] == found["deflate"] == expected
    assert found["bytes"] == [2, 4]
    assert found["error"] == ["404", "There is no model 'nope' in service."]
    assert found["classes"] == [[["0.875:1:benign"], ["0.75:0:malignant"]]] * 2
    # Without asking whether they are there, clients read what nobody counts here.
    assert found["stats"] == ["cancer", {"count": 0, "ns": 0}, {"count": 0, "ns": 0}]
    assert found["config"] == 64  # clients put no more rows into a request
    assert found["loaded otherwise"] == "501"
    assert found["all stats"] == ["cancer", "cancer", "embedder", "mixed"]
    levels = [request.priority for request in gateway.running.router.requests[-3:]]
    assert levels == [Priority.PRIORITY_HIGH, Priority.PRIORITY_NORMAL, Priority.PRIORITY_LOW]
    assert "binary_tensor_data" in str(found["server"])
    assert found["model"] == {
        "name": "cancer",
        "versions": ["1", "2"],
        "platform": "onnx_onnxv1",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}],
        "outputs": [
            {"name": "label", "datatype": "INT64", "shape": [-1]},
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, 2]},
        ],
    }
    sent = [request for request in gateway.running.router.requests if request.model == "embedder"]
    assert sent[-1].inputs[0].data == b"\x01\0\0\0a\x07\0\0\0Stra\xc3\x9fe"


def test_tritonclient_over_grpc(gateway: GatewayThread) -> None:
    found = run_client(_GRPC_CLIENT, gateway.running.gateway.grpc_port)
    assert found["infer"] == [[1, 0], [[0.125, 0.875], [0.75, 0.25]], "r-2"]
    both = [["0.875:1:benign", "0.125:0:malignant"], ["0.75:0:malignant", "0.25:1:benign"]]
    assert found["classes"] == [[row[:1] for row in both], both]
    rows = {"name": "x", "data_type": "TYPE_FP32", "dims": ["3"]}
    assert found["config"] == [64, [rows], ["1", "2"]]
    assert found["repository"] == ["StatusCode.UNIMPLEMENTED"] * 2
    levels = [one.priority for one in gateway.running.router.requests[-10:] if one.model == "cancer"][-3:]
    assert levels == [Priority.PRIORITY_HIGH, Priority.PRIORITY_NORMAL, Priority.PRIORITY_LOW]
    assert found["bytes"] == [2, 4]
    assert found["error"] == ["StatusCode.NOT_FOUND", "There is no model 'nope' in service."]
    assert found["index"] == ["cancer", "cancer", "embedder", "mixed"]
    assert found["stats"] == [["cancer", "1"], ["cancer", "2"], ["embedder", "1"], ["mixed", "7"]]
    assert "statistics" in str(found["server"])
    assert found["stream"] == [str(number) for number in range(300)]
    assert found["labels"] == [[1, 0]] * 300
    assert found["final"] == [True] * 300
    assert found["refused"] == "There is no model 'nope' in service."
    assert found["ended"] == "StatusCode.NOT_FOUND"


def test_a_body_without_json_is_the_one_input(gateway: GatewayThread) -> None:
    """As `curl --data-binary` sends it, by the extension for binary tensors."""

    def answered(model: str, body: bytes) -> httpx.Response:
        return gateway.request("POST", f"/v2/models/{model}/infer", body, inference_header_content_length="0")

    rows = struct.pack("<6f", 10, 2, 3, 20, 1, 1)
    for _again in range(2):
        answer = answered("cancer", rows)
        assert answer.status_code == 200, answer.text
        head = int(answer.headers["inference-header-content-length"])
        said = json.loads(answer.content[:head])
        assert [(one["name"], one["shape"]) for one in said["outputs"]] == [
            ("label", [2]), ("probabilities", [2, 2])
        ]  # fmt: skip
        assert answer.content[head:] == struct.pack("<2q4f", 1, 0, 0.125, 0.875, 0.75, 0.25)
    assert answered("embedder", "Straße".encode()).status_code == 200
    assert gateway.running.router.requests[-1].inputs[0].data == b"\x07\0\0\0Stra\xc3\x9fe"
    for model, body, words in (
        ("cancer", rows[:10], "10 bytes where shape [1, 3] asks for 12"),
        ("cancer", b"", "0 bytes"),
        ("mixed", rows, "age, city"),
    ):
        refused = answered(model, body)
        assert refused.status_code == 400
        assert words in refused.json()["error"]


KEY = (("x-api-key", ADMIN),)


def test_classes_are_not_told_by_what_was_learned(
    stub: oip_grpc.GRPCInferenceServiceStub, gateway: GatewayThread
) -> None:
    """Nor are they learned: who asks for numbers before and after them gets numbers."""
    rows = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [10, 2, 3]}
    message = oip.ModelInferRequest(model_name="cancer", raw_input_contents=[struct.pack("<3f", 10, 2, 3)])
    message.inputs.add(name="x", datatype="FP32", shape=[1, 3])
    message.outputs.add(name="probabilities")
    numbers, best = [0.125, 0.875], ["0.875:1:benign"]
    for count in (0, 0, 0, 1, 1, 1, 0, 0):
        output = {"name": "probabilities"} | ({"parameters": {"classification": count}} if count else {})
        answer = gateway.request("POST", "/v2/models/cancer/infer", {"inputs": [rows], "outputs": [output]})
        assert answer.json()["outputs"][0]["data"] == (best if count else numbers)
        message.outputs[0].parameters.clear()
        if count:
            message.outputs[0].parameters["classification"].int64_param = count
        said = stub.ModelInfer(message, metadata=KEY, timeout=PATIENCE_S)
        wanted = b"\x0e\0\0\0" + best[0].encode() if count else struct.pack("<2f", *numbers)
        assert said.raw_output_contents[0] == wanted


def mixed_request() -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(model_name="mixed", id="m")
    age = request.inputs.add(name="age", datatype="INT64", shape=[2, 1])
    age.contents.int64_contents.extend([3, 5])
    city = request.inputs.add(name="city", datatype="BYTES", shape=[2, 1])
    city.contents.bytes_contents.extend([b"Ulm", b"Bonn"])
    return request


def test_strangers_are_refused_before_their_message_is_read(
    stub: oip_grpc.GRPCInferenceServiceStub, gateway: GatewayThread
) -> None:
    request = mixed_request()
    request.parameters["padding"].string_param = "x" * (40 << 20)  # larger than is ever read
    with pytest.raises(grpc.RpcError) as raised:
        stub.ModelInfer(request, metadata=(("x-api-key", "hr_nobody"),), timeout=PATIENCE_S)
    assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
    with pytest.raises(grpc.RpcError) as raised:
        stub.ModelInfer(request, metadata=KEY, timeout=PATIENCE_S)
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert stub.ServerLive(oip.ServerLiveRequest(), timeout=PATIENCE_S).live


def test_metadata_counts_against_the_limit(stub: oip_grpc.GRPCInferenceServiceStub) -> None:
    slow = (("x-api-key", SLOW),)
    codes = []
    for _ in range(3):
        try:
            stub.ModelMetadata(oip.ModelMetadataRequest(name="cancer"), metadata=slow, timeout=PATIENCE_S)
            codes.append(grpc.StatusCode.OK)
        except grpc.RpcError as error:
            codes.append(error.code())
    assert codes[-1] is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_the_timeout_parameter(stub: oip_grpc.GRPCInferenceServiceStub, gateway: GatewayThread) -> None:
    request = mixed_request()
    request.parameters["timeout"].int64_param = 1_500_000
    stub.ModelInfer(request, metadata=KEY, timeout=PATIENCE_S)
    assert 0 < gateway.running.router.requests[-1].timeout_us <= 1_510_000
    request.parameters["timeout"].string_param = "soon"
    with pytest.raises(grpc.RpcError) as raised:
        stub.ModelInfer(request, metadata=KEY, timeout=PATIENCE_S)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_calls_are_counted_as_what_they_were(
    stub: oip_grpc.GRPCInferenceServiceStub, gateway: GatewayThread
) -> None:
    def counts() -> tuple[float, float]:
        url = f"http://127.0.0.1:{gateway.running.gateway.ops_port}/metrics"
        said = httpx.get(url, trust_env=False, timeout=PATIENCE_S).text
        lines = [line for line in said.splitlines() if 'model="mixed",route="grpc_infer"' in line]
        answered = [line for line in lines if line.startswith("headrace_gateway_requests_total{")]
        good = sum(float(line.split()[-1]) for line in answered if 'status="200"' in line)
        return good, sum(float(line.split()[-1]) for line in answered) - good

    good, bad = counts()
    stub.ModelInfer(mixed_request(), metadata=KEY, timeout=PATIENCE_S)
    wrong = mixed_request()
    wrong.inputs[0].shape[0] = 3
    with pytest.raises(grpc.RpcError):
        stub.ModelInfer(wrong, metadata=KEY, timeout=PATIENCE_S)
    assert counts() == (good + 1, bad + 1)


def test_typed_contents_and_the_deadline(
    stub: oip_grpc.GRPCInferenceServiceStub, gateway: GatewayThread
) -> None:
    request = mixed_request()
    request.parameters["user_id"].string_param = "u9"
    request.parameters["level"].int64_param = 3
    answer = stub.ModelInfer(request, metadata=KEY, timeout=30)
    assert MessageToDict(answer)["outputs"] == [{"name": "score", "datatype": "FP64", "shape": ["2"]}]
    assert answer.model_version == "7"
    sent = gateway.running.router.requests[-1]
    assert sent.inputs[1].data == b"\x03\0\0\0Ulm\x04\0\0\0Bonn"
    assert sent.unit == "u9"
    assert sent.parameters["level"].int64_value == 3
    assert 0 < sent.timeout_us <= 31_000_000  # gRPC rounds timeouts up on the wire


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        (lambda r: r.inputs.pop(), "INVALID_ARGUMENT", "inputs.city is missing"),
        (lambda r: setattr(r.inputs[0], "datatype", "INT32"), "INVALID_ARGUMENT", "inputs.age has datatype"),
        (lambda r: r.inputs[0].shape.append(2), "INVALID_ARGUMENT", "inputs.age is [2, 1, 2]"),
        (lambda r: r.inputs[0].contents.int64_contents.append(1), "INVALID_ARGUMENT", "inputs.age has 3"),
        (lambda r: r.raw_input_contents.append(b"1"), "INVALID_ARGUMENT", "raw_input_contents"),
        (lambda r: r.outputs.add(name="nope"), "INVALID_ARGUMENT", "outputs.nope"),
        (lambda r: setattr(r, "model_name", "nope"), "NOT_FOUND", "model"),
        (lambda r: setattr(r, "model_version", "9"), "NOT_FOUND", "version"),
    ],
)
def test_bad_grpc_requests(
    stub: oip_grpc.GRPCInferenceServiceStub, change: object, status: str, words: str
) -> None:
    request = mixed_request()
    assert callable(change)
    change(request)
    with pytest.raises(grpc.RpcError) as raised:
        stub.ModelInfer(request, metadata=KEY, timeout=PATIENCE_S)
    assert raised.value.code().name == status
    assert words in str(raised.value.details())


@pytest.mark.parametrize(
    ("metadata", "status"),
    [
        ((), "UNAUTHENTICATED"),
        ((("authorization", "Bearer nonsense"),), "UNAUTHENTICATED"),
        ((("authorization", f"Bearer {READ_ONLY}"),), "PERMISSION_DENIED"),
        ((("authorization", f"Bearer {OTHER_MODEL}"),), "PERMISSION_DENIED"),
    ],
)
def test_grpc_callers(
    stub: oip_grpc.GRPCInferenceServiceStub, metadata: tuple[tuple[str, str], ...], status: str
) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        stub.ModelInfer(mixed_request(), metadata=metadata, timeout=PATIENCE_S)
    assert raised.value.code().name == status


def test_grpc_limits_and_router_errors(
    stub: oip_grpc.GRPCInferenceServiceStub, gateway: GatewayThread
) -> None:
    limited = (("x-api-key", SLOW),)
    with suppress(grpc.RpcError):  # the other way's run may have used it up
        stub.ModelInfer(mixed_request(), metadata=limited, timeout=PATIENCE_S)
    with pytest.raises(grpc.RpcError) as raised:
        stub.ModelInfer(mixed_request(), metadata=limited, timeout=PATIENCE_S)
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    gateway.running.router.answer = failing(Code.CODE_UNAVAILABLE, "No worker has it.", retry_after_ms=250)
    with pytest.raises(grpc.RpcError) as raised:
        stub.ModelInfer(mixed_request(), metadata=KEY, timeout=PATIENCE_S)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    trailing: dict[str, str] = dict(raised.value.trailing_metadata())  # type: ignore[arg-type]  # the stub's pairs
    assert trailing["grpc-retry-pushback-ms"] == "250"
    gateway.running.router.answer = lambda _request: None
    with pytest.raises(grpc.RpcError) as raised:
        stub.ModelInfer(mixed_request(), metadata=KEY, timeout=0.2)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_health_and_reflection(gateway: GatewayThread) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{gateway.running.gateway.grpc_port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        asked = health_pb2.HealthCheckRequest(service="inference.GRPCInferenceService")
        assert health.Check(asked, timeout=PATIENCE_S).status == health_pb2.HealthCheckResponse.SERVING
        names = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=PATIENCE_S
        )
        listed = [service.name for service in next(iter(names)).list_services_response.service]
        assert "inference.GRPCInferenceService" in listed
