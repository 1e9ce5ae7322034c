"""Whether a model that was quick on the inputs of its warm-up is quick on all others of their shape."""

from __future__ import annotations

from pathlib import Path
from typing import Final

#: Operators of ONNX that go round as often, or make as much, as a value says that they are given.
_BY_VALUE: Final = (
    "Loop", "Scan", "Range", "Expand", "Tile", "ConstantOfShape", "Resize", "Upsample", "NonZero", "Pad",
    "RandomNormal", "RandomUniform", "SequenceMap",
)  # fmt: skip
#: How a node begins to name its operator: field 4 of NodeProto, and the name's length.
_MARKS: Final = {bytes((0x22, len(name))) + name.encode(): name for name in _BY_VALUE}


def unsteady(directory: Path) -> str:
    """The name of an operator of the artifact in `directory` whose time depends on values; empty: none is
    found. Looks at bytes, so weights may look like one by accident, which only leaves a model to others.
    Blocks while the files are read."""
    for path in directory.rglob("*.onnx"):
        content = path.read_bytes()
        for mark, name in _MARKS.items():
            if mark in content:
                return name
    return ""
