"""MLServer: a custom runtime, as its guide shows one. Adaptive batching joins requests before `predict`."""

from __future__ import annotations

import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

from benchmarks.servers.onnx_model import OnnxModel


class OnnxRuntime(MLModel):
    """One ONNX file behind the Open Inference Protocol."""

    async def load(self) -> bool:
        """Called once."""
        self.model = OnnxModel()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """One (possibly joined) request."""
        rows = NumpyCodec.decode_input(payload.inputs[0]).astype(np.float32, copy=False)
        answer = self.model.run(rows)
        return InferenceResponse(
            model_name=self.name, outputs=[NumpyCodec.encode_output(self.model.output, answer)]
        )
