"""What a guest gives up once it has served it, and who answers then."""

from __future__ import annotations

import asyncio
import threading
from contextlib import AsyncExitStack

import numpy as np
import onnx
import pytest
from headrace.v1.control_pb2 import Batching
from headrace.v1.tensor_pb2 import Code, DataType, Signature, TensorSpec
from onnx import TensorProto, helper

from services.worker import guest
from services.worker.backends.port import LeftToOthers
from services.worker.execution import Runner
from services.worker.loading import VersionLoader
from services.worker.model_host import ModelHost
from tests.fixtures.deployments import record
from tests.fixtures.guests import FAILED, READY, Rig, rig
from tests.fixtures.onnx_models import mlp
from tests.fixtures.waiting import PATIENCE_S, eventually, patience

__all__ = ["rig"]

ROW = np.zeros((1, 30), np.float32)


def as_often_as_told() -> tuple[bytes, Signature]:
    """y = x, after as many turns of a loop as the largest value of x says."""
    turn = helper.make_graph(
        [
            helper.make_node("Identity", ["more"], ["more_still"]),
            helper.make_node("Identity", ["state"], ["state_then"]),
        ],
        "turn",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("more", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("more_still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state_then", TensorProto.FLOAT, None),
        ],
    )
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["turns"], to=TensorProto.INT64),
        helper.make_node("Loop", ["turns", "", "x"], ["y"], body=turn),
    ]
    graph = helper.make_graph(
        nodes,
        "loop",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    x, y = (TensorSpec(name=name, datatype=DataType.DATA_TYPE_FP32, shape=[-1, 3]) for name in "xy")
    signature = Signature(inputs=[x], outputs=[y], batched=True)
    return model.SerializeToString(), signature


async def test_a_model_whose_time_depends_on_values_is_left(rig: Rig) -> None:
    """Zeros are quick; a value of ten million would hold up everybody for seconds."""
    await rig.deploy("loop", as_often_as_told())
    async with rig.guest() as host:
        assert "how long Loop takes" in (await rig.until(host, "loop", FAILED)).error


async def test_a_version_that_turns_out_to_be_slow_is_left_after_one_batch(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest, "_SLOW_S", 0.0)
    await rig.deploy("net", mlp())
    async with rig.worker() as worker, rig.guest() as host:
        await rig.until(host, "net", READY)
        await eventually(lambda: bool(list(worker.host.serving())))
        assert (await rig.ask("net", x=ROW)).code == Code.CODE_OK
        assert "everybody waited" in (await rig.until(host, "net", FAILED)).error
        before = [model.stats.rows for _, model in worker.host.serving()]
        assert (await rig.ask("net", x=ROW)).code == Code.CODE_OK
        assert [model.stats.rows for _, model in worker.host.serving()] == [rows + 1 for rows in before]


async def test_what_waits_in_a_version_that_is_left_is_answered_when_the_guest_ends(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two full batches show that it is slow; the fifth request waits a minute for more rows."""
    monkeypatch.setattr(guest, "_SLOW_S", 0.0)
    made = await rig.deploy("net", mlp())
    made.revision = 2
    made.batching.CopyFrom(Batching(max_rows=2, max_delay_us=60_000_000, max_queue_ms=120_000))
    await rig.bus.publish([record(made)])
    async with AsyncExitStack() as stack:
        host = await stack.enter_async_context(rig.guest(linger_s=600))
        await rig.until(host, "net", READY)
        asked = [asyncio.create_task(rig.ask("net", seconds=PATIENCE_S, x=ROW)) for _ in range(5)]
        await rig.until(host, "net", FAILED)
        await eventually(lambda: sum(task.done() for task in asked) == 4)
        await stack.aclose()
    replies = await asyncio.gather(*asked)
    assert [reply.code for reply in replies] == [Code.CODE_OK] * 5, replies


async def test_a_run_that_does_not_end_is_not_waited_for_and_its_request_goes_elsewhere(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, free = threading.Event(), threading.Event()
    execute = Runner.execute

    def stuck_at_first(self: Runner, *given: object) -> object:
        if not began.is_set():
            began.set()
            free.wait(PATIENCE_S)
        return execute(self, *given)  # type: ignore[arg-type]

    await rig.deploy("net", mlp())
    try:
        async with rig.worker() as worker:
            async with patience("the guest's end", 30), rig.guest(drain_s=0.4, inline_below_us=0) as host:
                await rig.until(host, "net", READY)
                await rig.until_outside("net")
                monkeypatch.setattr(Runner, "execute", stuck_at_first)
                asked = asyncio.create_task(rig.ask("net", seconds=PATIENCE_S, x=ROW))
                await eventually(began.is_set)
            assert (await asked).code == Code.CODE_OK
            assert [model.stats.rows for _, model in worker.host.serving()] == [1]
    finally:
        free.set()


async def test_what_was_evicted_and_is_found_slow_is_not_loaded_again_and_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    await rig.deploy("net", mlp())
    loads = []
    real = VersionLoader.load

    async def load(self: VersionLoader, *given: object) -> object:
        loads.append(given)
        if len(loads) > 1:
            raise LeftToOthers("slow this time")
        return await real(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(VersionLoader, "load", load)
    async with rig.guest() as host:
        await rig.until(host, "net", READY)
        host._evict(host._slots[0])
        await eventually(lambda: rig.router.dispatcher.endpoints.group(("net", "1")).members != ())
        reply = await rig.ask("net", x=ROW)
        assert reply.code == Code.CODE_UNAVAILABLE, reply.message
        await rig.until(host, "net", FAILED)
        assert len(loads) == 2


def counted(host: ModelHost) -> list[tuple[int, int]]:
    return [(one.totals.succeeded, one.totals.failed) for one in host.states()]


async def test_what_was_counted_of_a_version_stays_when_it_is_left(rig: Rig) -> None:
    await rig.deploy("net", mlp())
    async with rig.guest() as host:
        await rig.until(host, "net", READY)
        assert (await rig.ask("net", x=ROW)).code == Code.CODE_OK
        (slot,) = host._slots
        host._leave(slot, "a test says so")
        await eventually(lambda: slot.loaded is None)
        assert counted(host) == [(1, 0)]


async def test_whom_a_version_refuses_as_it_makes_room_is_counted(rig: Rig) -> None:
    made = await rig.deploy("net", mlp())
    made.revision = 2
    made.batching.CopyFrom(Batching(max_rows=2, max_delay_us=60_000_000, max_queue_ms=120_000))
    await rig.bus.publish([record(made)])
    async with rig.worker(), rig.guest() as host:
        await rig.until(host, "net", READY)
        await rig.until_outside("net")
        asked = asyncio.create_task(rig.ask("net", seconds=PATIENCE_S, x=ROW))
        await eventually(lambda: sum(model.queued_rows for _, model in host.serving()) == 1)
        (slot,) = host._slots
        host._evict(slot)
        assert counted(host) == [(0, 1)]
        asked.cancel()
        slot.returning = True
        slot.changed.set()
        await rig.until(host, "net", READY)
        assert counted(host) == [(0, 1)]


async def test_what_is_large_goes_to_the_worker_that_has_to_load_it_first(rig: Rig) -> None:
    await rig.deploy("net", mlp())
    async with rig.worker() as worker, rig.guest() as host:
        await rig.until(host, "net", READY)
        endpoints = rig.router.dispatcher.endpoints
        await eventually(lambda: any(not e.near and ("net", "1") in e.versions for e in endpoints.all()))
        await eventually(lambda: bool(list(worker.host.serving())))
        worker.host._evict(worker.host._slots[0])
        await eventually(lambda: not list(worker.host.serving()))
        assert (await rig.ask("net", x=np.zeros((1000, 30), np.float32))).code == Code.CODE_OK
        assert [model.stats.rows for _, model in host.serving()] == [0]
        assert [model.stats.rows for _, model in worker.host.serving()] == [1000]
