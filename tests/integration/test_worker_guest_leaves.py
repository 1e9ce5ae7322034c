"""What a guest gives up once it has served it, and who answers then."""

from __future__ import annotations

from contextlib import AsyncExitStack

import numpy as np
import onnx
import pytest
from headrace.v1.tensor_pb2 import Code, DataType, Signature, TensorSpec
from onnx import TensorProto, helper

from services.common.clock import SystemClock
from services.worker import guest
from services.worker.app import worker_app
from services.worker.backends.port import LeftToOthers
from services.worker.loading import VersionLoader
from tests.fixtures.onnx_models import mlp
from tests.fixtures.waiting import eventually
from tests.integration.test_worker_guest import FAILED, READY, Rig, rig

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
    async with AsyncExitStack() as stack:
        worker = await stack.enter_async_context(
            worker_app(rig.settings(worker_id="worker-0"), SystemClock(), rig.bus)
        )
        host = await stack.enter_async_context(rig.guest())
        await rig.until(host, "net", READY)
        await eventually(lambda: bool(list(worker.host.serving())))
        assert (await rig.ask("net", x=ROW)).code == Code.CODE_OK
        assert "everybody waited" in (await rig.until(host, "net", FAILED)).error
        before = [model.stats.rows for _, model in worker.host.serving()]
        assert (await rig.ask("net", x=ROW)).code == Code.CODE_OK
        assert [model.stats.rows for _, model in worker.host.serving()] == [rows + 1 for rows in before]


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


async def test_what_is_large_goes_to_the_worker_that_has_to_load_it_first(rig: Rig) -> None:
    await rig.deploy("net", mlp())
    async with AsyncExitStack() as stack:
        worker = await stack.enter_async_context(
            worker_app(rig.settings(worker_id="worker-0"), SystemClock(), rig.bus)
        )
        host = await stack.enter_async_context(rig.guest())
        await rig.until(host, "net", READY)
        endpoints = rig.router.dispatcher.endpoints
        await eventually(lambda: any(not e.near and ("net", "1") in e.versions for e in endpoints.all()))
        await eventually(lambda: bool(list(worker.host.serving())))
        worker.host._evict(worker.host._slots[0])
        await eventually(lambda: not list(worker.host.serving()))
        assert (await rig.ask("net", x=np.zeros((1000, 30), np.float32))).code == Code.CODE_OK
        assert [model.stats.rows for _, model in host.serving()] == [0]
        assert [model.stats.rows for _, model in worker.host.serving()] == [1000]
