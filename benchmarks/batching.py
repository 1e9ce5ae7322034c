"""Batching efficiency: rows/s that the worker serves over what the model gives offline at its best batch.

    python -m benchmarks.batching [--seconds 6] [--only resnet50,digits] [--rows 1] [--way sockets]

Offline is `session.run` in a loop with the worker's own session options, for every batch size, on one
thread. Served is one worker process (frames in, frames out, predictions logged), without gateway, router or
a router's guest, under a closed loop of requests of `--rows` rows, enough of them for several batches, from a
second process over a socket of the machine. Without `--rows` and `--way`: requests of one row for ResNet-50;
for digits, whose run is shorter than what a request of few rows costs anybody, requests of 64 rows, and
requests as large as the best batch, over the socket and with their inputs in shared memory, where the client
writes each anew. In turns with it the best batch runs offline; what is served is divided by the mean of just
before and just after, and of these ratios the median counts, since a machine's speed may change within
seconds. `python -m benchmarks` runs this with the worker's hot path compiled, as `make up` does. ResNet-50
has the real one's layers with random weights: 25.5 M parameters, 4.1 G multiply-adds a row.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import numpy as np
import onnx
import uvloop
from headrace.v1.control_pb2 import LoadedVersion, WorkerStatus
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest
from headrace.v1.tensor_pb2 import DataType, SharedMemory, Signature, Tensor, TensorSpec
from onnx import TensorProto, helper, numpy_helper

from services.common.bus import MemoryBus, Record
from services.common.clock import SystemClock
from services.common.frames import FrameCalls
from services.common.ids import new_id
from services.common.lifecycle import keep_freed_memory
from services.common.shared_memory import DIRECTORY
from services.common.topics import PREDICTIONS, WORKERS
from services.worker.app import worker_app
from services.worker.backends.onnx import load
from services.worker.backends.port import BackendOptions
from services.worker.settings import Settings
from tests.fixtures.deployments import config, put_artifact, record, served

TOKEN = "token-of-the-benchmark"
FP32 = DataType.DATA_TYPE_FP32
SOCKETS, SHARED_MEMORY = "sockets", "shared memory"
# As services.common.lifecycle sets it for every service.
_SWITCH_S = 0.0005
# (blocks, width) of ResNet-50's four stages.
_STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))


@dataclass(frozen=True)
class Model:
    """What is measured, and the sizes that it is tried with offline."""

    name: str
    data: bytes
    signature: Signature
    row: tuple[int, ...]
    sizes: tuple[int, ...]
    #: What is served is measured so often, and each time what the model gives alone just before and after.
    turns: int


def resnet50() -> Model:
    """Bottleneck blocks as He et al. 2015, table 1; batch normalisation folded into the convolutions."""
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def conv(x: str, channels: int, out: int, size: int, stride: int = 1) -> str:
        name = f"conv{len(weights)}"
        scale = (2.0 / (channels * size * size)) ** 0.5
        kernel = (rng.standard_normal((out, channels, size, size)) * scale).astype(np.float32)
        weights.append(numpy_helper.from_array(kernel, f"{name}.w"))
        weights.append(numpy_helper.from_array(np.zeros(out, np.float32), f"{name}.b"))
        pad = size // 2
        nodes.append(
            helper.make_node(
                "Conv", [x, f"{name}.w", f"{name}.b"], [name],
                kernel_shape=[size] * 2, strides=[stride] * 2, pads=[pad] * 4,
            )
        )  # fmt: skip
        return name

    def op(kind: str, *inputs: str, **given: object) -> str:
        name = f"{kind.lower()}{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [name], **given))  # type: ignore[arg-type]  # attributes
        return name

    x = op("Relu", conv("image", 3, 64, 7, 2))
    x = op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels = 64
    for stage, (blocks, width) in enumerate(_STAGES):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            y = op("Relu", conv(x, channels, width, 1))
            y = op("Relu", conv(y, width, width, 3, stride))
            y = conv(y, width, 4 * width, 1)
            short = conv(x, channels, 4 * width, 1, stride) if not block else x
            x, channels = op("Relu", op("Add", y, op("Mul", short, "small"))), 4 * width
    x = op("Flatten", op("GlobalAveragePool", x))
    weights.append(
        numpy_helper.from_array((rng.standard_normal((channels, 1000)) / 45).astype(np.float32), "fc")
    )
    weights.append(numpy_helper.from_array(np.array(0.5, np.float32), "small"))
    nodes.append(helper.make_node("MatMul", [x, "fc"], ["logits"]))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 224, 224])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 1000])
    graph = helper.make_graph(nodes, "resnet50", [image], [logits], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    signature = Signature(
        inputs=[TensorSpec(name="image", datatype=FP32, shape=[-1, 3, 224, 224])],
        outputs=[TensorSpec(name="logits", datatype=FP32, shape=[-1, 1000])],
        batched=True,
    )
    return Model("resnet50", model.SerializeToString(), signature, (3, 224, 224), (1, 2, 4, 8, 16), turns=2)


def digits() -> Model:
    """The example's model."""
    from examples import digits as example  # noqa: PLC0415 - needs scikit-learn

    with tempfile.TemporaryDirectory() as folder:
        path, _ = example.build(Path(folder))
        data = path.read_bytes()
    signature = Signature(
        inputs=[TensorSpec(name="image", datatype=FP32, shape=[-1, 8, 8])],
        outputs=[
            TensorSpec(name="digit", datatype=DataType.DATA_TYPE_INT64, shape=[-1]),
            TensorSpec(name="probabilities", datatype=FP32, shape=[-1, 10]),
        ],
        batched=True,
    )
    return Model("digits", data, signature, (8, 8), (1, 16, 64, 256, 1024, 4096), turns=8)


