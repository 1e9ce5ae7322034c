"""Inputs that are run where they lie in shared memory, whatever their owner does meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
from headrace.v1.dataplane_pb2 import PredictRequest
from headrace.v1.tensor_pb2 import DataType, SharedMemory, Tensor

from services.common.clock import ManualClock
from services.common.errors import InvalidArgument
from services.common.shared_memory import DIRECTORY, inspect
from services.worker.bus_errors import Mapped, map_guarded
from services.worker.mapped_objects import MappedObjects
from services.worker.shared_inputs import SharedInputs
from tests.fixtures.waiting import PATIENCE_S, eventually

ROWS, ROW = 4096, 64
VALUES = np.arange(ROWS * ROW, dtype=np.float32)
SIZE = VALUES.nbytes


@pytest.fixture
def region() -> Iterator[Path]:
    path = DIRECTORY / f"headrace-test-{uuid4().hex}"
    path.write_bytes(VALUES.tobytes())
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def inputs(clock: ManualClock) -> SharedInputs:
    return SharedInputs(allowed=True, mapped=MappedObjects(clock))


def place(
    region: Path, offset: int = 0, byte_size: int = SIZE, datatype: DataType = DataType.DATA_TYPE_FP32
) -> Tensor:
    there = SharedMemory(key=region.name, offset=offset, byte_size=byte_size)
    return Tensor(name="x", datatype=datatype, shape=[byte_size // 4 // ROW, ROW], shared_memory=there)


def taken(inputs: SharedInputs, *tensors: Tensor) -> list[memoryview]:
    found = inputs.read(PredictRequest(inputs=tensors), None)
    views = [view for view in found if view is not None]
    assert len(views) == len(tensors)
    return views


def mapping(view: memoryview) -> bool:
    return isinstance(view.obj, Mapped)


def test_large_floating_point_inputs_are_seen_where_they_lie(inputs: SharedInputs, region: Path) -> None:
    (whole,) = taken(inputs, place(region))
    (half,) = taken(inputs, place(region, SIZE // 2, SIZE // 2))
    assert mapping(whole)
    assert whole.obj is half.obj  # mapped once
    assert np.array_equal(np.frombuffer(half, np.float32), VALUES[len(VALUES) // 2 :])
    with region.open("r+b") as file:
        file.seek(SIZE // 2)
        file.write(b"\xff")
    assert half[0] == 0xFF
    assert whole.readonly
    with pytest.raises(TypeError):
        whole[0] = 1


@pytest.mark.parametrize(
    ("offset", "byte_size", "datatype"),
    [
        (4, 1 << 18, DataType.DATA_TYPE_FP32),  # vectors of it would be loaded in two steps
        (0, 1 << 14, DataType.DATA_TYPE_FP32),  # small
        (0, 1 << 18, DataType.DATA_TYPE_INT64),  # places in a table, perhaps
        (0, 1 << 18, DataType.DATA_TYPE_BOOL),
        (0, 1 << 18, DataType.DATA_TYPE_BYTES),
    ],
)
def test_others_are_copied_and_stay_what_they_were(
    inputs: SharedInputs, region: Path, offset: int, byte_size: int, datatype: DataType
) -> None:
    (view,) = taken(inputs, place(region, offset, byte_size, datatype))
    region.write_bytes(bytes(SIZE))
    assert not mapping(view)
    assert bytes(view) == VALUES.tobytes()[offset : offset + byte_size]


@pytest.mark.parametrize(
    ("offset", "byte_size", "why"),
    [
        (64, SIZE, "ends before"),
        (SIZE, 1 << 16, "ends before"),
        (2**63, 1 << 16, "ends before"),
        (0, 1 << 40, "larger than a request may be"),
    ],
)
def test_what_is_not_there_is_refused_also_once_it_is_mapped(
    inputs: SharedInputs, region: Path, offset: int, byte_size: int, why: str
) -> None:
    taken(inputs, place(region))
    with pytest.raises(InvalidArgument, match=why):
        taken(inputs, place(region, offset, byte_size))


def test_an_object_that_became_longer_or_shorter_is_taken_as_it_is(
    inputs: SharedInputs, region: Path
) -> None:
    taken(inputs, place(region))
    os.truncate(region, 2 * SIZE)
    (longer,) = taken(inputs, place(region, SIZE))
    assert bytes(longer) == bytes(SIZE)
    os.truncate(region, SIZE // 2)
    with pytest.raises(InvalidArgument, match="ends before"):
        taken(inputs, place(region))
    (half,) = taken(inputs, place(region, 0, SIZE // 2))
    assert bytes(half) == VALUES.tobytes()[: SIZE // 2]


def test_an_object_made_anew_under_the_name_is_another_one(inputs: SharedInputs, region: Path) -> None:
    tensor = place(region)
    tensor.shared_memory.identity = inspect(region.name, "f")[1]
    (before,) = taken(inputs, tensor)
    region.unlink()  # its owner may have ended
    region.write_bytes(bytes(SIZE))
    with pytest.raises(InvalidArgument, match="another object"):
        taken(inputs, tensor)
    assert bytes(taken(inputs, place(region))[0]) == bytes(SIZE)
    assert bytes(before) == VALUES.tobytes()


def test_places_may_overlap(inputs: SharedInputs, region: Path) -> None:
    one, other = taken(inputs, place(region, 0, SIZE // 2), place(region, SIZE // 4, SIZE // 2))
    assert bytes(one)[SIZE // 4 :] == bytes(other)[: SIZE // 4]


def test_a_link_is_not_followed(inputs: SharedInputs, region: Path) -> None:
    link = region.with_name(f"{region.name}-link")
    link.symlink_to(region)
    try:
        with pytest.raises(InvalidArgument, match="cannot be opened"):
            taken(inputs, place(link))
    finally:
        link.unlink()


def test_what_is_shortened_while_it_is_read_reads_as_zeros(inputs: SharedInputs, region: Path) -> None:
    (view,) = taken(inputs, place(region))
    os.truncate(region, SIZE // 2)
    assert bytes(view) == VALUES.tobytes()[: SIZE // 2] + bytes(SIZE // 2)
    os.truncate(region, SIZE)
    region.write_bytes(VALUES.tobytes())
    # The next request does not see the zeros.
    assert bytes(taken(inputs, place(region))[0]) == VALUES.tobytes()


def test_threads_that_compute_survive_an_owner_that_keeps_shortening(region: Path) -> None:
    stop = threading.Event()
    met: list[bool] = []

    def read() -> None:
        with region.open("rb") as file:
            while not stop.is_set():
                try:
                    mapped = map_guarded(file.fileno(), SIZE)
                except ValueError:  # it is too short just now
                    continue
                joined = b"".join([memoryview(mapped), memoryview(mapped)])
                np.frombuffer(mapped, np.float32).sum()
                assert len(joined) == 2 * SIZE
                met.append(mapped.shortened)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        until = time.monotonic() + PATIENCE_S
        while sum(met) < 20 and time.monotonic() < until:
            os.truncate(region, SIZE)
            os.truncate(region, 4096)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert sum(met) >= 20


def test_faults_elsewhere_end_the_process_as_ever() -> None:
    program = """
