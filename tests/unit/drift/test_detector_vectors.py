"""Every published case of the drift side, one test each."""

from pathlib import Path

import pytest

from tests.vectors.cases import Case, problems, read
from tests.vectors.drift import ANSWERS, CHECKS

FILE = Path(__file__).parents[2] / "vectors" / "statistics.json"
CASES = [case for case in read(FILE) if case.kind in ANSWERS]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
def test_published_case(case: Case) -> None:
    assert problems(case, ANSWERS, CHECKS) == []


def test_no_kind_lost_its_cases() -> None:
    assert {case.kind for case in CASES} == set(ANSWERS)
