"""Items per second through gateway → router → worker as three processes on real frames, without HTTP and
without a model: what the two hops themselves allow. `python -m benchmarks.two_hops [--profile FILE]`.

The worker echoes, the gateway is a closed loop of callers; routing, the 90/10 split, balancing, deadlines and
metrics are on. Prints items/s and the router's CPU time per item.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import uvloop
from headrace.v1.control_pb2 import BucketRange, LoadedVersion, ServedVersion, ServingConfig, WorkerStatus
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest, RequestFrame
from headrace.v1.tensor_pb2 import DataType, Tensor

from services.common.bus import MemoryBus, Record
from services.common.clock import SystemClock
from services.common.frames import FrameCalls, FrameServer, Peer
from services.common.topics import DEPLOYMENTS, WORKERS
from services.router.app import router_app
from services.router.settings import Settings

TOKEN = "token-of-the-benchmark"


class Echo:
    """Answers every item with a two-float output."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.output = Tensor(name="y", datatype=DataType.DATA_TYPE_FP32, shape=[1, 2], data=b"\0" * 8)

    def on_request_frame(self, frame: RequestFrame) -> None:
        for item in frame.items:
            self.peer.reply(PredictReply(id=item.id, version=item.version, outputs=[self.output]))

    def on_closed(self) -> None:
        pass


def worker(pipe: Connection) -> None:
    async def serve() -> None:
        server = FrameServer(Echo, credential=TOKEN, instance="w", role="worker")
        pipe.send(await server.start("127.0.0.1", 0))
        await asyncio.Event().wait()

    uvloop.run(serve())


def router(pipe: Connection, worker_port: int, profile: str) -> None:
    async def serve() -> None:
        bus = MemoryBus()
        config = ServingConfig(
            model="cancer",
            revision=1,
            salt="benchmark",
            versions=[ServedVersion(version="1", weight=9000), ServedVersion(version="2", weight=1000)],
            buckets=[
                BucketRange(first=0, last=8999, version="1"),
                BucketRange(first=9000, last=9999, version="2"),
            ],
        )
        status = WorkerStatus(
            worker_id="w",
            frames_address=f"127.0.0.1:{worker_port}",
            state=WorkerStatus.STATE_READY,
            versions=[
                LoadedVersion(model="cancer", version=version, state=LoadedVersion.STATE_READY)
                for version in "12"
            ],
            sent_at_us=time.time_ns() // 1000,
            sequence=1,
        )
        await bus.publish([Record(DEPLOYMENTS.name, b"cancer", config.SerializeToString())])
        await bus.publish([Record(WORKERS.name, b"w", status.SerializeToString())])
        with tempfile.TemporaryDirectory() as folder:
            cfg = Settings(
                kafka_bootstrap_servers="unused",
                internal_token=TOKEN,
                state_dir=Path(folder),
                frames_port=0,
                grpc_port=0,
                ops_port=0,
            )
            async with router_app(cfg, SystemClock(), bus) as running:
                pipe.send(running.frames_port)
                await asyncio.to_thread(pipe.recv)

    profiler = cProfile.Profile() if profile else None
    if profiler:
        profiler.enable()
    uvloop.run(serve())
    if profiler:
        profiler.disable()
        profiler.dump_stats(profile)


async def load(port: int, concurrency: int, seconds: float) -> tuple[float, float]:
    """Items per second and the median latency in ms."""
    calls = FrameCalls(f"127.0.0.1:{port}", credential=TOKEN, role="gateway", instance="g")
    calls.start()
    await calls.wait_connected(5)
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    latencies: list[float] = []
    end = time.perf_counter() + seconds
    sent = running = 0
    tensor = Tensor(name="x", datatype=DataType.DATA_TYPE_FP32, shape=[1, 30], data=b"\0" * 120)

    def send() -> None:
        nonlocal sent
        sent += 1
        began = time.perf_counter()
        request = PredictRequest(
            model="cancer", unit=f"user-{sent % 1000}", request_id=sent.to_bytes(16, "big"), inputs=[tensor]
        )

        def answered(reply: PredictReply) -> None:
            nonlocal running
            if reply.code:
                raise RuntimeError(reply.message)
            now = time.perf_counter()
            latencies.append(now - began)
            if now < end:
                send()
            else:
                running -= 1
                if not running:
                    done.set()

        calls.submit(request, loop.time() + 10, answered)

    start = time.perf_counter()
    for _ in range(concurrency):
        running += 1
        send()
    await done.wait()
    took = time.perf_counter() - start
    await calls.close()
    return len(latencies) / took, statistics.median(latencies) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--profile", default="", help="write a cProfile of the router here")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    serving = context.Process(target=worker, args=(theirs,), daemon=True)
    serving.start()
    worker_port = ours.recv()
    routing = context.Process(target=router, args=(theirs, worker_port, arguments.profile), daemon=True)
    routing.start()
    port = ours.recv()
    time.sleep(0.5)
    meter = psutil.Process(routing.pid)
    print("   c    items/s   p50 ms   router CPU per item")
    for concurrency in (1, 32, 128, 512):
        before = sum(meter.cpu_times()[:2])
        rate, median = uvloop.run(load(port, concurrency, arguments.seconds))
        spent = sum(meter.cpu_times()[:2]) - before
        per_item = spent / (rate * arguments.seconds) * 1e6
        print(f"{concurrency:>4} {rate:>10,.0f} {median:>8.2f}   {per_item:.1f} µs")
    ours.send("stop")
    routing.join(30)
    serving.kill()


if __name__ == "__main__":
    main()
