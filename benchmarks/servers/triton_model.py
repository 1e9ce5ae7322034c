"""Triton, Python backend: `execute` gets what the dynamic batcher gathered."""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as triton

from benchmarks.servers.onnx_model import OnnxModel


class TritonPythonModel:
    """The class that Triton looks for."""

    def initialize(self, _args: dict[str, str]) -> None:
        """Called once."""
        self.model = OnnxModel()

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response per request, in order."""
        name = self.model.input
        parts = [triton.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
        return [
            triton.InferenceResponse([triton.Tensor(self.model.output, answer)])
            for answer in self.model.run_together(parts)
        ]
