"""ONNX models by ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from headrace.v1.tensor_pb2 import DataType, Signature, TensorSpec
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument as OrtInvalidArgument

from services.common.errors import InvalidArgument
from services.worker.backends.onnx_bindings import Bindings
from services.worker.backends.port import BackendOptions, LoadFailed, Padding
from services.worker.padding import declared_padding
from services.worker.tensors import Array, Buffer, datatype_name

_DATATYPES = {
    "tensor(bool)": DataType.DATA_TYPE_BOOL,
    "tensor(uint8)": DataType.DATA_TYPE_UINT8,
    "tensor(uint16)": DataType.DATA_TYPE_UINT16,
    "tensor(uint32)": DataType.DATA_TYPE_UINT32,
    "tensor(uint64)": DataType.DATA_TYPE_UINT64,
    "tensor(int8)": DataType.DATA_TYPE_INT8,
    "tensor(int16)": DataType.DATA_TYPE_INT16,
    "tensor(int32)": DataType.DATA_TYPE_INT32,
    "tensor(int64)": DataType.DATA_TYPE_INT64,
    "tensor(float16)": DataType.DATA_TYPE_FP16,
    "tensor(float)": DataType.DATA_TYPE_FP32,
    "tensor(double)": DataType.DATA_TYPE_FP64,
    "tensor(string)": DataType.DATA_TYPE_BYTES,
}


class OnnxBackend:
    """An ONNX Runtime session whose inputs and outputs are those of the signature."""

    device = "cpu"

    def __init__(
        self, session: ort.InferenceSession, signature: Signature, padding: Padding | None = None
    ) -> None:
        self.padding = padding
        self._bindings = Bindings(session, signature)
        self._session = session
        self._outputs = [spec.name for spec in signature.outputs]
        self._texts = [spec.name for spec in signature.inputs if spec.datatype == DataType.DATA_TYPE_BYTES]

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        names = outputs or self._outputs
        feed = inputs
        if self._texts:
            feed = {**inputs, **{name: _decoded(name, inputs[name]) for name in self._texts}}
        try:
            return dict(zip(names, self._session.run(names, feed), strict=True))
        except OrtInvalidArgument as error:
            # Such as an index outside of a Gather's data: the values are at fault, not the model.
            raise InvalidArgument(
                f"the model refuses the input: {_sentence(error)}", field="inputs"
            ) from error

    def run_kept(self, data: Sequence[Buffer], rows: int) -> list[tuple[bytes, tuple[int, ...]]] | None:
        return self._bindings.run(data, rows)

    def close(self) -> None:
        self._bindings.close()
        del self._session


def open_session(path: Path, options: BackendOptions) -> ort.InferenceSession:
    """A session for one model file. Raises LoadFailed."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    # Spinning threads take the cores that the event loop needs.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.add_session_config_entry("session.inter_op.allow_spinning", "0")
    # Its errors are raised, and logged by us as JSON; only what ends the process is left for it to say.
    settings.log_severity_level = 4
    try:
        return ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors share no base of their own
        raise LoadFailed(
            f"{path.name} is not a model that ONNX Runtime can load: {_sentence(error, path.parent)}"
        ) from error


def model_file(directory: Path) -> Path:
    """`model.onnx`, or the only ONNX file there is. Raises LoadFailed."""
    files = sorted(directory.rglob("*.onnx"))
    named = [path for path in files if path.name == "model.onnx"]
    chosen = named or files
    if len(chosen) != 1:
        found = ", ".join(str(path.relative_to(directory)) for path in files) or "none"
        raise LoadFailed(f"the artifact needs one model.onnx; ONNX files found: {found}")
    return chosen[0]


def load(directory: Path, signature: Signature, options: BackendOptions) -> OnnxBackend:
    """Load the ONNX file in `directory` and hold it against `signature`. Raises LoadFailed."""
    session = open_session(model_file(directory), options)
    _check("input", {node.name: node.type for node in session.get_inputs()}, signature.inputs, complete=True)
    _check(
        "output", {node.name: node.type for node in session.get_outputs()}, signature.outputs, complete=False
    )
    padding = declared_padding(
        session.get_modelmeta().custom_metadata_map,
        {node.name: node.shape for node in session.get_inputs()},
        {node.name: node.shape for node in session.get_outputs()},
        signature,
    )
    return OnnxBackend(session, signature, padding)


def _check(kind: str, graph: Mapping[str, str], specs: Sequence[TensorSpec], *, complete: bool) -> None:
    if not specs:
        raise LoadFailed(f"the signature names no {kind}s")
    for spec in specs:
        if spec.name not in graph:
            raise LoadFailed(f"the model has no {kind} {spec.name}; it has {', '.join(sorted(graph))}")
        if graph[spec.name].startswith("seq(map"):
            raise LoadFailed(f"{kind} {spec.name} is a list of maps; export the model with zipmap=False")
        have = _DATATYPES.get(graph[spec.name])
        if have is None:
            raise LoadFailed(f"{kind} {spec.name} has type {graph[spec.name]}, which is not served")
        if have != spec.datatype:
            raise LoadFailed(
                f"{kind} {spec.name} is {datatype_name(have)}, "
                f"the signature says {datatype_name(spec.datatype)}"
            )
    missing = set(graph) - {spec.name for spec in specs}
    if complete and missing:
        raise LoadFailed(f"the signature lacks the model's {kind} {', '.join(sorted(missing))}")


def _decoded(name: str, array: Array) -> Array:
    texts = np.empty(array.size, dtype=object)
    try:
        texts[:] = [element.decode() for element in array.flat]
    except UnicodeDecodeError:
        raise InvalidArgument(f"{name} is not UTF-8 text", field=f"inputs.{name}") from None
    return texts.reshape(array.shape)


def _sentence(error: BaseException, folder: Path | None = None) -> str:
    """The first line of ONNX Runtime's message, without the code in front, and without `folder`, which is
    nobody's business who may read why a model is not ready."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if folder is not None:
        text = text.replace(f"{folder}/", "")
    return text.split(" : ", 2)[-1][:300]
