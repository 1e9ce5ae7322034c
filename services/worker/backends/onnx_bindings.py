"""Small batches through buffers that ONNX Runtime knows already: no arrays, dictionaries and checks of names
for a run of a few microseconds."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import onnxruntime as ort
from headrace.v1.tensor_pb2 import DataType, Signature, TensorSpec

from services.worker.tensors import NUMPY_TYPES, Array, Buffer

# Beyond either, what is spared is nothing beside the run.
_MOST_ROWS = 64
_MOST_ROW_BYTES = 4096
# After so many failures in a row it is the buffers' fault: such as an output of another shape than promised.
_MOST_FAILURES = 8
_UNSUITED = (DataType.DATA_TYPE_BYTES, DataType.DATA_TYPE_BF16)


class Binding:
    """Buffers for one number of rows. For one run at a time."""

    def __init__(
        self,
        session: ort.InferenceSession,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        rows: int,
    ) -> None:
        self._session = session
        self._bound = session.io_binding()
        self._inputs: list[memoryview] = []
        self._outputs: list[tuple[Array, tuple[int, ...]]] = []
        for spec in inputs:
            array = _buffer(spec, rows)
            self._bound.bind_cpu_input(spec.name, array)
            self._inputs.append(array.reshape(-1).view(np.uint8).data)
        for spec in outputs:
            array = _buffer(spec, rows)
            self._bound.bind_output(
                spec.name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data
            )
            self._outputs.append((array, array.shape[1:]))

    def run(self, data: Sequence[Buffer]) -> list[tuple[bytes, tuple[int, ...]]]:
        """Bytes and shape of one row of every output. Raises whatever ONNX Runtime raises, ValueError where
        `data` has another length."""
        for view, given in zip(self._inputs, data, strict=True):
            view[:] = given
        self._session.run_with_iobinding(self._bound)
        return [(array.tobytes(), shape) for array, shape in self._outputs]


class Bindings:
    """Those of one session, made as they are needed. May be asked by several threads at once: each has a
    binding to itself while it runs."""

    def __init__(self, session: ort.InferenceSession, signature: Signature) -> None:
        self._session: ort.InferenceSession | None = session if _suits(signature) else None
        self._inputs = list(signature.inputs)
        self._outputs = list(signature.outputs)
        self._free: dict[int, list[Binding]] = {}
        self._failures = 0

    @property
    def offered(self) -> bool:
        """Whether any run may go this way."""
        return self._session is not None

    def run(self, data: Sequence[Buffer], rows: int) -> list[tuple[bytes, tuple[int, ...]]] | None:
        """All outputs, or None where it has to be done the usual way: for what is large or not of fixed size,
        and after a failure, whatever it was."""
        if self._session is None or rows > _MOST_ROWS:
            return None
        free = self._free.setdefault(rows, [])
        try:
            binding = free.pop() if free else Binding(self._session, self._inputs, self._outputs, rows)
            made = binding.run(data)
        except Exception:  # the usual way tells what is wrong, with the values or with these buffers
            self._failures += 1
            if self._failures >= _MOST_FAILURES:
                self.close()
            return None
        self._failures = 0
        free.append(binding)
        return made

    def close(self) -> None:
        """Let the session go; all runs go the usual way from now on."""
        self._session = None
        self._free.clear()


def _suits(signature: Signature) -> bool:
    """Whether inputs and outputs have one size for each number of rows, and a small one."""
    specs = [*signature.inputs, *signature.outputs]
    if not signature.batched or any(spec.datatype in _UNSUITED for spec in specs):
        return False
    if any(not spec.shape or any(size < 1 for size in spec.shape[1:]) for spec in specs):
        return False
    return (
        sum(prod(spec.shape[1:]) * NUMPY_TYPES[spec.datatype].itemsize for spec in specs) <= _MOST_ROW_BYTES
    )


def _buffer(spec: TensorSpec, rows: int) -> Array:
    return np.zeros((rows, *spec.shape[1:]), NUMPY_TYPES[spec.datatype])
