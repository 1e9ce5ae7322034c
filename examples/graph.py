"""Writing an ONNX graph node by node, as far as the examples need it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from onnxscript import ir
from onnxscript.ir import tape

FLOAT = ir.DataType.FLOAT
INT64 = ir.DataType.INT64


def typed(result: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    """The same value as a named output; a string in `shape` is a variable dimension."""
    result.name, result.type, result.shape = name, ir.TensorType(dtype), ir.Shape(shape)
    return result


def value(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    """A graph input; a string in `shape` is a variable dimension."""
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


class GraphWriter:
    """Collects nodes and constants; equal names are one constant."""

    def __init__(self) -> None:
        self._tape = tape.Tape()
        self._constants: dict[str, ir.Value] = {}

    def op(self, kind: str, *inputs: ir.Value, **attributes: int | float | list[int]) -> ir.Value:
        """Add one node with one output and give that output."""
        return self._tape.op(kind, list(inputs), attributes=attributes)

    def constant(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        """An initializer holding `array`."""
        if name not in self._constants:
            tensor = ir.tensor(np.ascontiguousarray(array), name=name)
            self._constants[name] = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        return self._constants[name]

    def integers(self, *values: int) -> ir.Value:
        """A one-dimensional INT64 constant."""
        return self.constant("i_" + "_".join(map(str, values)), np.array(values, dtype=np.int64))

    def number(self, number: float) -> ir.Value:
        """An FP32 scalar."""
        return self.constant(f"f_{number}", np.array(number, dtype=np.float32))

    def graph(self, name: str, opset: int, inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Graph:
        """Everything written so far as one graph."""
        return ir.Graph(
            inputs,
            outputs,
            nodes=self._tape.nodes,
            initializers=list(self._constants.values()),
            opset_imports={"": opset},
            name=name,
        )
