"""`python -m benchmarks`: Headrace and its peers in one run; writes RESULTS.md. See README.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.environments import CACHE
from benchmarks.instructions import count_instructions
from benchmarks.plan import PLANS
from benchmarks.report import FOLDER, write_report
from benchmarks.results import Results
from benchmarks.run import Benchmark
from benchmarks.targets.catalogue import ONLY_FULL, TARGETS


def main() -> int:
    """Read the arguments, run, report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    plan = parser.add_mutually_exclusive_group()
    plan.add_argument(
        "--quick", dest="plan", action="store_const", const="quick", help="under 8 minutes (default)"
    )
    plan.add_argument(
        "--full", dest="plan", action="store_const", const="full", help="more of everything, hours"
    )
    plan.add_argument("--smoke", dest="plan", action="store_const", const="smoke", help="does it work at all")
    plan.add_argument("--report", action="store_true", help="only write RESULTS.md anew from results.json")
    parser.add_argument("--only", default="", help=f"some of {','.join(TARGETS)}")
    parser.add_argument(
        "--out", type=Path, help="folder of the report (smoke: the cache, otherwise benchmarks/)"
    )
    parser.add_argument("--install", action="store_true", help="only make the peers' environments")
    parser.add_argument(
        "--instructions", action="store_true", help="also count instructions (part of --full)"
    )
    given = parser.parse_args()
    name = given.plan or "quick"
    folder = given.out or (CACHE / "smoke" if name == "smoke" else FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    if given.report:
        write_report(Results.load(folder / "results.json"), folder)
        return 0
    wanted = given.only.split(",") if given.only else list(TARGETS)
    unknown = set(wanted) - set(TARGETS)
    if unknown:
        parser.error(f"no such server: {', '.join(sorted(unknown))}")
    if not given.only and name != "full":
        wanted = [target for target in wanted if target not in ONLY_FULL]
    benchmark = Benchmark(PLANS[name], {target: TARGETS[target]() for target in wanted})
    if given.install:
        benchmark.install()
        return 0
    results = benchmark.run()
    if "headrace" in wanted and (given.instructions or name == "full"):
        results.instructions = count_instructions()
    results.save(folder / "results.json")
    write_report(results, folder)
    print(f"written: {folder / 'RESULTS.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
