"""The whole worker in this process: real ONNX models, real sockets, a bus in memory."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import onnxruntime as ort
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from headrace.v1.control_pb2 import LoadedVersion, WorkerStatus
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest
from headrace.v1.dataplane_pb2_grpc import DataPlaneStub
from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import Code, DataType, Signature, Tensor
from numpy.typing import NDArray

from services.common.bus import MemoryBus, Record
from services.common.clock import SystemClock
from services.common.frames import FrameCalls, Limits
from services.common.grpc_auth import metadata
from services.common.ids import new_id
from services.common.topics import DEPLOYMENTS, PREDICTIONS, WORKERS
from services.worker import loading
from services.worker.app import Worker, worker_app
from services.worker.backends.onnx import OnnxBackend
from services.worker.backends.port import Padding
from services.worker.settings import Settings
from tests.fixtures.deployments import blob_file, config, put_artifact, record, served
from tests.fixtures.metrics import metrics_at
from tests.fixtures.onnx_models import (
    heavy,
    lookup,
    mlp,
    not_row_wise,
    text_lengths,
    two_inputs,
    with_metadata,
)
from tests.fixtures.waiting import PATIENCE_S, eventually

TOKEN = "a-token-for-tests-only"


class Rig:
    """A bus, a store, and the workers started on them."""

    def __init__(self, directory: Path) -> None:
        self.bus = MemoryBus()
        self.store = directory / "store"
        self.state = directory / "state"

    def settings(self, **changes: object) -> Settings:
        given = {
            "kafka_bootstrap_servers": "unused:1",
            "internal_token": TOKEN,
            "artifact_store_url": f"file://{self.store}",
            "state_dir": self.state,
            "frames_port": 0,
            "grpc_port": 0,
            "ops_port": 0,
            "linger_s": 0.05,
            "heartbeat_s": 0.2,
            "drain_s": 10.0,
        }
        return Settings.model_validate(given | changes)

    @asynccontextmanager
    async def worker(self, **changes: object) -> AsyncIterator[Worker]:
        async with worker_app(self.settings(**changes), SystemClock(), self.bus) as worker:
            yield worker

    @asynccontextmanager
    async def calls(self, worker: Worker) -> AsyncIterator[FrameCalls]:
        calls = FrameCalls(
            f"127.0.0.1:{worker.frames_port}",
            credential=TOKEN,
            role="router",
            instance="router-test",
            limits=Limits(),
        )
        calls.start()
        try:
            await calls.wait_connected(PATIENCE_S)
            yield calls
        finally:
            await calls.close()

    def statuses(self) -> list[WorkerStatus]:
        return [WorkerStatus.FromString(r.value or b"") for r in self.bus.records(WORKERS.name)]

    async def until_state(self, model: str, state: LoadedVersion.State, version: str = "1") -> LoadedVersion:
        def found() -> list[LoadedVersion]:
            last = [loaded for status in self.statuses()[-1:] for loaded in status.versions]
            return [v for v in last if (v.model, v.version, v.state) == (model, version, state)]

        await eventually(lambda: bool(found()))
        return found()[0]

    def logged(self) -> list[PredictionBatch]:
        return [PredictionBatch.FromString(r.value or b"") for r in self.bus.records(PREDICTIONS.name)]

    async def logged_requests(self, count: int) -> list[PredictionBatch]:
        await eventually(lambda: sum(len(batch.rows) for batch in self.logged()) >= count)
        return self.logged()

    async def deploy(self, model: str, built: tuple[bytes, object], **options: int) -> str:
        data, signature = built
        digest, _ = put_artifact(self.store, {"model.onnx": data})
        deployment = config(model, 1, served("1", digest, signature), **options)  # type: ignore[arg-type]  # a pair from onnx_models
        await self.bus.publish([record(deployment)])
        return digest


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def request(model: str, version: str = "1", **inputs: NDArray[np.generic]) -> PredictRequest:
    datatypes = {"f": DataType.DATA_TYPE_FP32, "i": DataType.DATA_TYPE_INT64}
    return PredictRequest(
        model=model,
        version=version,
        request_id=new_id(),
        variant=version,
        inputs=[
            Tensor(name=name, datatype=datatypes[array.dtype.kind], shape=array.shape, data=array.tobytes())
            for name, array in inputs.items()
        ],
    )


async def ask(calls: FrameCalls, wanted: PredictRequest, seconds: float = 30.0) -> PredictReply:
    return await calls.predict(wanted, asyncio.get_running_loop().time() + seconds)


async def test_answers_are_those_of_the_model_and_are_logged_before_they_leave(rig: Rig) -> None:
    data, _ = built = mlp(features=30)
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(3)
    digest = await rig.deploy("net", built)
    async with rig.worker() as worker, rig.calls(worker) as calls:
        await rig.until_state("net", LoadedVersion.STATE_READY)
        rows = [rng.standard_normal((1 + i % 4, 30)).astype(np.float32) for i in range(200)]
        asked = [request("net", x=x) for x in rows]
        replies = await asyncio.gather(*(ask(calls, r) for r in asked))
        for x, reply in zip(rows, replies, strict=True):
            assert reply.code == Code.CODE_OK, reply.message
            (output,) = reply.outputs
            assert list(output.shape) == [len(x), 2]
            got = np.frombuffer(output.data, np.float32).reshape(len(x), 2)
            np.testing.assert_allclose(got, session.run(["y"], {"x": x})[0], rtol=1e-4)
        batches = await rig.logged_requests(len(asked))
    assert sum(len(batch.rows) for batch in batches) == len(asked)
    assert {batch.artifact_digest for batch in batches} == {digest}
    assert len(batches) < len(asked) / 4, "concurrent requests were not batched"
    logged: dict[bytes, NDArray[np.float32]] = {}
    for batch in batches:
        x = np.frombuffer(batch.inputs[0].data, np.float32).reshape(-1, 30)
        assert sum(batch.rows) == len(x) == len(np.frombuffer(batch.outputs[0].data, np.float32)) // 2
        first = 0
        for number, count in enumerate(batch.rows):
            identifier = batch.request_ids[16 * number : 16 * number + 16]
            logged[identifier] = x[first : first + count]
            first += count
    for wanted, x in zip(asked, rows, strict=True):
        np.testing.assert_array_equal(logged[wanted.request_id], x)


async def test_a_bad_row_fails_alone(rig: Rig) -> None:
    await rig.deploy("table", lookup(10))
    async with rig.worker() as worker, rig.calls(worker) as calls:
        await rig.until_state("table", LoadedVersion.STATE_READY)
        wanted = [request("table", index=np.array([i])) for i in [0, 1, 99, 3, 4]]
        replies = await asyncio.gather(*(ask(calls, r) for r in wanted))
        batches = await rig.logged_requests(5)
    assert [reply.code for reply in replies] == [0, 0, Code.CODE_INVALID_ARGUMENT, 0, 0]
    assert "indices element out of data bounds" in replies[2].message
    values = [np.frombuffer(r.outputs[0].data, np.float32)[0] for r in replies if not r.code]
    assert values == [0, 100, 300, 400]
    codes = [code for batch in batches for code in batch.codes]
    assert sorted(codes) == [0, 0, 0, 0, Code.CODE_INVALID_ARGUMENT]
    # Only the rows of good requests are in the log's tensors.
    assert sum(len(batch.inputs[0].data) for batch in batches if batch.inputs) == 4 * 8


async def test_what_cannot_be_served_is_refused_with_the_field(rig: Rig) -> None:
    await rig.deploy("net", mlp(features=4))
    async with rig.worker() as worker, rig.calls(worker) as calls:
        await rig.until_state("net", LoadedVersion.STATE_READY)
        good = np.zeros((1, 4), np.float32)
        short = request("net", x=good)
        short.inputs[0].data = short.inputs[0].data[:-1]
        outputs = request("net", x=good)
        outputs.outputs.append("z")
        cases = [
            (request("net", y=good), Code.CODE_INVALID_ARGUMENT, "inputs.y"),
            (request("net"), Code.CODE_INVALID_ARGUMENT, "inputs.x"),
            (request("net", x=np.zeros((1, 5), np.float32)), Code.CODE_INVALID_ARGUMENT, "inputs.x"),
            (request("net", x=np.zeros((0, 4), np.float32)), Code.CODE_INVALID_ARGUMENT, "inputs.x"),
            (request("net", x=np.zeros((1, 4), np.int64)), Code.CODE_INVALID_ARGUMENT, "inputs.x"),
            (short, Code.CODE_INVALID_ARGUMENT, "inputs.x"),
            (outputs, Code.CODE_INVALID_ARGUMENT, "outputs.z"),
            (request("net", version="2", x=good), Code.CODE_UNAVAILABLE, "version"),
            (request("other", x=good), Code.CODE_UNAVAILABLE, "version"),
        ]
        for wanted, code, field in cases:
            reply = await ask(calls, wanted)
            assert (reply.code, reply.field) == (code, field), reply
        assert (await ask(calls, request("net", x=good))).code == Code.CODE_OK
    assert not [batch for batch in rig.logged() if any(batch.codes)]


async def test_versions_come_and_go_with_the_deployment(rig: Rig) -> None:
    first, signature = mlp(seed=1)
    second, _ = mlp(seed=2)
    one, _ = put_artifact(rig.store, {"model.onnx": first})
    two, _ = put_artifact(rig.store, {"model.onnx": second})
    x = np.ones((1, 30), np.float32)
    async with rig.worker() as worker, rig.calls(worker) as calls:
        await rig.bus.publish([record(config("net", 1, served("1", one, signature)))])
        await rig.until_state("net", LoadedVersion.STATE_READY)
        both = config("net", 2, served("1", one, signature), served("2", two, signature, weight=0))
        await rig.bus.publish([record(both)])
        await rig.until_state("net", LoadedVersion.STATE_READY, "2")
        answers = [await ask(calls, request("net", version=v, x=x)) for v in "12"]
        assert answers[0].outputs[0].data != answers[1].outputs[0].data
        # An older revision, late on its way, changes nothing.
        await rig.bus.publish([record(config("net", 1, served("1", one, signature)))])
        await asyncio.sleep(0.1)
        assert (await ask(calls, request("net", version="2", x=x))).code == Code.CODE_OK
        await rig.bus.publish([record(config("net", 3, served("2", two, signature)))])
        await eventually(lambda: worker.host.find("net", "1") is None)
        assert (await ask(calls, request("net", x=x))).code == Code.CODE_UNAVAILABLE
        assert (await ask(calls, request("net", version="2", x=x))).code == Code.CODE_OK
        await rig.bus.publish([Record(DEPLOYMENTS.name, b"net", None)])
        await eventually(lambda: not worker.host.states())
        assert (await ask(calls, request("net", version="2", x=x))).code == Code.CODE_UNAVAILABLE


async def test_a_version_that_cannot_be_loaded_says_why_and_hurts_no_other(rig: Rig) -> None:
    data, signature = mlp()
    await rig.deploy("good", (data, signature))
    corrupt, files = put_artifact(rig.store, {"model.onnx": mlp(seed=11)[0]})
    blob = blob_file(rig.store, files["model.onnx"])
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    absent, files = put_artifact(rig.store, {"model.onnx": mlp(seed=12)[0]})
    blob_file(rig.store, files["model.onnx"]).unlink()
    nonsense, _ = put_artifact(rig.store, {"model.onnx": b"not a model"})
    mean, mean_signature = not_row_wise()
    whole, _ = put_artifact(rig.store, {"model.onnx": mean})
    escaping, _ = put_artifact(rig.store, {"../model.onnx": data})
    other, _ = put_artifact(rig.store, {"model.onnx": data})
    cases = [
        ("corrupt", served("1", corrupt, signature), "corrupt: model.onnx"),
        ("absent", served("1", absent, signature), "has no model.onnx"),
        ("nonsense", served("1", nonsense, signature), "not a model that ONNX Runtime can load"),
        ("mean", served("1", whole, mean_signature), "output y has shape [1, 4] for 32 rows"),
        ("escaping", served("1", escaping, signature), "outside of it"),
        ("backend", served("1", other, signature, backend="cobol"), "no backend cobol"),
        ("names", served("1", other, mean_signature), "Got invalid dimensions for input: x"),
    ]
    async with rig.worker() as worker, rig.calls(worker) as calls:
        await rig.bus.publish([record(config(model, 1, version)) for model, version, _ in cases])
        for model, _, reason in cases:
            failed = await rig.until_state(model, LoadedVersion.STATE_FAILED)
            assert reason in failed.error
            assert str(rig.store.parent) not in failed.error
        await rig.until_state("good", LoadedVersion.STATE_READY)
        answer = await ask(calls, request("good", x=np.zeros((1, 30), np.float32)))
        assert answer.code == Code.CODE_OK
        assert worker.health.ready, worker.health.reasons()
        assert rig.statuses()[-1].state == WorkerStatus.STATE_READY
        # Repaired in the store, it comes up by itself.
        blob.write_bytes(mlp(seed=11)[0])
        await rig.until_state("corrupt", LoadedVersion.STATE_READY)


async def test_draining_under_load_loses_nothing(rig: Rig) -> None:
    await rig.deploy("heavy", heavy(), max_rows=8)
    async with AsyncExitStack() as stack:
        running = AsyncExitStack()
        worker = await running.enter_async_context(rig.worker(inline_below_us=0))
        calls = await stack.enter_async_context(rig.calls(worker))
        await rig.until_state("heavy", LoadedVersion.STATE_READY)
        x = np.ones((1, 64), np.float32)
        asked = [asyncio.create_task(ask(calls, request("heavy", x=x), 30)) for _ in range(300)]
        await eventually(lambda: any(task.done() for task in asked))
        assert not all(task.done() for task in asked)
        drained = asyncio.create_task(running.aclose())
        replies = await asyncio.gather(*asked)
        await drained
    assert {reply.code for reply in replies} == {Code.CODE_OK}
    assert sum(len(batch.rows) for batch in rig.logged()) == 300
    states = [status.state for status in rig.statuses()]
    assert WorkerStatus.STATE_DRAINING in states
    assert states[-1] == WorkerStatus.STATE_GONE


async def test_the_broker_away_costs_nothing_until_the_log_is_full(rig: Rig) -> None:
    await rig.deploy("net", mlp())
    async with rig.worker(log_max_bytes=1 << 20) as worker, rig.calls(worker) as calls:
        await rig.until_state("net", LoadedVersion.STATE_READY)
        rig.bus.away = True
        x = np.zeros((200, 30), np.float32)
        codes = [(await ask(calls, request("net", x=x))).code for _ in range(80)]
        assert codes[0] == Code.CODE_OK
        assert codes[-1] == Code.CODE_RESOURCE_EXHAUSTED
        assert codes == sorted(codes)
        rig.bus.away = False
        await eventually(lambda: not worker.log.pending_records)
        assert (await ask(calls, request("net", x=x))).code == Code.CODE_OK
        await rig.logged_requests(codes.count(Code.CODE_OK) + 1)
    assert sum(len(batch.rows) for batch in rig.logged()) == codes.count(Code.CODE_OK) + 1


async def test_cancelled_and_abandoned_requests_harm_nobody(rig: Rig) -> None:
    await rig.deploy("heavy", heavy(), max_rows=4)
    async with rig.worker(inline_below_us=0) as worker:
        await rig.until_state("heavy", LoadedVersion.STATE_READY)
        x = np.ones((1, 64), np.float32)
        async with rig.calls(worker) as calls, rig.calls(worker) as leaving:
            tasks = [asyncio.create_task(ask(calls, request("heavy", x=x), 30)) for _ in range(60)]
            lost = [asyncio.create_task(ask(leaving, request("heavy", x=x), 30)) for _ in range(60)]
            await asyncio.sleep(0.01)
            for task in tasks[::3]:
                task.cancel()
            await leaving.close()
            replies = await asyncio.gather(*tasks, return_exceptions=True)
            kept = [reply for number, reply in enumerate(replies) if number % 3]
            assert all(isinstance(reply, PredictReply) and not reply.code for reply in kept)
            gone = await asyncio.gather(*lost)
            assert {reply.code for reply in gone} <= {Code.CODE_OK, Code.CODE_UNAVAILABLE}
            await eventually(lambda: all(model.idle for _, model in worker.host.serving()))


async def test_several_inputs_of_varying_width_and_chosen_outputs(rig: Rig) -> None:
    await rig.deploy("pair", two_inputs())
    async with rig.worker() as worker, rig.calls(worker) as calls:
        await rig.until_state("pair", LoadedVersion.STATE_READY)
        wanted = []
        for number in range(40):
            a = np.full((1 + number % 3, 1 + number % 5), number, np.float32)
            asked = request("pair", b=a * 10, a=a)  # in another order than the signature's
            if number % 2:
                asked.outputs.append("sum")
            wanted.append((a, asked))
        replies = await asyncio.gather(*(ask(calls, asked) for _, asked in wanted))
        for (a, asked), reply in zip(wanted, replies, strict=True):
            assert reply.code == Code.CODE_OK, reply.message
            assert [o.name for o in reply.outputs] == (list(asked.outputs) or ["sum", "doubled"])
            got = np.frombuffer(reply.outputs[0].data, np.float32).reshape(reply.outputs[0].shape)
            np.testing.assert_array_equal(got, a * 11)
        uneven = request("pair", a=np.ones((1, 2), np.float32), b=np.ones((2, 2), np.float32))
        reply = await ask(calls, uneven)
        assert (reply.code, reply.field) == (Code.CODE_INVALID_ARGUMENT, "inputs.b")


async def test_rows_of_different_lengths_share_runs_where_the_model_says_how(rig: Rig) -> None:
    pads = {"headrace.pad.a": "0", "headrace.pad.b": "-1"}
    await rig.deploy("pair", with_metadata(two_inputs(), **pads))
    async with rig.worker() as worker, rig.calls(worker) as calls:
        await rig.until_state("pair", LoadedVersion.STATE_READY)
        arrays = [np.full((1 + n % 3, 1 + n % 7), n, np.float32) for n in range(60)]
        asked = [request("pair", a=a, b=a * 10) for a in arrays]
        replies = await asyncio.gather(*(ask(calls, one) for one in asked))
        for a, reply in zip(arrays, replies, strict=True):
            assert reply.code == Code.CODE_OK, reply.message
            for output, factor in zip(reply.outputs, (11, 2), strict=True):
                assert tuple(output.shape) == a.shape
                np.testing.assert_array_equal(
                    np.frombuffer(output.data, np.float32).reshape(a.shape), a * factor
                )
        ((_, model),) = worker.host.serving()
        assert model.stats.runs < 7 < len(asked)
        assert model.stats.reruns == 0
        uneven = request("pair", a=np.ones((1, 2), np.float32), b=np.ones((1, 3), np.float32))
        reply = await ask(calls, uneven)
        assert (reply.code, reply.field) == (Code.CODE_INVALID_ARGUMENT, "inputs.b")
        records = await rig.logged_requests(len(asked))
    logged: dict[bytes, NDArray[np.float32]] = {}
    for batch in records:
        values = np.frombuffer(batch.inputs[0].data, np.float32).reshape(batch.inputs[0].shape)
        first = 0
        for number, rows in enumerate(batch.rows):
            logged[batch.request_ids[16 * number : 16 * number + 16]] = values[first : first + rows]
            first += rows
    for wanted, a in zip(asked, arrays, strict=True):
        np.testing.assert_array_equal(logged[wanted.request_id], a)


async def test_text_travels_through_a_model(rig: Rig) -> None:
    await rig.deploy("echo", text_lengths())
    async with rig.worker() as worker, rig.calls(worker) as calls:
        await rig.until_state("echo", LoadedVersion.STATE_READY)

        def words(*texts: bytes) -> PredictRequest:
            data = b"".join(len(text).to_bytes(4, "little") + text for text in texts)
            tensor = Tensor(name="word", datatype=DataType.DATA_TYPE_BYTES, shape=[len(texts)], data=data)
            return PredictRequest(model="echo", version="1", request_id=new_id(), inputs=[tensor])

        asked = [words(b"a", "größer".encode()), words(b"\xff\xfe"), words(b"")]
        replies = await asyncio.gather(*(ask(calls, r) for r in asked))
        assert [reply.code for reply in replies] == [0, Code.CODE_INVALID_ARGUMENT, 0]
        assert replies[0].outputs[0].data == asked[0].inputs[0].data
        assert replies[1].field == "inputs.word"
        assert replies[2].outputs[0].data == b"\0\0\0\0"


async def test_one_request_at_a_time_over_grpc(rig: Rig) -> None:
    await rig.deploy("net", mlp())
    async with (
        rig.worker() as worker,
        grpc.aio.insecure_channel(f"127.0.0.1:{worker.grpc_port}") as channel,
    ):
        await rig.until_state("net", LoadedVersion.STATE_READY)
        health = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub = DataPlaneStub(channel)  # type: ignore[no-untyped-call]  # generated
        asked = request("net", x=np.zeros((2, 30), np.float32))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Predict(asked, timeout=PATIENCE_S)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        reply = await stub.Predict(asked, metadata=metadata(TOKEN), timeout=PATIENCE_S)
        assert list(reply.outputs[0].shape) == [2, 2]
        reply = await stub.Predict(request("none"), metadata=metadata(TOKEN), timeout=PATIENCE_S)
        assert reply.code == Code.CODE_UNAVAILABLE


async def test_operators_see_health_and_metrics(rig: Rig) -> None:
    await rig.deploy("net", mlp())
    async with rig.worker() as worker, rig.calls(worker) as calls:
        await rig.until_state("net", LoadedVersion.STATE_READY)
        for _ in range(3):
            await ask(calls, request("net", x=np.zeros((2, 30), np.float32)))
        await ask(calls, request("net", version="9"))

        def fetch(path: str) -> str:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{worker.ops_port}{path}", timeout=PATIENCE_S
            ) as answer:
                return bytes(answer.read()).decode()

        assert json.loads(await asyncio.to_thread(fetch, "/health/ready"))["ready"] is True
        text = await asyncio.to_thread(fetch, "/metrics")
        # The heartbeats, from which gateways answer, say the same.
        await eventually(lambda: [v.totals.ran for v in rig.statuses()[-1].versions] == [3])
        totals = rig.statuses()[-1].versions[0].totals
    assert (totals.succeeded, totals.rows, totals.batches, totals.failed) == (3, 6, 3, 0)
    assert abs(totals.last_ran_at_us / 1e6 - time.time()) < PATIENCE_S
    assert 0 < totals.compute_infer_ns < totals.request_ns < PATIENCE_S * 1e9
    labels = '{model="net",version="1"}'
    assert f"nv_inference_request_success{labels} 3.0" in text
    assert f"nv_inference_count{labels} 6.0" in text
    assert f"nv_inference_exec_count{labels} 3.0" in text
    assert 'headrace_worker_queued_rows_by_priority{model="net",priority="low",version="1"} 0.0' in text
    assert 'headrace_worker_batches_total{model="net",reason="turn",version="1"} 3.0' in text
    assert 'headrace_worker_refused_total{code="CODE_UNAVAILABLE"} 1.0' in text
    assert 'headrace_worker_batch_rows_bucket{le="2",model="net",version="1"} 3.0' in text


class Memory:
    """As if the process took 1,000 bytes, and each open model 100 more."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.models = 0
        opened, closed = OnnxBackend.__init__, OnnxBackend.close

        def init(
            backend: OnnxBackend, session: ort.InferenceSession, signature: Signature, padding: Padding | None
        ) -> None:
            self.models += 1
            opened(backend, session, signature, padding)

        def close(backend: OnnxBackend) -> None:
            self.models -= 1
            closed(backend)

        patch.setattr(OnnxBackend, "__init__", init)
        patch.setattr(OnnxBackend, "close", close)
        patch.setattr(loading, "resident_bytes", lambda: 1000 + 100 * self.models)


