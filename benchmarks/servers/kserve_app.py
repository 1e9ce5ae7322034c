"""KServe's Python model server, V2 protocol. It has no batcher in the process: in a cluster its agent, a
sidecar written in Go, does that."""

from __future__ import annotations

import logging
import os

from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer

from benchmarks.servers.onnx_model import OnnxModel


class Bench(Model):
    """One ONNX file as the model `mlp`."""

    def __init__(self) -> None:
        super().__init__("mlp")
        self.load()

    def load(self) -> bool:
        """Called once."""
        self.model = OnnxModel()
        self.ready = True
        return True

    async def predict(
        self,
        payload: InferRequest,
        headers: dict[str, str] | None = None,
        response_headers: dict[str, str] | None = None,
    ) -> InferResponse:
        """One request."""
        answer = self.model.run(payload.inputs[0].as_numpy())
        output = InferOutput(self.model.output, list(answer.shape), "FP32")
        output.set_data_from_numpy(answer, binary_data=payload.use_binary_outputs)
        return InferResponse(payload.id or "", self.name, [output])


if __name__ == "__main__":
    server = ModelServer(
        http_port=int(os.environ["BENCH_PORT"]),
        grpc_port=int(os.environ["BENCH_GRPC_PORT"]),
        workers=1,
        enable_latency_logging=False,
        access_log_format=None,
    )
    # Making the server configures logging, access and timing lines included.
    for name in ("uvicorn.access", "kserve.trace"):
        logging.getLogger(name).setLevel(logging.WARNING)
    server.start([Bench()])
