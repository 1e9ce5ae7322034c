"""A router with a worker in its own process: what goes there, what goes to the worker processes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path

import pytest
from headrace.v1.control_pb2 import Hedging, LoadedVersion
from headrace.v1.dataplane_pb2 import Origin, PredictReply, PredictRequest
from headrace.v1.tensor_pb2 import Code, SharedMemory

from services.common.frames.messages import varint
from services.router.routed import _BULKY_BYTES, _FEW_ROWS, _SMALL_BYTES
from tests.fixtures.router import FakeWorker, gateway, request, sole
from tests.fixtures.router_platform import READY, Versions, platform, refuse, soon
from tests.fixtures.waiting import eventually, patience


def asked(workers: Iterable[FakeWorker]) -> list[int]:
    """How many requests each has seen."""
    return [len(worker.seen) for worker in workers]


def of(n: int, nbytes: int, tensors: int = 1, rows: int = 1) -> PredictRequest:
    """A request with tensors of so many bytes."""
    made = request(n)
    made.inputs[0].shape[:] = [rows, nbytes // 4 // rows]
    made.inputs[0].data = bytes(nbytes // 4 * 4)
    for number in range(1, tensors):
        made.inputs.add(name=f"x{number}").CopyFrom(made.inputs[0])
        made.inputs[number].name = f"x{number}"
    return made


@pytest.mark.parametrize(
    ("nbytes", "tensors", "rows", "near"),
    [
        (120, 1, 30, True),
        (_SMALL_BYTES - 512, 1, 16, True),
        (_SMALL_BYTES, 1, 16, False),  # more than that, with what says what it is
        (_SMALL_BYTES // 8, 9, 16, False),
        # Few rows may be large.
        (_SMALL_BYTES, 1, _FEW_ROWS, True),
        (_SMALL_BYTES // 8, 9, 1, True),
        (_BULKY_BYTES - 512, 1, 1, True),
        (_BULKY_BYTES, 1, 1, False),
        (_BULKY_BYTES // 8, 9, 1, False),
        (3 << 20, 1, 1, False),
    ],
)
async def test_only_small_requests_are_for_the_worker_in_this_process(
    tmp_path: Path, nbytes: int, tensors: int, rows: int, near: bool
) -> None:
    async with platform(tmp_path) as p:
        inside = await p.guest()
        outside = await p.worker("w1")
        for n in range(3):
            reply = await p.calls.predict(of(n, nbytes, tensors, rows), soon())
            assert reply.code == Code.CODE_OK
            assert [tensor.data for tensor in reply.outputs] == [
                tensor.data for tensor in of(n, nbytes, tensors, rows).inputs
            ]
        assert asked((inside, outside)) == ([3, 0] if near else [0, 3])
        assert [e.in_flight for e in p.router.dispatcher.endpoints.all()] == [0, 0]


async def test_what_comes_apart_from_its_large_tensors_is_large(tmp_path: Path) -> None:
    """So it does from a gateway of the same process; what is left of such a request is small."""
    async with platform(tmp_path, frames_name="router-0") as p:
        inside = await p.guest()
        outside = await p.worker("w1")
        made = of(1, 1 << 20)
        data = made.inputs[0].data
        tensor = made.inputs[0].SerializeToString()
        head = b"\x22" + varint(len(tensor)) + tensor.removesuffix(data)
        assert head.endswith(b"\x22" + varint(len(data)))  # data is a tensor's last field
        made.ClearField("inputs")
        got: asyncio.Future[PredictReply] = asyncio.get_running_loop().create_future()
        async with gateway(p.router, "local:router-0") as calls:
            calls.forward(
                made.SerializeToString(), b"", soon(), lambda reply, *_: got.set_result(reply), (head, data)
            )
            async with patience("the answer"):
                reply = await got
        assert reply.code == Code.CODE_OK
        assert reply.outputs[0].data == data
        assert asked((inside, outside)) == [0, 1]


async def test_what_lies_in_shared_memory_is_large_whatever_its_request_is(tmp_path: Path) -> None:
    async with platform(tmp_path, shared_memory=True) as p:
        inside = await p.guest()
        outside = await p.worker("w1")
        for n in range(4):
            made = request(n)
            if n % 2:
                made.inputs[0].ClearField("data")
                made.inputs[0].shared_memory.CopyFrom(SharedMemory(key="object", byte_size=120))
            assert (await p.calls.predict(made, soon())).code == Code.CODE_OK
        assert [item.request_id[-1] for item in inside.seen] == [0, 2]
        assert [item.request_id[-1] for item in outside.seen] == [1, 3]


async def test_everything_is_for_it_where_it_is_alone(tmp_path: Path) -> None:
    async with platform(tmp_path) as p:
        inside = await p.guest()
        for n, nbytes in enumerate((120, 1 << 20)):
            assert (await p.calls.predict(of(n, nbytes), soon())).code == Code.CODE_OK
        assert asked([inside]) == [2]


@pytest.mark.parametrize("code", [Code.CODE_RESOURCE_EXHAUSTED, Code.CODE_UNAVAILABLE])
async def test_what_it_refuses_a_worker_process_answers(tmp_path: Path, code: Code) -> None:
    async with platform(tmp_path) as p:
        inside = await p.guest()
        outside = await p.worker("w1")
        inside.behave = refuse(code)
        reply = await p.ask(1)
        assert reply.code == Code.CODE_OK
        assert asked((inside, outside)) == [1, 1]
        assert [item.attempt for item in outside.seen] == [1]
        assert inside.seen[0].request_id == outside.seen[0].request_id
        assert not await p.records()  # the router writes nothing of what a worker answered


async def test_its_end_costs_a_retry(tmp_path: Path) -> None:
    async with platform(tmp_path) as p:
        inside = await p.guest()
        outside = await p.worker("w1")
        inside.behave = lambda *_: None  # keeps what it has
        waiting = [asyncio.create_task(p.ask(n)) for n in range(5)]
        await eventually(lambda: len(inside.seen) == 5)
        await inside.server.close()
        assert {reply.code for reply in await asyncio.gather(*waiting)} == {Code.CODE_OK}
        assert asked((inside, outside)) == [5, 5]
        assert (await p.ask(9)).code == Code.CODE_OK
        assert asked((inside, outside)) == [5, 6]


async def test_a_late_request_is_asked_of_a_worker_process(tmp_path: Path) -> None:
    async with platform(tmp_path) as p:
        inside = await p.guest()
        made = sole()
        made.hedging.CopyFrom(Hedging(min_delay_ms=20))
        await p.serve(made)
        outside = await p.worker("w1")
        for n in range(128):  # to know what is usual
            assert (await p.ask(n)).code == Code.CODE_OK
        assert asked((inside, outside)) == [128, 0]
        inside.behave = lambda *_: None
        assert (await p.ask(1000)).code == Code.CODE_OK
        assert [item.attempt for item in outside.seen] == [1]
        await eventually(lambda: inside.cancelled == 1)


async def test_copies_for_a_shadow_go_to_worker_processes(tmp_path: Path) -> None:
    async with platform(tmp_path) as p:
        inside = await p.guest()
        made = sole()
        made.versions.add(version="2", artifact_digest="sha256:2")
        made.shadow.version, made.shadow.share = "2", 10_000
        await p.serve(made)
        outside = await p.worker("w1")
        for n in range(4):
            assert (await p.ask(n)).version == "1"
        await eventually(lambda: len(outside.seen) == 4)
        assert {(item.version, item.origin) for item in outside.seen} == {("2", Origin.ORIGIN_SHADOW)}
        assert [item.version for item in inside.seen] == ["1"] * 4


async def test_a_version_that_it_has_not_is_asked_elsewhere(tmp_path: Path) -> None:
    only_second: Versions = {("cancer", "1"): LoadedVersion.STATE_FAILED, ("cancer", "2"): READY}
    async with platform(tmp_path) as p:
        inside = await p.guest(only_second)
        outside = await p.worker("w1")
        assert (await p.ask(1, version="1")).version == "1"
        assert (await p.ask(2, version="2")).version == "2"
        assert asked((inside, outside)) == [1, 1]


async def test_a_snapshot_does_not_name_it(tmp_path: Path) -> None:
    async with platform(tmp_path) as p:
        await p.guest()
        await p.worker("w1")
        await p.ask(1)
        assert p.router.dispatcher.endpoints.records().keys() == {"w1"}
    written = (tmp_path / "router-router-0" / "routing.json").read_text()
    assert "guest-0" not in written
