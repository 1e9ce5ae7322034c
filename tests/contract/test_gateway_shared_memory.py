"""Tensors in shared memory over REST and gRPC: both fronts know the same regions and write the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import httpx
import numpy as np
import pytest
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest
from headrace.v1.tensor_pb2 import Tensor
from open_inference import open_inference_pb2 as oip
from open_inference import open_inference_pb2_grpc as oip_grpc

from services.common.shared_memory import DIRECTORY, read
from services.gateway.regions import Regions
from tests.fixtures.gateway import (
    OTHER_MODEL,
    PREDICT_ONLY,
    READ_ONLY,
    GatewayThread,
    answer_like_a_worker,
)
from tests.fixtures.waiting import PATIENCE_S

ROWS = np.array([[10, 2, 3], [20, 1, 1]], dtype=np.float32)
LABELS, PROBABILITIES = [1, 0], [[0.125, 0.875], [0.75, 0.25]]
#: Where outputs begin in `memory`, behind the rows.
LABELS_AT, PROBABILITIES_AT, SIZE = 24, 40, 64


def reading(request: PredictRequest) -> PredictReply:
    """A worker that reads where its inputs lie."""
    found = PredictRequest()
    found.CopyFrom(request)
    for tensor in found.inputs:
        place = tensor.shared_memory
        if place.byte_size:
            tensor.data = read(place.key, place.offset, place.byte_size, tensor.name, place.identity)
    return answer_like_a_worker(found)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gateway")


@pytest.fixture(scope="module", params=["hot", "asgi"])
def gateway(request: pytest.FixtureRequest, state: Path) -> Iterator[GatewayThread]:
    prefix = "headrace-test-"
    with GatewayThread(
        state, hot=request.param == "hot", shared_memory=True, shared_memory_prefix=prefix
    ) as running:
        running.running.router.answer = reading
        yield running


@pytest.fixture
def memory() -> Iterator[Path]:
    path = DIRECTORY / f"headrace-test-{uuid4().hex}"
    path.write_bytes(ROWS.tobytes() + bytes(SIZE - ROWS.nbytes))
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def rest(gateway: GatewayThread) -> Iterator[httpx.Client]:
    headers = {"x-api-key": PREDICT_ONLY}
    with httpx.Client(base_url=gateway.running.base, headers=headers, timeout=PATIENCE_S) as client:
        yield client
        client.post("/v2/systemsharedmemory/unregister")


@contextmanager
def over_grpc(gateway: GatewayThread) -> Iterator[oip_grpc.GRPCInferenceServiceStub]:
    with grpc.insecure_channel(f"127.0.0.1:{gateway.running.gateway.grpc_port}") as channel:
        yield oip_grpc.GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]


KEY = (("x-api-key", PREDICT_ONLY),)


def registered(rest: httpx.Client, memory: Path, name: str = "all", **more: Any) -> httpx.Response:
    asked = {"key": f"/{memory.name}", "offset": 0, "byte_size": SIZE} | more
    return rest.post(f"/v2/systemsharedmemory/region/{name}/register", json=asked)


def place(byte_size: int, offset: int = 0, name: str = "all") -> dict[str, Any]:
    where = {"shared_memory_region": name, "shared_memory_byte_size": byte_size}
    return where | ({"shared_memory_offset": offset} if offset else {})


def asked(outputs: list[dict[str, Any]] | None = None, **parameters: Any) -> dict[str, Any]:
    lies = {"name": "x", "shape": [2, 3], "datatype": "FP32", "parameters": place(24) | parameters}
    return {"inputs": [lies]} | ({"outputs": outputs} if outputs is not None else {})


def infer(rest: httpx.Client, body: dict[str, Any]) -> httpx.Response:
    return rest.post("/v2/models/cancer/infer", json=body)


def test_regions_are_registered_listed_and_forgotten(rest: httpx.Client, memory: Path) -> None:
    assert registered(rest, memory).status_code == 200
    assert registered(rest, memory, "part", offset=8, byte_size=16).status_code == 200
    said = {"key": f"/{memory.name}", "offset": 8, "byte_size": 16, "name": "part"}
    status = "/v2/systemsharedmemory/region/part/status"
    assert rest.get(status).json() == [said]
    assert {one["name"] for one in rest.get("/v2/systemsharedmemory/status").json()} == {"all", "part"}
    assert rest.post("/v2/systemsharedmemory/region/part/unregister").status_code == 200
    assert rest.get(status).status_code == 404
    assert rest.post("/v2/systemsharedmemory/unregister").status_code == 200
    assert rest.get("/v2/systemsharedmemory/status").json() == []


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        ({"byte_size": SIZE + 1}, 400, "no part of"),
        ({"key": "/other"}, 400, "begin with 'headrace-test-'"),
        ({"key": "/headrace-test-none"}, 400, "cannot be opened"),
        ({"key": "/../../etc/passwd"}, 400, "names no shared memory"),
        ({"key": 7}, 400, "key"),
        ({"byte_size": "7"}, 400, "byte_size"),
        ({"offset": 2**70}, 400, "offset"),
    ],
)
def test_what_cannot_be_registered_is_refused(
    rest: httpx.Client, memory: Path, more: dict[str, Any], status: int, said: str
) -> None:
    answer = registered(rest, memory, **more)
    assert answer.status_code == status
    assert said in answer.json()["error"]


def test_a_name_that_is_taken_and_bodies_that_are_none(rest: httpx.Client, memory: Path) -> None:
    registered(rest, memory)
    assert registered(rest, memory).status_code == 200
    taken = registered(rest, memory, byte_size=8)
    assert taken.status_code == 400
    assert "registered already" in taken.json()["error"]
    for body in (b"{", b"[]", b"{}", b""):
        answer = rest.post("/v2/systemsharedmemory/region/b/register", content=body)
        assert answer.status_code == 400
        assert answer.json()["error"]


def test_other_keys_and_scopes(gateway: GatewayThread, rest: httpx.Client, memory: Path) -> None:
    registered(rest, memory)
    for key, status in ((OTHER_MODEL, 200), (READ_ONLY, 403), ("nobody", 401)):
        answer = rest.get("/v2/systemsharedmemory/status", headers={"x-api-key": key})
        assert answer.status_code == status
        if status == 200:
            assert answer.json() == []
    with over_grpc(gateway) as stub:
        for key, code in ((READ_ONLY, "PERMISSION_DENIED"), ("nobody", "UNAUTHENTICATED")):
            with pytest.raises(grpc.RpcError) as error:
                stub.SystemSharedMemoryUnregister(
                    oip.SystemSharedMemoryUnregisterRequest(),
                    metadata=(("x-api-key", key),),
                    timeout=PATIENCE_S,
                )
            assert error.value.code().name == code
    assert infer(rest, asked()).status_code == 200


def test_inputs_are_read_where_they_lie(gateway: GatewayThread, rest: httpx.Client, memory: Path) -> None:
    registered(rest, memory)
    for _again in range(3):  # bodies of one form are learned; such are not
        outputs = infer(rest, asked()).json()["outputs"]
        assert outputs[0]["data"] == LABELS
    sent = gateway.running.router.requests[-1].inputs[0]
    assert not sent.data
    assert (sent.shared_memory.key, sent.shared_memory.offset) == (memory.name, 0)
    memory.write_bytes(ROWS[::-1].tobytes() + bytes(SIZE - ROWS.nbytes))
    assert infer(rest, asked()).json()["outputs"][0]["data"] == LABELS[::-1]


def test_offsets_add_up(gateway: GatewayThread, rest: httpx.Client, memory: Path) -> None:
    memory.write_bytes(bytes(12) + ROWS.tobytes())
    registered(rest, memory, offset=4, byte_size=32)
    assert infer(rest, asked(shared_memory_offset=8)).json()["outputs"][0]["data"] == LABELS
    assert gateway.running.router.requests[-1].inputs[0].shared_memory.offset == 12


def test_outputs_are_written_where_they_are_wanted(rest: httpx.Client, memory: Path) -> None:
    registered(rest, memory)
    registered(rest, memory, "tail", offset=PROBABILITIES_AT, byte_size=16)
    body = asked(
        [
            {"name": "label", "parameters": place(16, LABELS_AT)},
            {"name": "probabilities", "parameters": place(16, name="tail") | {"binary_data": False}},
        ]
    )
    label, probabilities = infer(rest, body).json()["outputs"]
    assert label == {"name": "label", "datatype": "INT64", "shape": [2], "parameters": place(16, LABELS_AT)}
    assert probabilities["parameters"] == place(16, name="tail")
    written = memory.read_bytes()
    assert np.frombuffer(written, np.int64, 2, LABELS_AT).tolist() == LABELS
    assert np.frombuffer(written, np.float32, 4, PROBABILITIES_AT).reshape(2, 2).tolist() == PROBABILITIES


def test_one_output_may_come_as_bytes_beside(rest: httpx.Client, memory: Path) -> None:
    registered(rest, memory)
    body = asked(
        [
            {"name": "label", "parameters": place(16, LABELS_AT)},
            {"name": "probabilities", "parameters": {"binary_data": True}},
        ]
    )
    answer = infer(rest, body)
    length = int(answer.headers["inference-header-content-length"])
    assert [one["parameters"] for one in json.loads(answer.content[:length])["outputs"]] == [
        place(16, LABELS_AT),
        {"binary_data_size": 16},
    ]
    assert np.frombuffer(answer.content[length:], np.float32).reshape(2, 2).tolist() == PROBABILITIES
    assert np.frombuffer(memory.read_bytes(), np.int64, 2, LABELS_AT).tolist() == LABELS


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (asked(shared_memory_region="none"), "inputs.x: this key registered no"),
        (asked(shared_memory_region=3), "must be a text"),
        (asked(shared_memory_byte_size=23), "has 23 bytes where shape [2, 3] asks for 24"),
        (asked(shared_memory_byte_size=True), "shared_memory_byte_size must be"),
        (asked(shared_memory_offset=-1), "shared_memory_offset must be"),
        (asked(shared_memory_offset=SIZE), "more than the region"),
        (asked(binary_data_size=24), "data beside its shared memory"),
        (asked([{"name": "label", "parameters": place(15)}]), "outputs.label has 16 bytes"),
        (asked([{"name": "label", "parameters": place(SIZE + 1)}]), "outputs.label: 65 bytes from 0"),
        (asked([{"name": "label", "parameters": place(16, name="none")}]), "outputs.label: this key"),
        (asked([{"name": "label", "parameters": {"shared_memory_region": "all"}}]), "byte_size is missing"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    rest: httpx.Client, memory: Path, body: dict[str, Any], said: str
) -> None:
    registered(rest, memory)
    before = memory.read_bytes()
    answer = infer(rest, body)
    assert answer.status_code == 400
    assert said in answer.json()["error"]
    assert memory.read_bytes() == before


def test_nothing_is_written_into_what_was_unregistered_meanwhile(
    gateway: GatewayThread, rest: httpx.Client, memory: Path, state: Path
) -> None:
    registered(rest, memory)
    router = gateway.running.router

    def unregistering(request: PredictRequest) -> PredictReply:
        # As another gateway of the machine does.
        Regions(state / "gateway" / "regions").unregister(PREDICT_ONLY.split("_")[1], "all")
        return reading(request)

    router.answer = unregistering
    try:
        answer = infer(rest, asked([{"name": "label", "parameters": place(16, LABELS_AT)}]))
    finally:
        router.answer = reading
    assert answer.status_code == 400
    assert "outputs.label: this key registered no" in answer.json()["error"]
    assert not any(memory.read_bytes()[LABELS_AT:])


def test_an_object_that_is_gone_or_shorter_costs_its_owner_an_error(rest: httpx.Client, memory: Path) -> None:
    registered(rest, memory)
    body = {
        "inputs": [{"name": "x", "shape": [2, 3], "datatype": "FP32", "data": ROWS.tolist()}],
        "outputs": [{"name": "label", "parameters": place(16, LABELS_AT)}],
    }
    assert infer(rest, body).status_code == 200
    memory.write_bytes(bytes(LABELS_AT))
    answer = infer(rest, body)
    assert answer.status_code == 400
    assert "ends before" in answer.json()["error"]
    memory.unlink()
    answer = infer(rest, body)
    assert answer.status_code == 400
    assert "cannot be opened" in answer.json()["error"]


def test_nothing_can_be_registered_of_a_gpu(gateway: GatewayThread, rest: httpx.Client) -> None:
    cuda = "/v2/cudasharedmemory"
    assert rest.post(f"{cuda}/region/a/register", json={}).status_code == 501
    assert rest.get(f"{cuda}/status").json() == []
    assert rest.get(f"{cuda}/region/a/status").status_code == 404
    for path in (f"{cuda}/unregister", f"{cuda}/region/a/unregister"):
        assert rest.post(path).status_code == 200
    with over_grpc(gateway) as stub:
        with pytest.raises(grpc.RpcError) as error:
            stub.CudaSharedMemoryRegister(
                oip.CudaSharedMemoryRegisterRequest(name="a"), metadata=KEY, timeout=PATIENCE_S
            )
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
        none = stub.CudaSharedMemoryStatus(
            oip.CudaSharedMemoryStatusRequest(), metadata=KEY, timeout=PATIENCE_S
        )
        assert not none.regions
        stub.CudaSharedMemoryUnregister(
            oip.CudaSharedMemoryUnregisterRequest(), metadata=KEY, timeout=PATIENCE_S
        )


def test_both_fronts_know_the_same_regions(gateway: GatewayThread, rest: httpx.Client, memory: Path) -> None:
    with over_grpc(gateway) as stub:
        stub.SystemSharedMemoryRegister(
            oip.SystemSharedMemoryRegisterRequest(name="all", key=memory.name, byte_size=SIZE),
            metadata=KEY,
            timeout=PATIENCE_S,
        )
        assert infer(rest, asked()).json()["outputs"][0]["data"] == LABELS
        found = stub.SystemSharedMemoryStatus(
            oip.SystemSharedMemoryStatusRequest(name="all"), metadata=KEY, timeout=PATIENCE_S
        )
        assert (found.regions["all"].key, found.regions["all"].byte_size) == (memory.name, SIZE)
        rest.post("/v2/systemsharedmemory/region/all/unregister")
        with pytest.raises(grpc.RpcError) as error:
            stub.SystemSharedMemoryStatus(
                oip.SystemSharedMemoryStatusRequest(name="all"), metadata=KEY, timeout=PATIENCE_S
            )
        assert error.value.code() is grpc.StatusCode.NOT_FOUND


def message(*, raw: bool, city: str = "all") -> oip.ModelInferRequest:
    """`mixed` by gRPC: its texts lie in shared memory, its numbers come with the message."""
    request = oip.ModelInferRequest(model_name="mixed")
    texts = request.inputs.add(name="city", datatype="BYTES", shape=[1, 1])
    texts.parameters["shared_memory_region"].string_param = city
    texts.parameters["shared_memory_byte_size"].uint64_param = 5
    number = request.inputs.add(name="age", datatype="INT64", shape=[1, 1])
    if raw:
        request.raw_input_contents.append((42).to_bytes(8, "little"))
    else:
        number.contents.int64_contents.append(42)
    score = request.outputs.add(name="score")
    score.parameters["shared_memory_region"].string_param = "all"
    score.parameters["shared_memory_byte_size"].int64_param = 8
    score.parameters["shared_memory_offset"].int64_param = 8
    return request


@pytest.mark.parametrize("raw", [True, False])
def test_by_grpc_beside_inputs_that_come_with_the_message(
    gateway: GatewayThread, rest: httpx.Client, memory: Path, raw: bool
) -> None:
    memory.write_bytes(b"\1\0\0\0a" + bytes(SIZE - 5))
    registered(rest, memory)
    with over_grpc(gateway) as stub:
        for _again in range(3):
            answer = stub.ModelInfer(message(raw=raw), metadata=KEY, timeout=PATIENCE_S)
            assert list(answer.raw_output_contents) == [b""]
            said = answer.outputs[0].parameters
            assert said["shared_memory_region"].string_param == "all"
            assert said["shared_memory_byte_size"].int64_param == 8
            assert said["shared_memory_offset"].int64_param == 8
            assert np.frombuffer(memory.read_bytes(), np.float64, 1, 8).tolist() == [21.0]
            memory.write_bytes(b"\1\0\0\0a" + bytes(SIZE - 5))
        with pytest.raises(grpc.RpcError) as error:
            stub.ModelInfer(message(raw=raw, city="none"), metadata=KEY, timeout=PATIENCE_S)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "inputs.city" in str(error.value.details())
    age, city = gateway.running.router.requests[-1].inputs
    assert age == Tensor(name="age", datatype=age.datatype, shape=[1, 1], data=(42).to_bytes(8, "little"))
    assert city.shared_memory.byte_size == 5


def test_raw_contents_are_counted_without_what_lies_elsewhere(
    gateway: GatewayThread, rest: httpx.Client, memory: Path
) -> None:
    registered(rest, memory)
    request = message(raw=True)
    request.raw_input_contents.append(b"")
    with over_grpc(gateway) as stub, pytest.raises(grpc.RpcError) as error:
        stub.ModelInfer(request, metadata=KEY, timeout=PATIENCE_S)
    assert "2 entries for 1 inputs" in str(error.value.details())


def test_where_it_is_off_everything_says_so(tmp_path: Path) -> None:
    with GatewayThread(tmp_path, hot=True) as gateway:
        headers = {"x-api-key": PREDICT_ONLY}
        with httpx.Client(base_url=gateway.running.base, headers=headers, timeout=PATIENCE_S) as client:
            answers = [
                client.get("/v2/systemsharedmemory/status"),
                client.post("/v2/systemsharedmemory/unregister"),
                client.post("/v2/systemsharedmemory/region/a/register", json={"key": "a", "byte_size": 1}),
                infer(client, asked()),
            ]
            for answer in answers:
                assert answer.status_code == 501
                assert "SHARED_MEMORY" in answer.json()["error"]
            assert "system_shared_memory" not in client.get("/v2").json()["extensions"]


#: Each is a script of its own: descriptors of the client and ours cannot live in one process.
_CLIENT = """
import sys
import numpy as np
import tritonclient.{transport} as triton
import tritonclient.utils.shared_memory as shm
address, key, memory = sys.argv[1:]
headers = {{"x-api-key": key}}
client = triton.InferenceServerClient(address)
client.unregister_system_shared_memory(headers=headers)
client.unregister_cuda_shared_memory(headers=headers)
handle = shm.create_shared_memory_region("data", memory, 64)
try:
    shm.set_shared_memory_region(handle, [np.array([[10, 2, 3], [20, 1, 1]], dtype=np.float32)])
    client.register_system_shared_memory("data", memory, 64, headers=headers)
    assert client.get_system_shared_memory_status(headers=headers)
    given = triton.InferInput("x", [2, 3], "FP32")
    given.set_shared_memory("data", 24)
    label, odds = triton.InferRequestedOutput("label"), triton.InferRequestedOutput("probabilities")
    label.set_shared_memory("data", 16, offset=24)
    for _ in range(3):
        answer = client.infer("cancer", [given], outputs=[label, odds], headers=headers)
        assert shm.get_contents_as_numpy(handle, np.int64, [2], 24).tolist() == [1, 0]
        assert answer.as_numpy("probabilities").tolist() == [[0.125, 0.875], [0.75, 0.25]]
    client.unregister_system_shared_memory("data", headers=headers)
    try:
        client.infer("cancer", [given], headers=headers)
    except triton.InferenceServerException as error:
        assert "registered no" in error.message(), error
    else:
        raise AssertionError("what was unregistered was read")
finally:
    shm.destroy_shared_memory_region(handle)
print("served")
"""


@pytest.mark.parametrize("transport", ["http", "grpc"])
def test_tritonclient(gateway: GatewayThread, transport: str) -> None:
    ports = gateway.running.gateway
    port = ports.http_port if transport == "http" else ports.grpc_port
    script, name = _CLIENT.format(transport=transport), f"headrace-test-{uuid4().hex}"
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, f"127.0.0.1:{port}", PREDICT_ONLY, name],
            capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
    finally:
        (DIRECTORY / name).unlink(missing_ok=True)
    assert done.stdout.strip() == "served", done.stderr
