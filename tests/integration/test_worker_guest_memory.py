"""A guest that may not make its process grow any more: what it has it serves, the rest is the workers'."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from headrace.v1.control_pb2 import LoadedVersion
from headrace.v1.tensor_pb2 import Code

from services.common.bus import Record
from services.common.topics import DEPLOYMENTS
from services.worker import guest, loading
from services.worker.backends.onnx import OnnxBackend
from services.worker.backends.port import Backend
from services.worker.desired import Desired
from services.worker.loading import VersionLoader
from services.worker.model_host import ModelHost
from services.worker.slot import Slot
from tests.fixtures.guests import EVICTED, FAILED, READY, Rig, rig
from tests.fixtures.onnx_models import mlp, two_inputs
from tests.fixtures.waiting import eventually

__all__ = ["rig"]

ROW = np.zeros((1, 30), np.float32)
NAMES = "abc"
#: Bytes that every version of the guest seems to take.
SIZE = 1 << 20


class Memory:
    """As if nothing took memory but what the guest has loaded. `loads` are models in the order in which it
    loaded them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.loads: list[str] = []
        held: set[Backend] = set()
        open_one, close_one = VersionLoader._open, OnnxBackend.close

        def opening(loader: VersionLoader, desired: Desired, directory: Path) -> Backend:
            backend = open_one(loader, desired, directory)
            if loader._options.source.startswith("guest"):
                self.loads.append(desired.key.model)
                held.add(backend)
            return backend

        def closing(backend: OnnxBackend) -> None:
            held.discard(backend)
            close_one(backend)

        patch.setattr(VersionLoader, "_open", opening)
        patch.setattr(OnnxBackend, "close", closing)
        for module in (guest, loading):
            patch.setattr(module, "resident_bytes", lambda: SIZE * len(held))


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    return Memory(monkeypatch)


async def deploy(rig: Rig, names: str) -> None:
    for name in names:
        await rig.deploy(name, mlp(seed=ord(name)))


def states(host: ModelHost) -> dict[str, LoadedVersion.State]:
    return {version.model: version.state for version in host.states()}


async def until_states(host: ModelHost, *wanted: LoadedVersion.State) -> None:
    await eventually(lambda: sorted(states(host).values()) == sorted(wanted), on=host.states)


async def codes(rig: Rig, names: str) -> set[Code]:
    return {(await rig.ask(name, x=ROW)).code for name in names}


async def test_what_finds_no_room_is_the_workers_and_nobody_makes_room_for_it(
    rig: Rig, memory: Memory
) -> None:
    await deploy(rig, NAMES)
    async with rig.worker() as worker, rig.guest(guest_memory_bytes=SIZE) as host:
        await rig.until_outside(*NAMES)
        await until_states(host, READY, EVICTED, EVICTED)
        (taken,) = memory.loads
        await rig.until(host, taken, READY)
        for version in host.states():
            assert ("no memory" in version.error) is (version.state == EVICTED)
        assert await codes(rig, NAMES * 5) == {Code.CODE_OK}
        inside = {key.model: model.stats.rows for key, model in host.serving()}
        outside = {key.model: model.stats.rows for key, model in worker.host.serving()}
        assert inside == {taken: 5}
        assert outside == {name: 0 if name == taken else 5 for name in NAMES}
        assert memory.loads == [taken]
        assert not host.evictions


