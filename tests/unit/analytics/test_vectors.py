"""Every published case of the experiments side, one test each."""

import dataclasses
from pathlib import Path

import pytest

from tests.vectors.cases import Case, judged, problems, read
from tests.vectors.experiments import ANSWERS, CHECKS

FOLDER = Path(__file__).parents[2] / "vectors"
CASES = [case for case in read(FOLDER / "statistics.json") if case.kind in ANSWERS]
#: The same kinds with other options, computed with R and with GrowthBook's package.
VARIANTS = [case for case in read(FOLDER / "variants.json") if case.kind in ANSWERS]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
def test_published_case(case: Case) -> None:
    assert judged(case, ANSWERS, CHECKS) == ([], [])


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in VARIANTS])
def test_variant_of_a_published_case(case: Case) -> None:
    assert judged(case, ANSWERS, CHECKS) == ([], [])


def test_an_option_nobody_knows_is_named_where_the_numbers_differ() -> None:
    case = next(case for case in CASES if case.kind == "wilson_interval")
    odd = dataclasses.replace(case, inputs={**case.inputs, "alpha": 0.2, "moon_phase": "full"})
    assert problems(odd, ANSWERS, CHECKS)[-1] == "these inputs are not understood: moon_phase"


def test_a_mixture_is_given_by_its_best_time_or_by_itself() -> None:
    """The published rho is the one of S² / (2 (V + rho)): without v_opt it gives the same numbers."""
    case = next(case for case in CASES if case.kind == "msprt_always_valid_p")
    best = {name: value for name, value in case.inputs.items() if name != "rho_used"}
    by_rho = {name: value for name, value in case.inputs.items() if name not in ("v_opt", "alpha_opt")}
    for inputs in (best, by_rho):
        assert judged(dataclasses.replace(case, inputs=inputs), ANSWERS, CHECKS) == ([], [])
    for wrong, field in (
        ({"rho_used": None}, "v_opt"),
        ({"rho_used": [0.0]}, "rho_used"),
        ({"rho_used": [1.0, 2.0]}, "rho_used"),
    ):
        said = problems(dataclasses.replace(case, inputs=by_rho | wrong), ANSWERS, CHECKS)[0]
        assert said.startswith(f"ValueError: {field}: ")


def test_no_kind_lost_its_cases() -> None:
    assert {case.kind for case in CASES} == set(ANSWERS)


def test_an_unknown_kind_and_other_data_fail_without_raising() -> None:
    case = next(case for case in CASES if case.kind == "cuped")
    unknown = dataclasses.replace(case, kind="tarot")
    assert problems(unknown, ANSWERS, CHECKS) == ["no function answers the kind tarot"]
    recipe = str(case.inputs["recipe_python"]).replace("default_rng(11)", "default_rng(12)")
    other = dataclasses.replace(case, inputs={**case.inputs, "recipe_python": recipe})
    assert "the recipe made another" in problems(other, ANSWERS, CHECKS)[0]
