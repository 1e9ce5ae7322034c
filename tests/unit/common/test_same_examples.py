"""Properties are tried on the same examples in every run (tests/fixtures/examples.py)."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def tried() -> list[tuple[int, str, float]]:
    seen: list[tuple[int, str, float]] = []

    @settings(max_examples=200, derandomize=True)
    @given(st.integers(), st.text(), st.floats(allow_nan=False))
    def note(number: int, text: str, share: float) -> None:
        seen.append((number, text, share))

    note()
    return seen


def test_examples_do_not_depend_on_what_is_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = tried()
    module = ModuleType("imported_meanwhile")
    module.__file__ = str(tmp_path / "imported_meanwhile.py")
    Path(module.__file__).write_text(f"A = {[*range(70_000, 71_000)]}\nB = 'a word of its own'\n")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert tried() == before
