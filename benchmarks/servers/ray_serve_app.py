"""Ray Serve: `@serve.batch` on one replica, on its high-throughput settings (see targets/ray_serve.py)."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import numpy as np
import orjson
import ray
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig
from starlette.requests import Request
from starlette.responses import Response

from benchmarks.servers.onnx_model import Array, OnnxModel


@serve.deployment(num_replicas=1, max_ongoing_requests=1024, ray_actor_options={"num_cpus": 1})
class Bench:
    """One ONNX file at /predict."""

    def __init__(self) -> None:
        self.model = OnnxModel()

    @serve.batch(max_batch_size=128, batch_wait_timeout_s=0.0005)
    async def predict(self, parts: list[Array]) -> list[Array]:
        """Requests that were gathered, each one's answer apart."""
        return self.model.run_together(parts)

    async def __call__(self, request: Request) -> Response:
        """One HTTP request."""
        body: dict[str, Any] = orjson.loads(await request.body())
        answer = await self.predict(np.asarray(body["input"], np.float32))
        return Response(
            orjson.dumps({"output": answer}, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json"
        )


if __name__ == "__main__":
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        configure_logging=False,
        object_store_memory=128 << 20,
        _temp_dir=os.environ["BENCH_RAY_DIR"],
    )
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=int(os.environ["BENCH_PORT"])))
    serve.run(
        Bench.bind(),  # type: ignore[attr-defined]  # the decorator's doing
        route_prefix="/predict",
        logging_config=LoggingConfig(enable_access_log=False, log_level="ERROR"),
    )
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    stop.wait()
    serve.shutdown()
    ray.shutdown()
