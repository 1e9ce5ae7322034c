"""BentoML: a batchable endpoint, so that its adaptive batching dispatcher joins requests.

Annotations are read by the server at run time, so they are not put off here.
"""

from typing import Annotated

import bentoml
import numpy as np
from bentoml.validators import DType

from benchmarks.servers.onnx_model import OnnxModel

Rows = Annotated[np.ndarray, DType("float32")]


@bentoml.service(workers=1, traffic={"timeout": 30}, logging={"access": {"enabled": False}})
class Bench:
    """One ONNX file at /predict."""

    def __init__(self) -> None:
        self.model = OnnxModel()

    @bentoml.api(batchable=True, max_batch_size=128, max_latency_ms=1000)
    def predict(self, input: Rows) -> Rows:  # noqa: A002 - the name is the body's key
        """Rows in, answers out."""
        return self.model.run(input)
