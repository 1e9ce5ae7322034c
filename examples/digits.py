"""Handwritten digits (1,797 images of 8×8): a two-layer perceptron, its graph written from its weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnxscript import ir
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

from examples.graph import FLOAT, INT64, GraphWriter, typed, value

SEED = 7
OPSET = 18
BRIGHTEST = 16.0  # pixels run from 0 to 16


def load() -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
    """Images FP32 [n, 8, 8] with pixels from 0 to 16, and labels [n]: training part, held-out part."""
    bunch = load_digits()
    images, labels = bunch.images.astype(np.float32), bunch.target.astype(np.int64)
    train, held_out, train_labels, held_out_labels = train_test_split(
        images, labels, test_size=0.3, random_state=SEED, stratify=labels
    )
    return train, train_labels, held_out, held_out_labels


def train() -> MLPClassifier:
    """A perceptron with 64 hidden units, fitted on pixels scaled to 0 … 1."""
    images, labels, _, _ = load()
    perceptron = MLPClassifier(hidden_layer_sizes=(64,), max_iter=800, random_state=SEED)
    perceptron.fit(images.reshape(len(images), -1) / BRIGHTEST, labels)
    return perceptron


def to_graph(perceptron: MLPClassifier) -> ir.Graph:
    """`image` FP32 [n, 8, 8] → `digit` INT64 [n] and `probabilities` FP32 [n, 10]."""
    first, second = (kernel.astype(np.float32) for kernel in perceptron.coefs_)
    first_bias, second_bias = (bias.astype(np.float32) for bias in perceptron.intercepts_)
    writer = GraphWriter()
    image = value("image", FLOAT, ["n", 8, 8])
    pixels = writer.op("Flatten", image, axis=1)
    # The scale of the pixels is folded into the first kernel.
    kernel, bias = writer.constant("hidden", first / BRIGHTEST), writer.constant("hidden_bias", first_bias)
    hidden = writer.op("Relu", writer.op("Gemm", pixels, kernel, bias))
    kernel, bias = writer.constant("output", second), writer.constant("output_bias", second_bias)
    shares = writer.op("Softmax", writer.op("Gemm", hidden, kernel, bias), axis=-1)
    digit = writer.op("ArgMax", shares, axis=-1, keepdims=0)
    outputs = [typed(digit, "digit", INT64, ["n"]), typed(shares, "probabilities", FLOAT, ["n", 10])]
    return writer.graph("digits", OPSET, [image], outputs)


def build(directory: Path) -> tuple[Path, dict[str, float]]:
    """Write `model.onnx` into `directory`; gives its path and its held-out metrics."""
    perceptron = train()
    model = ir.Model(to_graph(perceptron), ir_version=10, producer_name="headrace-examples")
    model.metadata_props.update(
        {
            "headrace.task": "classification",
            "headrace.prediction_output": "digit",
            "headrace.probability_output": "probabilities",
            "headrace.classes": json.dumps([str(digit) for digit in range(10)]),
        }
    )
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "model.onnx"
    ir.save(model, path)
    _, _, images, labels = load()
    return path, {"accuracy": float(perceptron.score(images.reshape(len(images), -1) / BRIGHTEST, labels))}
