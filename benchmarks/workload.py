"""What is asked of every server: a model as ONNX bytes and a few hundred different requests of one shape."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from open_inference import open_inference_pb2 as oip_pb2

#: Different requests in rotation: many enough that no server answers from a cache by accident.
DISTINCT_REQUESTS = 256
HIDDEN = 64

Array = NDArray[Any]


class Dialect(Enum):
    """How a body says its tensor."""

    NATIVE = "native"
    V2_JSON = "v2-json"
    V2_BINARY = "v2-binary"
    PLAIN = "plain"
    #: ModelInfer of the Open Inference Protocol, tensors raw.
    GRPC = "grpc"


@dataclass(frozen=True, slots=True)
class Workload:
    """One model and its requests.

    `models` are the ONNX files of version 1 and 2, same signature; a peer serves the first. `inputs` is FP32
    [requests, rows, ...]: what each of the requests in rotation carries.
    """

    name: str
    title: str
    models: tuple[bytes, ...]
    inputs: Array
    #: The output that is asked for and checked.
    output: str
    sessions: list[ort.InferenceSession] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Rows per request."""
        return int(self.inputs.shape[1])

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return tuple(int(size) for size in self.inputs.shape[2:])

    @property
    def input(self) -> str:
        """Name of the model's input."""
        return str(self.session(0).get_inputs()[0].name)

    @property
    def output_dims(self) -> tuple[int, ...]:
        """Shape of one row of the answer."""
        return self.expected(0, 0).shape[1:]

    def session(self, version: int) -> ort.InferenceSession:
        """ONNX Runtime on model number `version`, threads as every server has them."""
        if not self.sessions:
            self.sessions.extend(
                ort.InferenceSession(model, session_options(), providers=["CPUExecutionProvider"])
                for model in self.models
            )
        return self.sessions[version]

    def expected(self, version: int, request: int) -> Array:
        """What version number `version` must answer to request number `request`."""
        answer: Array = self.session(version).run([self.output], {self.input: self.inputs[request]})[0]
        return answer

    def body(self, dialect: Dialect, request: int, model: str) -> tuple[bytes, tuple[tuple[str, str], ...]]:
        """The body of request number `request`, and the headers that it needs."""
        tensor = self.inputs[request]
        if dialect is Dialect.V2_BINARY:
            return self._binary(tensor)
        if dialect is Dialect.GRPC:
            return self._message(tensor, model), ()
        data = np.round(tensor.astype(np.float64), 4)
        said: dict[str, Any]
        if dialect is Dialect.NATIVE:
            said = {"model": model, "inputs": data.tolist(), "user_id": f"u{request}"}
        elif dialect is Dialect.V2_JSON:
            flat = data.reshape(-1).tolist()
            said = {
                "inputs": [
                    {"name": self.input, "shape": list(tensor.shape), "datatype": "FP32", "data": flat}
                ],
                "outputs": [{"name": self.output}],
            }
        else:
            said = {"input": data.tolist()}
        return json.dumps(said, separators=(",", ":")).encode(), (("Content-Type", "application/json"),)

    def _binary(self, tensor: Array) -> tuple[bytes, tuple[tuple[str, str], ...]]:
        raw = tensor.tobytes()
        described = {
            "name": self.input,
            "shape": list(tensor.shape),
            "datatype": "FP32",
            "parameters": {"binary_data_size": len(raw)},
        }
        head = json.dumps(
            {"inputs": [described], "outputs": [{"name": self.output}]}, separators=(",", ":")
        ).encode()
        return head + raw, (
            ("Content-Type", "application/octet-stream"),
            ("Inference-Header-Content-Length", str(len(head))),
        )

    def _message(self, tensor: Array, model: str) -> bytes:
        described = oip_pb2.ModelInferRequest.InferInputTensor(
            name=self.input, datatype="FP32", shape=list(tensor.shape)
        )
        wanted = oip_pb2.ModelInferRequest.InferRequestedOutputTensor(name=self.output)
        message = oip_pb2.ModelInferRequest(
            model_name=model, inputs=[described], outputs=[wanted], raw_input_contents=[tensor.tobytes()]
        )
        return message.SerializeToString()


