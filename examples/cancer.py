"""Breast cancer diagnosis (569 patients, 30 measurements): logistic regression and gradient boosting.

Rows are cast to FP32 before training, as a request carries them, so that scikit-learn and ONNX Runtime see
the same numbers and a tree's threshold never falls between the two roundings.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray
from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

SEED = 7


class Classifier(Protocol):
    """The part of a scikit-learn classifier that is used here."""

    def fit(self, rows: NDArray[np.float32], labels: NDArray[np.int64]) -> object: ...
    def predict(self, rows: NDArray[np.float32]) -> NDArray[np.int64]: ...
    def score(self, rows: NDArray[np.float32], labels: NDArray[np.int64]) -> float: ...


@dataclass(frozen=True, slots=True)
class Data:
    """Rows FP32 [n, 30] and labels [n] (0 malignant, 1 benign), split once and for all."""

    columns: list[str]
    classes: list[str]
    train_rows: NDArray[np.float32]
    train_labels: NDArray[np.int64]
    held_out_rows: NDArray[np.float32]
    held_out_labels: NDArray[np.int64]


def load() -> Data:
    """The data set that scikit-learn ships, 60% for training and 40% held out."""
    bunch = load_breast_cancer()
    rows, labels = bunch.data.astype(np.float32), bunch.target.astype(np.int64)
    train, held_out, train_labels, held_out_labels = train_test_split(
        rows, labels, test_size=0.4, random_state=SEED, stratify=labels
    )
    return Data(
        columns=[str(name) for name in bunch.feature_names],
        classes=[str(name) for name in bunch.target_names],
        train_rows=train,
        train_labels=train_labels,
        held_out_rows=held_out,
        held_out_labels=held_out_labels,
    )


def train(version: str, data: Data) -> Classifier:
    """The classifier of version "1" (scaled logistic regression) or "2" (gradient boosting), fitted."""
    if version == "1":
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    else:
        model = GradientBoostingClassifier(n_estimators=60, max_depth=3, random_state=SEED)
    classifier = cast("Classifier", model)
    classifier.fit(data.train_rows, data.train_labels)
    return classifier


def build(version: str, directory: Path) -> tuple[Path, dict[str, float]]:
    """Write `model.onnx` of `version` into `directory`; gives its path and its held-out metrics."""
    data = load()
    classifier = train(version, data)
    model = to_onnx(
        classifier,
        initial_types=[("features", FloatTensorType([None, len(data.columns)]))],
        options={"zipmap": False},
        target_opset=18,
    )
    # The labels are positions in `classes`, so a row's answer can be given by name.
    properties = {
        "headrace.task": "classification",
        "headrace.prediction_output": "label",
        "headrace.probability_output": "probabilities",
        "headrace.classes": json.dumps(data.classes),
        "headrace.columns.features": json.dumps(data.columns),
    }
    for key, value in properties.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path, {"accuracy": float(classifier.score(data.held_out_rows, data.held_out_labels))}