async def test_whoever_makes_room_is_answered_all_the_while(
    rig: Rig, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that are on their way as a version is evicted, and those after it."""
    await deploy(rig, "a")
    asked: list[asyncio.Task[set[Code]]] = []
    evict = ModelHost._evict

    def evicting(host: ModelHost, slot: Slot) -> None:
        asked.append(asyncio.create_task(codes(rig, "a")))
        evict(host, slot)
        asked.append(asyncio.create_task(codes(rig, "a")))

    monkeypatch.setattr(ModelHost, "_evict", evicting)
    async with rig.worker(), rig.guest(guest_memory_bytes=SIZE, evict_idle_s=0) as host:
        await rig.until_outside("a")
        await rig.until(host, "a", READY)
        await deploy(rig, "b")
        await eventually(lambda: len(asked) >= 2)
        for reply in asked:
            assert await reply == {Code.CODE_OK}
        await rig.until_outside("b")
        await until_states(host, READY, EVICTED)
        loads = list(memory.loads)
        assert await codes(rig, "ab" * 5) == {Code.CODE_OK}
        assert memory.loads == loads


async def test_alone_it_loads_whatever_is_asked_for(rig: Rig, memory: Memory) -> None:
    await deploy(rig, "ab")
    async with rig.guest(guest_memory_bytes=SIZE) as host:
        await until_states(host, READY, EVICTED)
        await rig.until(host, memory.loads[0], READY)
        other = "b" if memory.loads == ["a"] else "a"
        await rig.until(host, other, EVICTED)
        for name in (other, memory.loads[0], other):
            assert await codes(rig, name) == {Code.CODE_OK}
            assert memory.loads[-1] == name
        assert host.evictions.total() == 3


async def test_when_one_has_left_another_comes_back(rig: Rig, memory: Memory) -> None:
    await deploy(rig, "a")
    async with rig.worker(), rig.guest(guest_memory_bytes=SIZE) as host:
        await rig.until(host, "a", READY)
        for name in "bc":
            await deploy(rig, name)
            await rig.until(host, name, EVICTED)
        await rig.bus.publish([Record(DEPLOYMENTS.name, b"a", None)])
        await eventually(lambda: len(memory.loads) == 2, on=memory.loads)
        came = memory.loads[1]
        await rig.until(host, came, READY)
        assert await codes(rig, came) == {Code.CODE_OK}
        assert {key.model: model.stats.rows for key, model in host.serving()} == {came: 1}
        await until_states(host, READY, EVICTED)
        assert len(memory.loads) == 2
        assert not host.evictions


async def test_what_carries_no_traffic_does_not_come_back(rig: Rig, memory: Memory) -> None:
    await deploy(rig, "a")
    async with rig.worker(), rig.guest(guest_memory_bytes=SIZE) as host:
        await rig.until(host, "a", READY)
        await rig.deploy("spare", mlp(seed=1), weight=0)
        await rig.until(host, "spare", EVICTED)
        await rig.bus.publish([Record(DEPLOYMENTS.name, b"a", None)])
        await eventually(lambda: "a" not in states(host))
        await deploy(rig, "b")
        await rig.until(host, "b", READY)
        assert memory.loads == ["a", "b"]


async def test_what_is_found_slow_leaves_its_memory_to_another(
    rig: Rig, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest, "_SLOW_S", 0.0)
    await deploy(rig, "a")
    async with rig.worker(), rig.guest(guest_memory_bytes=SIZE) as host:
        await rig.until(host, "a", READY)
        await deploy(rig, "b")
        await rig.until(host, "b", EVICTED)
        assert await codes(rig, "a") == {Code.CODE_OK}
        await rig.until(host, "b", READY)
        assert states(host) == {"a": FAILED, "b": READY}
        assert memory.loads == ["a", "b"]


async def test_what_was_found_slow_is_not_evicted_but_answers_first(
    rig: Rig, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evicted version would come back."""
    monkeypatch.setattr(guest, "_SLOW_S", 0.0)
    await deploy(rig, "a")
    async with rig.guest(guest_memory_bytes=SIZE, evict_idle_s=0, linger_s=600) as host:
        await rig.until(host, "a", READY)
        assert await codes(rig, "a") == {Code.CODE_OK}
        await rig.until(host, "a", FAILED)
        await deploy(rig, "b")
        await rig.until(host, "b", EVICTED)
        assert states(host)["a"] == FAILED
        assert memory.loads == ["a"]


async def test_what_made_room_for_one_that_is_left_comes_back(rig: Rig, memory: Memory) -> None:
    await deploy(rig, "a")
    async with rig.worker(), rig.guest(guest_memory_bytes=SIZE, evict_idle_s=0) as host:
        await rig.until(host, "a", READY)
        await rig.deploy("pair", two_inputs())
        await rig.until(host, "pair", FAILED)
        await rig.until(host, "a", READY)
        assert memory.loads == ["a", "pair", "a"]


async def test_who_comes_back_takes_nobodys_place(rig: Rig, memory: Memory) -> None:
    """Else idle versions would take turns for nobody."""
    async with rig.worker(), rig.guest(guest_memory_bytes=SIZE, evict_idle_s=0) as host:
        for name in NAMES:
            await deploy(rig, name)
            await rig.until(host, name, READY)
        assert memory.loads == ["a", "b", "c"]
        await rig.bus.publish([Record(DEPLOYMENTS.name, b"c", None)])
        await eventually(lambda: len(memory.loads) == 4, on=memory.loads)
        await rig.until(host, memory.loads[3], READY)
        await until_states(host, READY, EVICTED)
        assert len(memory.loads) == 4
        assert host.evictions == {("a", "1"): 1, ("b", "1"): 1}