def session_options() -> ort.SessionOptions:
    """One thread, no spinning: the same for everybody."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _graph(
    name: str,
    nodes: list[onnx.NodeProto],
    row: tuple[int, ...],
    classes: int,
    weights: dict[str, Array],
    shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> bytes:
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *row])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", classes])],
        [
            *[numpy_helper.from_array(values.astype(np.float32), key) for key, values in weights.items()],
            *[numpy_helper.from_array(np.array(shape, np.int64), key) for key, shape in shapes.items()],
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def mlp(seed: int, features: int = 30) -> bytes:
    """`features`→64→2 with softmax: a model so small that serving is all that is measured."""
    rng = np.random.default_rng(seed)
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w2"], ["c"]),
        helper.make_node("Softmax", ["c"], ["y"]),
    ]
    weights = {"w1": rng.normal(size=(features, HIDDEN)) * 0.1, "w2": rng.normal(size=(HIDDEN, 2)) * 0.1}
    return _graph("mlp", nodes, (features,), 2, weights)


def pooled_image(seed: int) -> bytes:
    """3×224×224 → mean per channel → 10 classes: next to no computing, so that the payload is measured."""
    rng = np.random.default_rng(seed)
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["m"]),
        helper.make_node("Softmax", ["m"], ["y"]),
    ]
    return _graph("image", nodes, (3, 224, 224), 10, {"w": rng.normal(size=(3, 10))})


def busy(seed: int, milliseconds: float = 2.0) -> bytes:
    """30→2 by way of convolutions that keep one core busy for about `milliseconds` a row on today's machines,
    however many rows run together: the model is what limits, not the serving."""
    rng = np.random.default_rng(seed)
    channels = max(4, round(80 * milliseconds**0.5))
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["flat"]),
        helper.make_node("Reshape", ["flat", "image_shape"], ["image"]),
        helper.make_node("Conv", ["image", "k1"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "k2"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "w2"], ["m"]),
        helper.make_node("Softmax", ["m"], ["y"]),
    ]
    weights = {
        "w1": rng.normal(size=(30, 784)) * 0.1,
        "k1": rng.normal(size=(channels, 1, 3, 3)) * 0.1,
        "k2": rng.normal(size=(channels, channels, 3, 3)) * 0.1,
        "w2": rng.normal(size=(channels, 2)),
    }
    return _graph("busy", nodes, (30,), 2, weights, {"image_shape": (-1, 1, 28, 28)})


def _random_inputs(requests: int, rows: int, row: tuple[int, ...]) -> Array:
    rng = np.random.default_rng(42)
    # What four decimals say exactly, so that JSON and binary requests carry the same numbers.
    return np.round(rng.normal(size=(requests, rows, *row)), 4).astype(np.float32)


def mlp_workload(rows: int = 1) -> Workload:
    """30 floats a row, `rows` rows a request."""
    name = "mlp" if rows == 1 else f"mlp-{rows}-rows"
    title = "30 floats" if rows == 1 else f"{rows} rows of 30 floats"
    return Workload(name, title, (mlp(0), mlp(1)), _random_inputs(DISTINCT_REQUESTS, rows, (30,)), "y")


def image_workload() -> Workload:
    """An image of 224×224×3 a request."""
    models = (pooled_image(0), pooled_image(1))
    return Workload("image", "224×224×3 image", models, _random_inputs(4, 1, (3, 224, 224)), "y")


def busy_workload() -> Workload:
    """30 floats a row, about two milliseconds of computing each: what overload is shown with."""
    inputs = _random_inputs(DISTINCT_REQUESTS, 1, (30,))
    return Workload("busy", "30 floats, 2 ms of computing", (busy(0), busy(1)), inputs, "y")


def cancer_workload(folder: Path) -> Workload:
    """The example on real data: logistic regression (90%) and gradient boosting (10%), the held-out rows."""
    from examples import cancer  # noqa: PLC0415 - the training libraries take seconds to import

    models = tuple(cancer.build(version, folder / version)[0].read_bytes() for version in ("1", "2"))
    rows = np.round(cancer.load().held_out_rows[:DISTINCT_REQUESTS].astype(np.float64), 4)
    inputs = rows.astype(np.float32)[:, None, :]
    return Workload("cancer", "cancer example, 30 floats", models, inputs, "probabilities")


WORKLOADS: dict[str, Callable[[Path], Workload]] = {
    "mlp": lambda _folder: mlp_workload(),
    "mlp-100-rows": lambda _folder: mlp_workload(100),
    "image": lambda _folder: image_workload(),
    "busy": lambda _folder: busy_workload(),
    "cancer": cancer_workload,
}
