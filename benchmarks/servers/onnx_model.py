"""The model as every peer runs it: ONNX Runtime on one thread, rows joined along the first dimension.

Runs in the peers' own environments: nothing but numpy and onnxruntime is imported here.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

Array = NDArray[Any]


class OnnxModel:
    """The file that BENCH_MODEL names, asked for the output BENCH_OUTPUT."""

    def __init__(self) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = ort.InferenceSession(
            os.environ["BENCH_MODEL"], options, providers=["CPUExecutionProvider"]
        )
        self.output = os.environ["BENCH_OUTPUT"]
        self.input = str(self._session.get_inputs()[0].name)

    def run(self, rows: Array) -> Array:
        """FP32 [n, ...] in, [n, ...] out."""
        answer: Array = self._session.run([self.output], {self.input: rows})[0]
        return answer

    def run_together(self, parts: list[Array]) -> list[Array]:
        """Several requests' rows in one run, each one's answer apart."""
        if len(parts) == 1:
            return [self.run(parts[0])]
        together = self.run(np.concatenate(parts))
        edges = np.cumsum([len(part) for part in parts])[:-1]
        return np.split(together, edges)
