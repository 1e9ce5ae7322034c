"""Every published case of the drift side, one test each."""

from pathlib import Path

import pytest

from tests.vectors.cases import Case, judged, problems, read
from tests.vectors.drift import ANSWERS, CHECKS

FOLDER = Path(__file__).parents[2] / "vectors"
CASES = [case for case in read(FOLDER / "statistics.json") if case.kind in ANSWERS]
#: The same kinds with other options, computed with R.
VARIANTS = [case for case in read(FOLDER / "variants.json") if case.kind in ANSWERS]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
def test_published_case(case: Case) -> None:
    assert problems(case, ANSWERS, CHECKS) == []


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in VARIANTS])
def test_variant_of_a_published_case(case: Case) -> None:
    assert judged(case, ANSWERS, CHECKS) == ([], [])


def test_no_kind_lost_its_cases() -> None:
    assert {case.kind for case in CASES} == set(ANSWERS)
