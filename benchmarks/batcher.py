"""What the worker adds to a model: rows/s from a frame's bytes to serialized replies, with the prediction
log's record made and written, against `session.run` alone on batches of the same size.

    python -m benchmarks.batcher [--seconds 2] [--profile 32]

Rates are per second of CPU time, so that other load on the machine matters less. One process, no sockets:
`frame` is what the network hands over (bytes), the replies end as bytes."""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import platform
import pstats
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime as ort
import uvloop
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest, RequestFrame
from headrace.v1.tensor_pb2 import Signature, Tensor

from services.common.bus import MemoryBus
from services.common.clock import SystemClock
from services.common.eventlog import EventLog
from services.common.frames import Peer
from services.common.ids import new_id
from services.common.telemetry import setup_tracing
from services.worker.backends.onnx import load
from services.worker.backends.port import BackendOptions
from services.worker.batch_queue import BatchPolicy
from services.worker.execution import Runner
from services.worker.input_layout import InputLayout
from services.worker.loaded_model import LoadedModel
from services.worker.prediction_log import PayloadPolicy, PredictionRecords
from services.worker.run_time import RunTime
from services.worker.servicer import FrameConnection, Servicer
from services.worker.serving import Serving, ServingPolicy
from services.worker.warm_up import warm_up
from tests.fixtures.onnx_models import mlp


class Sink:
    """Takes replies as the connection does: serialized at once."""

    def __init__(self) -> None:
        self.replies = 0
        self.failed = 0
        self.nbytes = 0
        #: No data of large inputs comes apart from them.
        self.contents: dict[int, list[memoryview | None]] = {}

    def reply_raw(self, _id: int, payload: bytes) -> None:
        self.replies += 1
        self.nbytes += len(payload)

    def reply(self, _refusal: PredictReply) -> None:
        self.failed += 1


class OneVersion:
    """The versions of a worker that has one."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded

    def find(self, _model: str, _version: str) -> LoadedModel:
        return self._loaded

    def knows(self, _model: str) -> bool:
        return True


def frame_of(requests: int, features: int) -> bytes:
    """A frame as a router sends it."""
    rng = np.random.default_rng(0)
    items = []
    for number in range(requests):
        row = rng.standard_normal((1, features)).astype(np.float32)
        items.append(
            PredictRequest(
                id=number,
                model="bench",
                version="1",
                inputs=[Tensor(name="x", datatype="DATA_TYPE_FP32", shape=[1, features], data=row.tobytes())],
                request_id=new_id(),
                timeout_us=5_000_000,
                received_at_us=time.time_ns() // 1000,
                variant="1",
                propensity=0.9,
                unit_hash=number,
                revision=3,
            )
        )
    return RequestFrame(items=items).SerializeToString()


def raw(path: Path, batch: int, features: int, seconds: float) -> float:
    """Rows per CPU second of `session.run` alone."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    x = np.zeros((batch, features), np.float32)
    runs, until = 0, time.perf_counter() + seconds
    started = time.process_time()
    while time.perf_counter() < until:
        session.run(["y"], {"x": x})
        runs += 1
    return runs * batch / (time.process_time() - started)


async def served(
    directory: Path,
    signature: Signature,
    batch: int,
    features: int,
    seconds: float,
    profile: cProfile.Profile | None,
) -> float:
    """Rows per CPU second through the worker's whole path for frames of `batch` one-row requests."""
    clock = SystemClock()
    bus = MemoryBus()
    # Publishing is not measured here: nothing is, before the run is over.
    events = EventLog(directory / "spool", bus, "bench", clock=clock, max_bytes=1 << 33, linger=1e6)
    await events.start()
    pool = ThreadPoolExecutor(1)
    layout = InputLayout(signature)
    runner = Runner(load(directory, signature, BackendOptions()), signature, layout)
    run_time = RunTime()
    warm_up(runner, layout, 64, run_time)
    policy = ServingPolicy(BatchPolicy(max_rows=max(batch, 64)), PayloadPolicy(), 30.0)
    records = PredictionRecords("bench", "bench", "1", "sha256:0", layout)
    serving = Serving(clock, events, setup_tracing("bench", None), pool, 0.0005)
    loaded = LoadedModel(runner, run_time, records, policy, serving, version="1", slots=1)
    sink = Sink()
    connection = FrameConnection(Servicer(OneVersion(loaded), events, clock), cast("Peer", sink))
    message = frame_of(batch, features)
    until = time.perf_counter() + seconds
    started = time.process_time()
    if profile is not None:
        profile.enable()
    while time.perf_counter() < until:
        connection.on_request_frame(RequestFrame.FromString(message))
        while not loaded.idle:  # noqa: ASYNC110 - one turn is what is being measured
            await asyncio.sleep(0)
    if profile is not None:
        profile.disable()
    rate = sink.replies / (time.process_time() - started)
    if sink.failed:
        raise SystemExit(f"{sink.failed} of {sink.replies} requests failed")
    await events.close(clock.monotonic())
    pool.shutdown()
    return rate


def main() -> None:
    """Print one line per batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--features", type=int, default=30)
    parser.add_argument("--profile", type=int, default=0, help="show where the time goes at this batch size")
    given = parser.parse_args()
    model, signature = mlp(given.features)
    results: list[dict[str, Any]] = []
    sizes = [given.profile] if given.profile else [1, 8, 32, 64, 128, 256]
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    print("batch   raw rows/s   served rows/s   ratio   added µs/row   added µs/batch")
    for batch in sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(model)
            bare = raw(path, batch, given.features, given.seconds / 2)
            profile = cProfile.Profile() if given.profile else None
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                rate = runner.run(
                    served(Path(folder), signature, batch, given.features, given.seconds, profile)
                )
        added = 1e6 / rate - 1e6 / bare
        results.append(
            {"batch": batch, "raw_rows_per_s": bare, "served_rows_per_s": rate, "added_us_per_row": added}
        )
        print(f"{batch:5} {bare:12,.0f} {rate:15,.0f} {rate / bare:7.3f} {added:14.2f} {added * batch:16.1f}")
        if profile is not None:
            pstats.Stats(profile).sort_stats("tottime").print_stats(30)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
