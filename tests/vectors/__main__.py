"""`python -m tests.vectors FILE`: one line a failing case, then `N passed, N failed`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from tests.vectors import drift, experiments
from tests.vectors.cases import Case, differences, read, run_recipe

ANSWERS = experiments.ANSWERS | drift.ANSWERS
CHECKS = experiments.CHECKS | drift.CHECKS


def problems(case: Case) -> list[str]:
    """What is wrong with our answer to one case; empty where it passes. Never raises."""
    try:
        answer_of = ANSWERS.get(case.kind)
        if answer_of is None:
            return [f"no function answers the kind {case.kind}"]
        ready = replace(case, data=run_recipe(case))
        answer = answer_of(ready)
        return CHECKS.get(case.kind, differences)(ready, answer)
    except Exception as error:  # one broken case must not hide the others
        return [f"{type(error).__name__}: {error}"]


def main(arguments: list[str]) -> int:
    """Run a file; 0 where every case passes."""
    parser = argparse.ArgumentParser(prog="python -m tests.vectors", description=__doc__)
    parser.add_argument("file", type=Path)
    cases = read(parser.parse_args(arguments).file)
    failed = 0
    for case in cases:
        found = problems(case)
        if found:
            failed += 1
            print(f"{case.id} ({case.kind}): {'; '.join(found)}")  # noqa: T201 - what the command is for
    print(f"{len(cases) - failed} passed, {failed} failed")  # noqa: T201 - what the command is for
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
