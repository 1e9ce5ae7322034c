"""How many predictions per second the gateway's REST front takes, hot and through ASGI, and their ratio.

    python -m benchmarks.gateway_http [--seconds 4] [--connections 1,32,128]

One gateway process (uvloop) with key, rate limit, validation, metrics and request ids on; its router is a
channel in the same process that answers at once, so the figures are those of the front alone. `wrk` (one
thread, 30 floats per request) loads it; hot and ASGI alternate.

Measured on 2 shared cores with other work running (load 2 to 3), Python 3.11, uvicorn 0.54, uvloop 0.23,
load generator included, requests/s (p99):

    c=1     hot  7,800 (1.0 ms)   ASGI 3,400 (2.0 ms)    ratio 2.3
    c=32    hot 20,000 (7.9 ms)   ASGI 5,100 (38 ms)     ratio 3.9
    c=128   hot 25,700 (8.9 ms)   ASGI 3,900 (158 ms)    ratio 6.6

Where the time of a hot request goes (CPU µs, one connection in memory, no sockets; 17 to 20 in all beside
the channel): reading HTTP 4.2 (httptools itself 0.8), outer JSON 0.4, inner JSON to a tensor in a request
3.9 (msgspec 0.9, struct 0.3, protobuf 1.9), reply parsed 0.4, tensors to JSON 6.6 (numpy views 2, orjson
0.6), key 0.2, limit 0.3, id 0.4, metrics 0.2. With sockets, more than half of the process's time is in
`write` and `epoll_wait` of the kernel: one read and one write a request is the floor of HTTP/1.1 without
pipelining.

What was found and taken away: Python-level hashes of enum members and attributes of protobuf enums (each
dearer than the outer JSON), a numpy reduction for a single row, `tuple()` over a repeated field (a slice
costs half), a timer per request (the sweep costs nothing), a search for the first bracket by iteration.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import uvloop
from fastapi import FastAPI
from headrace.v1.control_pb2 import ApiKey, ServedVersion, ServingConfig
from headrace.v1.dataplane_pb2 import PredictReply, SealedReply
from headrace.v1.tensor_pb2 import Signature, Task, TensorSpec
from prometheus_client import CollectorRegistry

from services.common.clock import SystemClock
from services.common.frames.detached import Buffer
from services.common.lifecycle import serve_asgi
from services.common.telemetry import setup_tracing
from services.gateway.catalogue import Catalogue
from services.gateway.channel import OnReply
from services.gateway.hot.front import HotFront, HttpLimits
from services.gateway.hot.protocol import HotProtocol
from services.gateway.keys import KeyRing
from services.gateway.metrics import GatewayMetrics
from services.gateway.predict import PredictLimits, PredictService
from services.gateway.rest.door import install_errors
from services.gateway.rest.hot_routes import hot_routes
from services.gateway.router_client import RouterClient

FEATURES = 30
KEY = "hr_benchmarkkey_" + "b" * 43


class InstantChannel:
    """Answers everything that one loop turn brought at the next: the least a router could take."""

    usable = True
    in_flight = 0
    silent = False

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: list[tuple[int, OnReply]] = []
        self._last = 0
        reply = PredictReply(version="1", variant="1")
        reply.outputs.add(name="label", datatype="DATA_TYPE_INT64", shape=[1], data=struct.pack("<q", 1))
        reply.outputs.add(
            name="probabilities", datatype="DATA_TYPE_FP32", shape=[1, 2], data=struct.pack("<2f", 0.1, 0.9)
        )
        self._reply = reply.SerializeToString()

    def submit_raw(
        self,
        request: bytes,
        deadline: float | None,
        on_reply: OnReply,
        tensors: tuple[Buffer, ...] | None = None,
    ) -> int:
        """Answer the request soon."""
        self._last += 1
        if not self._waiting:
            self._loop.call_soon(self._answer)
        self._waiting.append((self._last, on_reply))
        return self._last

    def cancel(self, local_id: int) -> None:
        """Nothing is kept to cancel."""

    def _answer(self) -> None:
        waiting, self._waiting = self._waiting, []
        for _id, on_reply in waiting:
            on_reply(SealedReply.FromString(self._reply))


def signature() -> Signature:
    """A tabular classifier."""
    return Signature(
        inputs=[TensorSpec(name="x", datatype="DATA_TYPE_FP32", shape=[-1, FEATURES])],
        outputs=[
            TensorSpec(name="label", datatype="DATA_TYPE_INT64", shape=[-1]),
            TensorSpec(name="probabilities", datatype="DATA_TYPE_FP32", shape=[-1, 2]),
        ],
        batched=True,
        task=Task.TASK_CLASSIFICATION,
        probability_output="probabilities",
        classes=["malignant", "benign"],
    )


async def serve(*, hot: bool) -> None:
    """Serve until killed; the port is the first line of output."""
    from hashlib import sha256  # noqa: PLC0415 - only the server needs it

    clock, registry = SystemClock(), CollectorRegistry()
    keys, catalogue, metrics = KeyRing(clock), Catalogue(), GatewayMetrics(registry)
    record = ApiKey(
        key_sha256=sha256(KEY.encode()).digest(), scopes=["predict"], rate_per_second=1e6, burst=1_000_000
    )
    keys.apply(b"benchmarkkey", record.SerializeToString())
    config = ServingConfig(
        model="cancer",
        revision=1,
        versions=[ServedVersion(version="1", signature=signature(), weight=10_000)],
    )
    catalogue.apply(b"cancer", config.SerializeToString())
    tracing = setup_tracing("gateway", None)
    service = PredictService(
        catalogue=catalogue,
        keys=keys,
        router=RouterClient([InstantChannel()]),
        tracing=tracing,
        metrics=metrics,
        clock=clock,
        limits=PredictLimits(),
    )
    app = FastAPI()
    app.include_router(hot_routes(service))
    install_errors(app)
    front = HotFront(service, HttpLimits(), hot=hot)
    async with (
        front.sweeping(),
        serve_asgi(app, "127.0.0.1", 0, http=partial(HotProtocol, front)) as port,
    ):
        print(port, flush=True)
        await asyncio.Event().wait()


def load(port: int, connections: int, seconds: int, script: Path) -> tuple[float, str, int]:
    """Requests per second, p99 as wrk writes it, and failed requests."""
    wrk = shutil.which("wrk")
    if wrk is None:
        raise SystemExit("wrk is needed")
    command = [wrk, "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", str(script)]
    output = subprocess.run(
        [*command, f"http://127.0.0.1:{port}/v1/predict"], check=True, capture_output=True, text=True
    ).stdout
    rate = re.search(r"Requests/sec:\s+([\d.]+)", output)
    slowest = re.search(r"99%\s+(\S+)", output)
    failed = re.search(r"Non-2xx or 3xx responses: (\d+)", output)
    if rate is None or slowest is None:
        raise SystemExit(output)
    return float(rate[1]), slowest[1], int(failed[1]) if failed else 0


def main() -> None:
    """Alternate hot and ASGI and print both with their ratio."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    arguments.add_argument("--serve", choices=["hot", "asgi"])
    arguments.add_argument("--seconds", type=int, default=4)
    arguments.add_argument("--connections", default="1,32,128")
    chosen = arguments.parse_args()
    if chosen.serve:
        uvloop.run(serve(hot=chosen.serve == "hot"))
        return
    numbers = random.Random(0)
    row = [round(numbers.uniform(0, 30), 4) for _ in range(FEATURES)]
    body = json.dumps({"model": "cancer", "inputs": [row], "user_id": "u17"})
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "predict.lua"
        script.write_text(
            f"wrk.method='POST'\nwrk.body='{body}'\nwrk.headers['content-type']='application/json'\n"
            f"wrk.headers['authorization']='Bearer {KEY}'\n"
        )
        servers = {
            way: subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gateway_http", "--serve", way],
                stdout=subprocess.PIPE,
                text=True,
            )
            for way in ("hot", "asgi")
        }
        try:
            ports = {way: int(server.stdout.readline()) for way, server in servers.items() if server.stdout}
            for port in ports.values():
                load(port, 8, 1, script)
            for connections in (int(one) for one in chosen.connections.split(",")):
                found = {way: load(port, connections, chosen.seconds, script) for way, port in ports.items()}
                for way, (rate, slowest, failed) in found.items():
                    speed = f"{rate:>9.0f} requests/s  p99 {slowest:<8}"
                    print(f"c={connections:<4} {way:<5} {speed} failed {failed}")
                print(f"c={connections:<4} ratio {found['hot'][0] / found['asgi'][0]:>8.2f}")
        finally:
            for server in servers.values():
                server.kill()
                server.wait()


if __name__ == "__main__":
    main()