import mmap, os, resource
from services.worker.bus_errors import map_guarded
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
file = os.memfd_create("x")
os.ftruncate(file, 8192)
guarded, other = map_guarded(file, 8192), mmap.mmap(file, 8192)
os.ftruncate(file, 0)
assert guarded[4096] == 0
other[4096]
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, check=False, timeout=60)
    assert done.returncode == -signal.SIGBUS


async def test_what_is_not_used_is_unmapped(inputs: SharedInputs, clock: ManualClock, region: Path) -> None:
    objects = MappedObjects(clock, unused_s=0.001)
    in_use = objects.view(region.name, 0, SIZE, 0)
    assert in_use is not None
    assert len(objects) == 1
    assert region.name in maps()
    region.unlink()
    clock.advance(1.0)
    forgetting = asyncio.create_task(objects.forget_unused())
    await eventually(lambda: len(objects) == 0)
    assert bytes(in_use) == VALUES.tobytes()
    in_use.release()
    await eventually(lambda: region.name not in maps())
    forgetting.cancel()


def test_so_many_are_mapped_and_no_more(clock: ManualClock, region: Path) -> None:
    objects = MappedObjects(clock)
    others = [region.with_name(f"{region.name}-{number}") for number in range(64)]
    try:
        for path in (region, *others):
            path.write_bytes(bytes(4096))
            assert objects.view(path.name, 0, 4096, 0) is not None
        assert sum(region.name in line for line in maps().splitlines()) == 64
    finally:
        for path in others:
            path.unlink(missing_ok=True)


def maps() -> str:
    return Path("/proc/self/maps").read_text()
