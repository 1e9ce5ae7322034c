"""`python -m tests.vectors FILE`: every kind is answered, failures are named, the last line counts."""

import json
from pathlib import Path

import pytest

from tests.vectors.__main__ import ANSWERS, main
from tests.vectors.cases import read

FILE = Path(__file__).parents[1] / "vectors" / "statistics.json"


def test_every_kind_of_the_file_is_answered() -> None:
    assert {case.kind for case in read(FILE)} == set(ANSWERS)


def test_a_wrong_expectation_fails_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = json.loads(FILE.read_text())[:2]
    file = tmp_path / "cases.json"
    file.write_text(json.dumps(entries))
    assert main([str(file)]) == 0
    assert capsys.readouterr().out == "2 passed, 0 failed\n"
    entries[0]["expected"]["t"] += 0.01
    file.write_text(json.dumps(entries))
    assert main([str(file)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{entries[0]['id']} (welch_t_test): t: ")
    assert lines[-1] == "1 passed, 1 failed"
