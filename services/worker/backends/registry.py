"""Backends by the name that `ServedVersion.backend` carries. Imported on first use: a worker that serves no
embeddings needs no tokenizer."""

from __future__ import annotations

from importlib import import_module

from services.worker.backends.port import Load, LoadFailed

_LOADERS = {
    "onnx": "services.worker.backends.onnx",
    "embedding": "services.worker.backends.embedding",
}


def loader(name: str) -> Load:
    """The `load` of the backend called `name`. Raises LoadFailed for one that this worker does not have."""
    module = _LOADERS.get(name or "onnx")
    if module is None:
        raise LoadFailed(f"this worker has no backend {name}; it has {', '.join(sorted(_LOADERS))}")
    try:
        load: Load = import_module(module).load
    except ImportError as error:
        raise LoadFailed(f"backend {name} is not installed on this worker: {error}") from error
    return load
