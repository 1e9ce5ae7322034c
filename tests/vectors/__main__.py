"""`python -m tests.vectors FILE`: one line a failing case, then `N passed, N failed`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.vectors import drift, experiments
from tests.vectors.cases import problems, read

ANSWERS = experiments.ANSWERS | drift.ANSWERS
CHECKS = experiments.CHECKS | drift.CHECKS


def main(arguments: list[str]) -> int:
    """Run a file; 0 where every case passes."""
    parser = argparse.ArgumentParser(prog="python -m tests.vectors", description=__doc__)
    parser.add_argument("file", type=Path)
    cases = read(parser.parse_args(arguments).file)
    failed = 0
    for case in cases:
        found = problems(case, ANSWERS, CHECKS)
        if found:
            failed += 1
            print(f"{case.id} ({case.kind}): {'; '.join(found)}")  # noqa: T201 - what the command is for
    print(f"{len(cases) - failed} passed, {failed} failed")  # noqa: T201 - what the command is for
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
