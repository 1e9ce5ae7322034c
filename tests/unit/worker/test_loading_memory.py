"""That what a version gives back can be measured."""

from __future__ import annotations

from pathlib import Path

from services.worker.backends.onnx import load
from services.worker.backends.port import BackendOptions
from services.worker.loading import resident_bytes, return_freed_memory
from tests.fixtures.onnx_models import heavy


def test_a_closed_model_is_out_of_memory(tmp_path: Path) -> None:
    data, signature = heavy(features=8, width=2048, layers=3)
    size = len(data)
    (tmp_path / "model.onnx").write_bytes(data)
    del data
    load(tmp_path, signature, BackendOptions()).close()  # what the runtime itself takes, once
    return_freed_memory()
    before = resident_bytes()
    backend = load(tmp_path, signature, BackendOptions())
    loaded = resident_bytes()
    assert loaded - before > size * 0.7
    backend.close()
    return_freed_memory()
    assert resident_bytes() - before < size * 0.3
