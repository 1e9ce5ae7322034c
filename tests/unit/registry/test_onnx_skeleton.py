"""A model without its weights is the same model in everything else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from services.registry.onnx_skeleton import skeleton
from tests.fixtures.onnx_files import classifier, encoder, linear, value

LARGE = np.arange(4096, dtype=np.float32)


def forest(leaves: int) -> onnx.NodeProto:
    return helper.make_node(
        "TreeEnsembleRegressor", ["x"], ["t"], domain="ai.onnx.ml", target_weights=[0.5] * leaves
    )


def large_model() -> onnx.ModelProto:
    """Weights everywhere they can be: raw, typed, sparse, in a Constant, in a branch of an If."""
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(LARGE, "deep"))],
        "branch", [], [value("c", TensorProto.FLOAT, 4096)],
    )  # fmt: skip
    sparse = helper.make_sparse_tensor(
        helper.make_tensor("s", TensorProto.FLOAT, [4096], LARGE.tobytes(), raw=True),
        helper.make_tensor("i", TensorProto.INT64, [4096], list(range(4096))),
        [1 << 20],
    )
    graph = helper.make_graph(
        [
            forest(3000),
            helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(LARGE, "constant")),
            helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=branch),
        ],
        "large",
        [value("x", TensorProto.FLOAT, "n", 3), value("flag", TensorProto.BOOL)],
        [value("y", TensorProto.FLOAT, 4096)],
        [
            numpy_helper.from_array(LARGE, "raw"),
            helper.make_tensor("typed", TensorProto.FLOAT, [4096], LARGE.tolist()),
            helper.make_tensor("small", TensorProto.FLOAT, [2], [1.0, 2.0]),
        ],
        sparse_initializer=[sparse],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    model.metadata_props.add(key="headrace.task", value="x" * 10_000)
    return model


def without_payloads(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same by protobuf's own means."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    branches = [attribute.g for attribute in result.graph.node[2].attribute]
    constants = [result.graph.node[1].attribute[0].t]
    constants += [branch.node[0].attribute[0].t for branch in branches]
    sparse = result.graph.sparse_initializer[0]
    for tensor in (*constants, *result.graph.initializer, sparse.values, sparse.indices):
        if tensor.name != "small":
            for field in ("raw_data", "float_data", "int64_data"):
                tensor.ClearField(field)
    return result


def test_only_large_payloads_are_left_out(tmp_path: Path) -> None:
    model = large_model()
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    thin = onnx.load_model_from_string(skeleton(path))
    assert thin == without_payloads(model)
    assert len(skeleton(path)) < path.stat().st_size / 3


@pytest.mark.parametrize("content", [linear(), classifier(), encoder()])
def test_small_models_stay_as_they_are(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert skeleton(path) == content


@pytest.mark.parametrize("cut", [1, 100, 20_000, 40_000])
def test_a_file_that_is_cut_anywhere_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(large_model().SerializeToString()[:-cut])
    with pytest.raises(ValueError, match="cut short"):
        skeleton(path)


def nested(depth: int) -> bytes:
    """A graph in an attribute in a node in a graph …"""
    body = b"\x0a\xff\x3f" + b"x" * 8191
    for _ in range(depth):
        for key in (0x32, 0x2A, 0x0A):  # attribute.g, node.attribute, graph.node
            body = bytes([key]) + length(len(body)) + body
    return b"\x3a" + length(len(body)) + body


def length(size: int) -> bytes:
    encoded = b""
    while size > 0x7F:
        encoded += bytes([size & 0x7F | 0x80])
        size >>= 7
    return encoded + bytes([size])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"\x0b\x0c", "wire type"),
        (b"\x08" + b"\xff" * 11, "64 bits"),
        (nested(200), "too deep"),
    ],
)
def test_what_no_writer_of_models_makes_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        skeleton(path)
