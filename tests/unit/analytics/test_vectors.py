"""Every published case, one test each, and the command itself."""

import dataclasses
import json
from pathlib import Path

import pytest

from tests.vectors.__main__ import main, problems
from tests.vectors.cases import Case, read

FILE = Path(__file__).parents[2] / "vectors" / "statistics.json"


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in read(FILE)])
def test_published_case(case: Case) -> None:
    assert problems(case) == []


def test_a_wrong_expectation_fails_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = json.loads(FILE.read_text())[:2]
    entries[0]["expected"]["t"] += 0.01
    file = tmp_path / "cases.json"
    file.write_text(json.dumps(entries))
    assert main([str(file)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{entries[0]['id']} (welch_t_test): t: ")
    assert lines[-1] == "1 passed, 1 failed"


def test_an_unknown_kind_and_other_data_fail_without_raising() -> None:
    case = next(case for case in read(FILE) if case.kind == "cuped")
    assert problems(dataclasses.replace(case, kind="tarot")) == ["no function answers the kind tarot"]
    other = {
        **case.inputs,
        "recipe_python": str(case.inputs["recipe_python"]).replace("default_rng(11)", "default_rng(12)"),
    }
    assert "the recipe made another" in problems(dataclasses.replace(case, inputs=other))[0]