async def test_idle_versions_make_room_and_come_back_when_asked_for(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for one of several: whoever is asked for is loaded, the other leaves once it is idle."""
    memory = Memory(monkeypatch)
    built = {name: mlp(seed=seed) for seed, name in enumerate("abcd")}
    digests = {name: put_artifact(rig.store, {"model.onnx": data})[0] for name, (data, _) in built.items()}
    x = np.ones((1, 30), np.float32)

    async def deploy(name: str, weight: int = 10_000, nbytes: int = 100) -> None:
        version = served("1", digests[name], built[name][1], weight=weight)
        version.artifact_bytes = nbytes
        await rig.bus.publish([record(config(name, 1, version))])

    async with rig.worker(memory_limit_bytes=1150) as worker, rig.calls(worker) as calls:
        await deploy("a")
        await rig.until_state("a", LoadedVersion.STATE_READY)
        await deploy("b")
        await deploy("c", weight=0)
        for name in "bc":
            told = await rig.until_state(name, LoadedVersion.STATE_EVICTED)
            assert "no memory" in told.error
        # Nobody asked for them, so the version with traffic stays.
        await rig.until_state("a", LoadedVersion.STATE_READY)
        assert worker.health.ready, worker.health.reasons()
        reply = await ask(calls, request("b", x=x))
        assert reply.code == Code.CODE_OK, reply.message
        told = await rig.until_state("a", LoadedVersion.STATE_EVICTED)
        assert (told.error, told.memory_bytes) == ("", 0)
        await rig.until_state("b", LoadedVersion.STATE_READY)
        assert worker.health.ready, worker.health.reasons()
        assert memory.models == 1
        first = reply.outputs[0].data
        replies = await asyncio.gather(*(ask(calls, request("a", x=x)) for _ in range(20)))
        assert {reply.code for reply in replies} == {Code.CODE_OK}
        assert (await ask(calls, request("b", x=x))).outputs[0].data == first
        # Shorter than any load takes: told at its deadline, and the version comes up all the same.
        late = await ask(calls, request("c", x=x), 0.001)
        assert late.code == Code.CODE_DEADLINE_EXCEEDED
        assert (await ask(calls, request("c", x=x))).code == Code.CODE_OK
        assert (worker.host.evictions["b", "1"], memory.models) == (2, 1)
        assert [state.totals.succeeded for state in worker.host.states() if state.model == "b"] == [2]
        # What would not fit even alone evicts nobody.
        await deploy("d", nbytes=200)
        await rig.until_state("d", LoadedVersion.STATE_EVICTED)
        refused = await ask(calls, request("d", x=x))
        assert (refused.code, refused.retry_after_ms) == (Code.CODE_UNAVAILABLE, 1000)
        assert "no memory" in refused.message
        said = await metrics_at(worker.ops_port)
        assert 'nv_inference_request_failure{model="d",reason="CODE_UNAVAILABLE",version="1"} 1.0' in said
        assert [state.totals.failed for state in worker.host.states() if state.model == "d"] == [1]
        await rig.until_state("c", LoadedVersion.STATE_READY)
        await rig.bus.publish([Record(DEPLOYMENTS.name, b"a", None)])
        await eventually(lambda: {state.model for state in worker.host.states()} == {"b", "c", "d"})
        assert (await ask(calls, request("a", x=x))).code == Code.CODE_UNAVAILABLE
    assert memory.models == 0


async def test_a_worker_started_without_the_broker_serves_what_it_served(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    data, signature = mlp()
    digest, _ = put_artifact(rig.store, {"model.onnx": data})
    await rig.bus.publish([record(config("net", 1, served("1", digest, signature)))])
    async with rig.worker():
        await rig.until_state("net", LoadedVersion.STATE_READY)
    rig.bus.away = True
    async with rig.worker() as again, rig.calls(again) as calls:
        await eventually(lambda: again.health.ready)
        answered: asyncio.Future[PredictReply] = asyncio.get_running_loop().create_future()
        x = np.zeros((1, 30), np.float32)
        tensor = Tensor(name="x", datatype=DataType.DATA_TYPE_FP32, shape=[1, 30], data=x.tobytes())
        request = PredictRequest(model="net", version="1", inputs=[tensor], request_id=new_id())
        calls.submit(request, asyncio.get_running_loop().time() + 30, answered.set_result)
        assert (await answered).code == Code.CODE_OK
        rig.bus.away = False
        await rig.bus.publish([record(config("net", 2))])
        await eventually(lambda: again.host.find("net", "1") is None)
