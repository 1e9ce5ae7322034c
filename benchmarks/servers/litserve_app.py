"""LitServe: batching in the worker, requests handed over by its fast (ZeroMQ) queue.

Annotations are read by the server at run time, so they are not put off here.
"""

import os
from typing import Any

import litserve
import numpy as np

from benchmarks.servers.onnx_model import Array, OnnxModel


class Api(litserve.LitAPI):
    """One ONNX file at /predict."""

    def setup(self, device: str) -> None:
        """Called once in the worker."""
        self.model = OnnxModel()

    def decode_request(self, request: dict[str, Any]) -> Array:
        """Rows of one request."""
        return np.asarray(request["input"], np.float32)

    def batch(self, inputs: list[Array]) -> list[Array]:
        """Requests may have different numbers of rows: they are joined in `predict`."""
        return inputs

    def predict(self, x: list[Array]) -> list[Array]:
        """Answers in the order of the requests."""
        return self.model.run_together(x)

    def unbatch(self, output: list[Array]) -> list[Array]:
        """Already apart."""
        return output

    def encode_response(self, output: Array) -> dict[str, Any]:
        """JSON."""
        return {"output": output.tolist()}


if __name__ == "__main__":
    api = Api(max_batch_size=64, batch_timeout=float(os.environ.get("BENCH_BATCH_TIMEOUT_S", "0.0005")))
    server = litserve.LitServer(
        api, accelerator="cpu", devices=1, workers_per_device=1, fast_queue=True, timeout=30
    )
    server.run(
        host="127.0.0.1",
        port=int(os.environ["BENCH_PORT"]),
        num_api_servers=1,
        log_level="error",
        generate_client_file=False,
        access_log=False,
    )
