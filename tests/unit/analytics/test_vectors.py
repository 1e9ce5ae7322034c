"""Every published case of the experiments side, one test each."""

import dataclasses
from pathlib import Path

import pytest

from tests.vectors.cases import Case, problems, read
from tests.vectors.experiments import ANSWERS, CHECKS

FILE = Path(__file__).parents[2] / "vectors" / "statistics.json"
CASES = [case for case in read(FILE) if case.kind in ANSWERS]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
def test_published_case(case: Case) -> None:
    assert problems(case, ANSWERS, CHECKS) == []


def test_no_kind_lost_its_cases() -> None:
    assert {case.kind for case in CASES} == set(ANSWERS)


def test_an_unknown_kind_and_other_data_fail_without_raising() -> None:
    case = next(case for case in CASES if case.kind == "cuped")
    unknown = dataclasses.replace(case, kind="tarot")
    assert problems(unknown, ANSWERS, CHECKS) == ["no function answers the kind tarot"]
    recipe = str(case.inputs["recipe_python"]).replace("default_rng(11)", "default_rng(12)")
    other = dataclasses.replace(case, inputs={**case.inputs, "recipe_python": recipe})
    assert "the recipe made another" in problems(other, ANSWERS, CHECKS)[0]
