"""Damaged model files: whatever happened to the bytes, the sender is told, and nothing else breaks."""

from __future__ import annotations

import tempfile
from pathlib import Path

from headrace.v1.tensor_pb2 import Signature
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import InvalidArgument
from services.registry.schemas import SignatureOverrides
from services.registry.signatures import describe
from tests.fixtures.onnx_files import classifier

WHOLE = classifier(metadata={"headrace.task": "classification", "headrace.columns.x": '["a", "b"]'})
CUT = st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 3), st.binary(max_size=3))


@settings(max_examples=300, deadline=None)
@given(cuts=st.lists(CUT, min_size=1, max_size=4))
def test_damage_is_refused_naming_the_files_or_harmless(cuts: list[tuple[int, int, bytes]]) -> None:
    content = bytearray(WHOLE)
    for at, removed, inserted in cuts:
        content[at : at + removed] = inserted
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(content)
        outcome = outcome_of(path)
    assert outcome == "files" or isinstance(outcome, Signature)


def outcome_of(path: Path) -> Signature | str | None:
    """The signature, whole enough to be stored and read again, or the field of the refusal."""
    try:
        signature = describe({"model.onnx": path}, "", SignatureOverrides()).signature
    except InvalidArgument as refused:
        return refused.field
    assert signature.outputs
    return Signature.FromString(signature.SerializeToString())
