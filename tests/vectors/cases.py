"""Cases of a vectors file: reading, running their recipes, comparing with what is expected."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

#: Inputs that describe the case and change no number.
ABOUT = frozenset(
    {
        *("note", "why", "checksums", "recipe", "recipe_python", "r_call", "definition", "variance", "unit"),
        *("risk_order", "equivalence", "rho_used", "columns", "shards", "nu", "prior_alpha"),
    }
)
#: Expected entries that are words for the reader, or that a kind's own check reads.
PROSE = frozenset({"must_hold", "accept", "why", "note"})


class Inputs(Mapping[str, Any]):
    """The inputs of a case, and which of them were looked at."""

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self._entries = entries
        self._seen: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        value = self._entries[name]
        self._seen.add(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    @property
    def unread(self) -> list[str]:
        """Options that nobody looked at. R's vectors may say again what other entries say."""
        twice = {"vectors"} if {"control", "users"} & set(self._entries) else set()
        return sorted(set(self._entries) - self._seen - ABOUT - twice)


@dataclass(frozen=True)
class Case:
    """One case. `data` holds the arrays that its recipe made, empty where it has none."""

    id: str
    kind: str
    source: str
    inputs: Mapping[str, Any]
    expected: Mapping[str, Any]
    tolerance: Mapping[str, Any]
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """Everything that may name the variant: the source, the definition, the call."""
        parts = [
            self.source,
            *(self.inputs.get(key, "") for key in ("definition", "r_call", "recipe", "shards")),
        ]
        return " ".join(str(part) for part in parts)

    def option(self, *names: str, default: str = "") -> str:
        """The first of `names` among the inputs, else where the source or the call says `name=value`; quotes
        are taken off."""
        for name in names:
            if self.inputs.get(name) is not None:
                return str(self.inputs[name]).strip("'\"")
        for name in names:
            named = rf"(?<![\w.]){re.escape(name)}\s*=\s*('[^']*'|\"[^\"]*\"|[^,)\s]+)"
            found = re.search(named, self.words)
            if found:
                return found.group(1).strip("'\"")
        return default

    def flag(self, name: str, *, default: bool = False) -> bool:
        """The same for a truth value, R's spellings included."""
        return self.option(name, default=str(default)).lower() in ("true", "t", "1", "1.0")

    def number(self, *names: str, default: float) -> float:
        """The first of `names` that is given as a number, by the inputs or by the words."""
        for name in names:
            try:
                return float(self.option(name))
            except ValueError:
                continue
        return default

    def pattern(self, expression: str, default: str) -> str:
        """The first group of a regular expression found in the words."""
        found = re.search(expression, self.words)
        return found.group(1) if found else default


#: What a kind computes: the values under the names of `expected`.
Answer = Callable[[Case], Mapping[str, Any]]
#: A kind's own comparison where tolerances alone do not say it: problems found, empty if none.
Check = Callable[[Case, Mapping[str, Any]], list[str]]


def read(path: Path) -> list[Case]:
    """The cases of a file, their recipes not yet run."""
    entries = json.loads(path.read_text())
    return [
        Case(
            id=entry["id"],
            kind=entry["kind"],
            source=entry.get("source", ""),
            inputs=entry["inputs"],
            expected=entry["expected"],
            tolerance=entry.get("tolerance", {}),
        )
        for entry in entries
    ]


def run_recipe(case: Case) -> dict[str, Any]:
    """Run the case's recipe with numpy as np. Raises ValueError where a checksum does not hold."""
    recipe = case.inputs.get("recipe_python")
    if recipe is None:
        return {}
    made: dict[str, Any] = {"np": np}
    exec(recipe, made)  # the file is the test's own input
    for name, checksum in case.inputs.get("checksums", {}).items():
        values = np.asarray(made[name])
        first = values.ravel()[: len(checksum["first3"])].astype(float)
        same = (
            list(values.shape) == list(checksum["shape"])
            and math.isclose(float(values.sum()), checksum["sum"], rel_tol=1e-9, abs_tol=1e-7)
            and np.allclose(first, checksum["first3"], rtol=1e-9)
        )
        if not same:
            raise ValueError(f"the recipe made another {name} than the file's author had")
    return made


def problems(case: Case, answers: Mapping[str, Answer], checks: Mapping[str, Check]) -> list[str]:
    """What is wrong with our answer to one case; empty where it passes. Never raises."""
    found, unread = judged(case, answers, checks)
    return [*found, f"these inputs are not understood: {', '.join(unread)}"] if found and unread else found


def judged(
    case: Case, answers: Mapping[str, Answer], checks: Mapping[str, Check]
) -> tuple[list[str], list[str]]:
    """What is wrong with our answer, and the options that it was found without looking at. Never raises."""
    inputs = Inputs(case.inputs)
    try:
        answer_of = answers.get(case.kind)
        if answer_of is None:
            return [f"no function answers the kind {case.kind}"], []
        ready = replace(case, inputs=inputs, data=run_recipe(case))
        return checks.get(case.kind, differences)(ready, answer_of(ready)), inputs.unread
    except Exception as error:  # one broken case must not hide the others
        return [f"{type(error).__name__}: {error}"], inputs.unread


def differences(case: Case, answer: Mapping[str, Any]) -> list[str]:
    """Where the answer leaves the tolerance of what is expected."""
    problems: list[str] = []
    for name, wanted in case.expected.items():
        if name in PROSE:
            continue
        if name not in answer:
            problems.append(f"{name}: no value")
            continue
        problems += _compare(name, wanted, answer[name], case.tolerance)
    return problems


#: What is below it is zero but for rounding.
_ROUNDING = 1e-15


def _compare(name: str, wanted: Any, found: Any, tolerance: Mapping[str, Any]) -> list[str]:
    if isinstance(wanted, Mapping):
        return [
            problem
            for key, value in wanted.items()
            for problem in _compare(f"{name}.{key}", value, found[key], tolerance)
        ]
    expected, actual = np.atleast_1d(wanted).astype(float), np.atleast_1d(found).astype(float)
    if expected.shape != actual.shape:
        return [f"{name}: {actual.size} values instead of {expected.size}"]
    allowed = np.maximum(
        float(tolerance.get("abs", 0.0)),
        float(tolerance.get("rel", 0.0 if "abs" in tolerance else 1e-6)) * np.abs(expected),
    )
    allowed[np.abs(expected) < _ROUNDING] = np.maximum(allowed[np.abs(expected) < _ROUNDING], _ROUNDING)
    with np.errstate(invalid="ignore"):
        wrong = ~(
            (np.abs(actual - expected) <= allowed)
            | (actual == expected)
            | (np.isnan(actual) & np.isnan(expected))
        )
    return [
        f"{name}: {actual[place]!r} instead of {expected[place]!r}" for place in np.flatnonzero(wrong)[:3]
    ]