@contextmanager
def offline(model: Model) -> Iterator[Callable[[int, float], float]]:
    """Gives rows/s of batches of a size, measured for so many seconds."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "model.onnx").write_bytes(model.data)
        backend = load(Path(folder), model.signature, BackendOptions())

    def rate(rows: int, seconds: float) -> float:
        x = np.zeros((rows, *model.row), np.float32)
        backend.run({model.signature.inputs[0].name: x}, ())
        runs, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            backend.run({model.signature.inputs[0].name: x}, ())
            runs += 1
        return runs * rows / (time.perf_counter() - started)

    yield rate
    backend.close()


class Forgetful(MemoryBus):
    """Keeps no predictions."""

    async def publish(self, records: Sequence[Record]) -> None:
        await super().publish([one for one in records if one.topic != PREDICTIONS.name])


def worker(pipe: Connection, model: Model, max_rows: int, log_payloads: bool) -> None:
    """Serve `model` until told to stop; says the port and what was measured at warm-up."""

    keep_freed_memory()
    sys.setswitchinterval(_SWITCH_S)

    async def serve() -> None:
        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder, "store")
            digest, _ = put_artifact(store, {"model.onnx": model.data})
            bus = Forgetful()
            version = served("1", digest, model.signature)
            deployment = config("m", 1, version, max_rows=max_rows)
            deployment.log_payloads = log_payloads
            await bus.publish([record(deployment)])
            cfg = Settings.model_validate(
                {
                    "kafka_bootstrap_servers": "unused:1", "internal_token": TOKEN,
                    "artifact_store_url": f"file://{store}", "state_dir": Path(folder, "state"),
                    "frames_port": 0, "grpc_port": 0, "ops_port": 0, "max_queue_ms": 60_000,
                    "max_queue_rows": 1 << 20, "frames_socket": Path(folder, "frames"), "shared_memory": True,
                }
            )  # fmt: skip
            async with worker_app(cfg, SystemClock(), bus) as running:
                while True:
                    last = [WorkerStatus.FromString(r.value or b"") for r in bus.records(WORKERS.name)][-1:]
                    ready = [v for s in last for v in s.versions if v.state == LoadedVersion.STATE_READY]
                    if ready:
                        break
                    await asyncio.sleep(0.1)
                pipe.send((f"unix:{cfg.frames_socket}", ready[0].best_rows, ready[0].best_rows_per_s))
                await asyncio.to_thread(pipe.recv)
                ((_, loaded),) = running.host.serving()
                stats = loaded.stats
                runs = max(1, stats.runs)
                pipe.send((stats.rows / runs, stats.inline_runs / runs, sum(loaded.refused.values())))

    uvloop.run(serve())


@contextmanager
def shared(nbytes: int) -> Iterator[tuple[str, mmap.mmap]]:
    """An object of so many bytes in shared memory: its name, and itself."""
    name = f"headrace-batching-{os.getpid()}"
    path = DIRECTORY / name
    path.write_bytes(bytes(nbytes))
    try:
        with path.open("r+b") as file, mmap.mmap(file.fileno(), nbytes) as whole:
            yield name, whole
    finally:
        path.unlink()


@contextmanager
def requests(model: Model, rows: int, in_flight: int, way: str) -> Iterator[Callable[[int], bytes]]:
    """Makes the request of each place among those in flight, serialized."""
    values = np.zeros((rows, *model.row), np.float32).tobytes()
    tensor = Tensor(name=model.signature.inputs[0].name, datatype=FP32, shape=[rows, *model.row])
    given = PredictRequest(model="m", version="1", request_id=new_id(), variant="1", propensity=1.0)

    def with_input(**data: object) -> bytes:
        one = PredictRequest()
        one.CopyFrom(given)
        one.inputs.append(tensor)
        one.inputs[0].MergeFrom(Tensor(**data))  # type: ignore[arg-type]  # one field of it
        return one.SerializeToString()

    if way == SOCKETS:
        whole = with_input(data=values)
        yield lambda _place: whole
        return
    size = len(values)
    with shared(in_flight * size) as (name, region):
        each = [
            with_input(shared_memory=SharedMemory(key=name, offset=place * size, byte_size=size))
            for place in range(in_flight)
        ]

        def write(place: int) -> bytes:
            region[place * size : (place + 1) * size] = values
            return each[place]

        yield write


class Client:
    """Keeps `in_flight` requests under way while it is told to."""

    def __init__(self, calls: FrameCalls, request_of: Callable[[int], bytes], in_flight: int) -> None:
        self.answered = self.failed = 0
        self._calls = calls
        self._request_of = request_of
        self._in_flight = in_flight
        self._under_way = 0
        self._on = False
        self._warm = asyncio.Event()
        self._warm_at = 0
        self._over = asyncio.Event()

    async def rate(self, seconds: float) -> float:
        """Requests a second answered in that long, after as many as are in flight at once were answered; at
        the end none is under way."""
        self._on = True
        self._over.clear()
        self._under_way = self._in_flight
        self._warm.clear()
        self._warm_at = self.answered + self._in_flight
        for place in range(self._in_flight):
            self._submit(place)
        await self._warm.wait()
        before, started = self.answered, time.perf_counter()
        await asyncio.sleep(seconds)
        rate = (self.answered - before) / (time.perf_counter() - started)
        self._on = False
        await self._over.wait()
        return rate

    def _submit(self, place: int) -> None:
        def on_reply(reply: PredictReply) -> None:
            self.answered += 1
            self.failed += reply.code != 0
            if self.answered == self._warm_at:
                self._warm.set()
            if self._on:
                self._submit(place)
                return
            self._under_way -= 1
            if not self._under_way:
                self._over.set()

        self._calls.submit_raw(self._request_of(place), None, on_reply)


async def in_turns(
    address: str,
    request_of: Callable[[int], bytes],
    in_flight: int,
    alone: Callable[[], float],
    turns: int,
    seconds: float,
) -> list[tuple[float, float]]:
    """Requests a second, and what `alone` gives: the mean of just before and just after."""
    calls = FrameCalls(address, credential=TOKEN, role="router", instance="r")
    calls.start()
    await calls.wait_connected(5)
    client = Client(calls, request_of, in_flight)
    await client.rate(seconds / 2)
    pairs: list[tuple[float, float]] = []
    before = await asyncio.to_thread(alone)
    for _ in range(turns):
        served = await client.rate(seconds)
        after = await asyncio.to_thread(alone)
        pairs.append((served, (before + after) / 2))
        before = after
    if client.failed:
        raise SystemExit(f"{client.failed} of {client.answered} requests failed")
    await calls.close()
    return pairs


def measure(
    model: Model, rates: dict[int, float], rows: int, way: str, seconds: float, payloads: bool
) -> dict[str, object]:
    """One line of the report: requests of `rows` rows, 0 for the best batch's, brought by `way`."""
    best = max(rates, key=lambda size: rates[size])
    rows = rows or best
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=worker, args=(theirs, model, max(best, rows), payloads), daemon=True)
    process.start()
    address, own_best, own_rate = ours.recv()
    turns = model.turns
    window = seconds / turns
    in_flight = max(2, 3 * -(-best // rows))
    with offline(model) as run, requests(model, rows, in_flight, way) as request_of:
        pairs = uvloop.run(in_turns(address, request_of, in_flight, lambda: run(best, window), turns, window))
    ours.send("stop")
    mean_rows, inline, refused = ours.recv()
    process.join(20)
    if refused:
        raise SystemExit(f"{refused} requests were refused")
    ratios = sorted(served * rows / alone for served, alone in pairs)
    line: dict[str, object] = {
        "model": model.name, "way": way, "best_rows": best, "request_rows": rows, "in_flight": in_flight,
        "offline_rows_per_s": {**rates, best: median(alone for _, alone in pairs)},
        "served_rows_per_s": median(served for served, _ in pairs) * rows,
        "efficiency": median(ratios), "efficiencies": ratios,
        "mean_batch_rows": mean_rows, "inline": inline,
        "heartbeat_best_rows": own_best, "heartbeat_rows_per_s": own_rate,
    }  # fmt: skip
    return line


#: Rows of a request (0: the best batch's) and the way they come, by model.
LINES = {"resnet50": ((1, SOCKETS),), "digits": ((64, SOCKETS), (0, SOCKETS), (0, SHARED_MEMORY))}


def main() -> None:
    """Print a line of JSON for each model, size and way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--only", default="digits,resnet50")
    parser.add_argument("--rows", type=int, help="rows of a request; 0: those of the best batch")
    parser.add_argument("--way", choices=(SOCKETS, SHARED_MEMORY))
    parser.add_argument("--no-payloads", action="store_true", help="log predictions without their tensors")
    given = parser.parse_args()
    keep_freed_memory()
    for name in given.only.split(","):
        model = {"digits": digits, "resnet50": resnet50}[name]()
        with offline(model) as run:
            rates = {size: run(size, given.seconds / len(model.sizes)) for size in model.sizes}
        lines = [
            (rows, way)
            for rows, way in LINES[name]
            if given.rows in {None, rows} and given.way in {None, way}
        ] or [(given.rows or 0, given.way or SOCKETS)]
        for rows, way in lines:
            line = measure(model, rates, rows, way, given.seconds, not given.no_payloads)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
