"""What `make up` registers: each example model, how its versions are made, and how traffic is split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from examples import cancer, digits, minilm

Built = tuple[list[Path], dict[str, float]]


@dataclass(frozen=True, slots=True)
class ExampleVersion:
    """One version: its name, its share of the traffic in percent, and what writes its files."""

    version: str
    weight: float
    build: Callable[[Path], Built]


@dataclass(frozen=True, slots=True)
class Example:
    """One model with its versions, the first being the champion."""

    name: str
    description: str
    versions: tuple[ExampleVersion, ...]
    backend: str = "onnx"


def _cancer(version: str) -> Callable[[Path], Built]:
    def build(directory: Path) -> Built:
        path, metrics = cancer.build(version, directory)
        return [path], metrics

    return build


def _digits(directory: Path) -> Built:
    path, metrics = digits.build(directory)
    return [path], metrics


def _minilm(directory: Path) -> Built:
    return minilm.build(directory), {}


EXAMPLES = (
    Example(
        "cancer",
        "Breast cancer diagnosis from 30 measurements: 1 is logistic regression, 2 gradient boosting",
        (ExampleVersion("1", 90, _cancer("1")), ExampleVersion("2", 10, _cancer("2"))),
    ),
    Example("digits", "Handwritten digits, 8×8 pixels", (ExampleVersion("1", 100, _digits),)),
    Example(
        "minilm",
        "Sentence embeddings by all-MiniLM-L6-v2, 384 dimensions",
        (ExampleVersion("1", 100, _minilm),),
        backend="embedding",
    ),
)
