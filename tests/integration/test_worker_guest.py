"""A guest of the worker's on a router's event loop: real ONNX models, a bus in memory, no socket between
the two."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from uuid import uuid4

import numpy as np
import onnxruntime as ort
import pytest
from headrace.v1.control_pb2 import Batching, WorkerStatus
from headrace.v1.dataplane_pb2 import PredictRequest
from headrace.v1.tensor_pb2 import Code, DataType, SharedMemory, Tensor

from services.common.bus import Record
from services.common.clock import SystemClock
from services.common.ids import new_id
from services.common.shared_memory import DIRECTORY, inspect
from services.common.topics import DEPLOYMENTS, WORKERS
from services.gateway.pools import Pools
from services.registry.workers import Workers
from tests.fixtures.deployments import config, put_artifact, record, served
from tests.fixtures.guests import FAILED, READY, Rig, rig
from tests.fixtures.onnx_models import lookup, mlp, two_inputs
from tests.fixtures.waiting import PATIENCE_S, eventually

__all__ = ["rig"]


async def test_it_answers_as_the_model_does_and_each_request_is_logged_once(rig: Rig) -> None:
    data, _ = built = mlp(features=30)
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(3)
    made = await rig.deploy("net", built)
    async with rig.guest() as host:
        await rig.until(host, "net", READY)
        rows = [rng.standard_normal((1 + i % 4, 30)).astype(np.float32) for i in range(100)]
        replies = await asyncio.gather(*(rig.ask("net", x=x) for x in rows))
        for x, reply in zip(rows, replies, strict=True):
            assert (reply.code, reply.version) == (Code.CODE_OK, "1"), reply.message
            got = np.frombuffer(reply.outputs[0].data, np.float32).reshape(len(x), 2)
            np.testing.assert_allclose(got, session.run(["y"], {"x": x})[0], rtol=1e-4)
        ((_, model),) = host.serving()
        assert model.stats.inline_runs == model.stats.runs < len(rows)
        batches = await rig.logged(len(rows))
    identifiers = [
        batch.request_ids[16 * n : 16 * n + 16] for batch in batches for n in range(len(batch.rows))
    ]
    assert len(identifiers) == len(set(identifiers)) == len(rows)
    assert {(batch.model, batch.version, batch.artifact_digest) for batch in batches} == {
        ("net", "1", made.versions[0].artifact_digest)
    }
    assert {code for batch in batches for code in batch.codes} == {Code.CODE_OK}


async def test_what_fails_is_logged_once_as_well(rig: Rig) -> None:
    await rig.deploy("table", lookup(10))
    async with rig.guest() as host:
        await rig.until(host, "table", READY)
        replies = await asyncio.gather(*(rig.ask("table", index=np.array([i])) for i in (0, 99, 3)))
        assert [reply.code for reply in replies] == [0, Code.CODE_INVALID_ARGUMENT, 0]
        batches = await rig.logged(3)
    assert sorted(code for batch in batches for code in batch.codes) == [0, 0, Code.CODE_INVALID_ARGUMENT]


async def test_nobody_but_its_router_learns_of_it_but_what_it_counted(rig: Rig) -> None:
    gateway, registry = Pools(SystemClock()), Workers(SystemClock())
    made = await rig.deploy("net", mlp())
    digest = made.versions[0].artifact_digest
    async with rig.guest() as host, rig.bus.table(WORKERS, gateway.apply) as table:
        gateway.table = registry.table = table
        await rig.until(host, "net", READY)
        assert (await rig.ask("net", x=np.zeros((2, 30), np.float32))).code == Code.CODE_OK
        await eventually(lambda: [one.rows for one in gateway.totals("net", "1", digest)] == [2])
        assert rig.router.dispatcher.endpoints.records() == {}
        assert gateway.workers("") == gateway.workers("default") == 0
    for said in rig.bus.records(WORKERS.name):
        status = WorkerStatus.FromString(said.value or b"")
        assert (said.key, status.state) == (b"local:guest-0", WorkerStatus.STATE_GONE)
        registry.apply(said.key or b"", said.value)
    assert not registry.is_ready(made, "1")


async def test_its_metrics_are_the_routers_while_it_is_there(rig: Rig) -> None:
    await rig.deploy("net", mlp())
    success = 'nv_inference_request_success{model="net",version="1"} 1.0'
    assert "nv_inference" not in await rig.metrics()
    async with rig.guest() as host:
        await rig.until(host, "net", READY)
        await rig.ask("net", x=np.zeros((1, 30), np.float32))
        text = await rig.metrics()
        assert success in text
        names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
        assert len(names) == len(set(names)), "two parts export one name"
        assert "headrace_worker_log" not in text  # it is the router's
    text = await rig.metrics()
    assert "nv_inference" not in text
    assert "headrace_router_" in text
    async with rig.guest() as host:  # and again
        await rig.until(host, "net", READY)
        assert "nv_inference" in await rig.metrics()


async def test_what_is_slow_or_of_several_shapes_is_left(rig: Rig) -> None:
    await rig.deploy("net", mlp())
    await rig.deploy("pair", two_inputs())
    async with rig.guest(guest_row_us=1) as host:  # less than any run takes
        assert "a row takes" in (await rig.until(host, "net", FAILED)).error
    async with rig.guest() as host:
        await rig.until(host, "net", READY)
        assert "one shape" in (await rig.until(host, "pair", FAILED)).error


async def test_large_artifacts_are_left(rig: Rig) -> None:
    small = mlp(hidden=4)
    await rig.deploy("large", mlp(hidden=4096))
    await rig.deploy("small", small)
    async with rig.guest(guest_artifact_bytes=len(small[0])) as host:
        await rig.until(host, "small", READY)
        assert [one.model for one in host.states()] == ["small"]


async def test_artifacts_of_other_kinds_are_left(rig: Rig) -> None:
    data, signature = mlp()
    digest, _ = put_artifact(rig.store, {"model.onnx": data})
    await rig.bus.publish([record(config("words", 1, served("1", digest, signature, backend="embedding")))])
    await rig.deploy("net", (data, signature))
    async with rig.guest() as host:
        await rig.until(host, "net", READY)
        assert [one.model for one in host.states()] == ["net"]


async def test_versions_come_and_go_with_the_deployment(rig: Rig) -> None:
    x = np.zeros((1, 30), np.float32)
    async with rig.guest() as host:
        await rig.deploy("net", mlp())
        await rig.until(host, "net", READY)
        assert (await rig.ask("net", x=x)).code == Code.CODE_OK
        await rig.bus.publish([Record(DEPLOYMENTS.name, b"net", None)])
        await eventually(lambda: not host.states())
        await eventually(lambda: not rig.router.dispatcher.endpoints.group(("net", "1")).members)


async def test_worker_processes_take_what_is_large_and_what_it_leaves(rig: Rig) -> None:
    await rig.deploy("net", mlp())
    await rig.deploy("pair", two_inputs())
    ones = np.ones((1, 3), np.float32)
    async with rig.worker() as worker, rig.guest() as host:
        for model, there in (("net", 2), ("pair", 1)):
            group = rig.router.dispatcher.endpoints.group((model, "1"))
            await eventually(lambda group=group, there=there: len(group.members) == there)  # type: ignore[misc]
        replies = [
            await rig.ask("net", x=np.zeros((1, 30), np.float32)),
            await rig.ask("net", x=np.zeros((1000, 30), np.float32)),
            await rig.ask("pair", a=ones, b=ones),
        ]
        assert [reply.code for reply in replies] == [Code.CODE_OK] * 3
        assert replies[1].outputs[0].shape[0] == 1000
        inside = {key.model: model.stats.rows for key, model in host.serving()}
        outside = {key.model: model.stats.rows for key, model in worker.host.serving()}
        assert (inside, outside) == ({"net": 1}, {"net": 1000, "pair": 1})
        assert {reply.code for reply in replies} == {Code.CODE_OK}
        batches = await rig.logged(3)
    assert sum(len(batch.rows) for batch in batches) == 3


async def test_few_rows_may_be_large(rig: Rig) -> None:
    await rig.deploy("wide", mlp(features=50_000, hidden=2))
    async with rig.worker() as worker, rig.guest() as host:
        group = rig.router.dispatcher.endpoints.group(("wide", "1"))
        await eventually(lambda: len(group.members) == 2)
        for rows in (1, 5, 6):  # of 200 kB; no more than a megabyte is taken
            reply = await rig.ask("wide", x=np.ones((rows, 50_000), np.float32))
            assert (reply.code, list(reply.outputs[0].shape)) == (Code.CODE_OK, [rows, 2])
        inside = [model.stats.rows for _key, model in host.serving()]
        outside = [model.stats.rows for _key, model in worker.host.serving()]
    assert (inside, outside) == ([6], [6])


@pytest.mark.parametrize("allowed", [True, False])
async def test_alone_it_reads_shared_memory_where_that_is_allowed(rig: Rig, allowed: bool) -> None:
    await rig.deploy("net", mlp())
    path = DIRECTORY / f"headrace-test-{uuid4().hex}"
    path.write_bytes(bytes(120))
    try:
        region = SharedMemory(key=path.name, byte_size=120, identity=inspect(path.name, "x")[1])
        tensor = Tensor(name="x", datatype=DataType.DATA_TYPE_FP32, shape=[1, 30], shared_memory=region)
        asked = PredictRequest(model="net", request_id=new_id(), inputs=[tensor])
        async with rig.guest(shared_memory=allowed) as host:
            await rig.until(host, "net", READY)
            reply = await rig.calls.predict(asked, asyncio.get_running_loop().time() + 30)
            plain = await rig.ask("net", x=np.zeros((1, 30), np.float32))
    finally:
        path.unlink()
    assert plain.code == Code.CODE_OK
    if allowed:
        assert reply.outputs[0].data == plain.outputs[0].data
    else:
        assert reply.code != Code.CODE_OK


async def test_leaving_answers_what_is_queued_and_takes_nothing_more(rig: Rig) -> None:
    """Batches wait a minute for more rows; nobody waits so long for one that leaves."""
    x = np.zeros((1, 30), np.float32)
    made = await rig.deploy("net", mlp())
    made.revision = 2
    made.batching.CopyFrom(Batching(max_rows=64, max_delay_us=60_000_000, max_queue_ms=120_000))
    await rig.bus.publish([record(made)])
    async with AsyncExitStack() as stack:
        host = await stack.enter_async_context(rig.guest())
        await rig.until(host, "net", READY)
        waiting = [asyncio.create_task(rig.ask("net", seconds=PATIENCE_S, x=x)) for _ in range(5)]
        await eventually(lambda: sum(model.queued_rows for _, model in host.serving()) == 5)
        assert not any(task.done() for task in waiting)
        began = asyncio.get_running_loop().time()
        await stack.aclose()
        assert asyncio.get_running_loop().time() - began < 30
    replies = await asyncio.gather(*waiting)
    assert [reply.code for reply in replies] == [Code.CODE_OK] * 5
    assert sum(len(batch.rows) for batch in await rig.logged(5)) == 5
    # The router heard of it: nobody is left to ask.
    assert [endpoint.leaving for endpoint in rig.router.dispatcher.endpoints.all()] == [True]
    assert rig.router.dispatcher.endpoints.group(("net", "1")).members == ()
    assert (await rig.ask("net", seconds=5.0, x=x)).code == Code.CODE_UNAVAILABLE


async def test_a_full_log_refuses_before_anything_runs(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    await rig.deploy("net", mlp())
    async with rig.guest() as host:
        await rig.until(host, "net", READY)
        monkeypatch.setattr(type(rig.router.log), "usable", property(lambda _: False))
        reply = await rig.ask("net", x=np.zeros((1, 30), np.float32))
        assert reply.code == Code.CODE_RESOURCE_EXHAUSTED
        ((_, model),) = host.serving()
        assert model.stats.runs == 0


async def test_what_ended_the_process_before_is_left(rig: Rig) -> None:
    made = await rig.deploy("net", mlp())
    mark = rig.settings().directory / "loading"
    mark.parent.mkdir(parents=True)
    mark.write_text(made.versions[0].artifact_digest)
    async with rig.guest() as host:
        assert "a process ended" in (await rig.until(host, "net", FAILED)).error


async def test_the_mark_is_in_a_directory_that_is_there(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    write = Path.write_text

    def writing(path: Path, *given: str) -> int:
        done = write(path, *given)
        written.append(path)
        return done

    monkeypatch.setattr(Path, "write_text", writing)
    await rig.deploy("net", mlp())
    async with rig.guest() as host:
        await rig.until(host, "net", READY)
    assert rig.settings().directory / "loading" in written
