"""`python -m benchmarks`: Headrace and its peers in one run; writes RESULTS.md. See README.md."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.environments import CACHE, REPOSITORY
from benchmarks.instructions import count_instructions, keep
from benchmarks.plan import PLANS, Plan
from benchmarks.report import FOLDER, write_report
from benchmarks.results import Results
from benchmarks.run import Benchmark
from benchmarks.targets.catalogue import ONLY_FULL, TARGETS
from deploy.embedded import native
from deploy.embedded.blueprint import python_path

BATCHING, INSTRUCTIONS = "batching efficiency", "instructions per request"
#: What counting takes: three processes start under callgrind, each many times slower than usual.
INSTRUCTIONS_S = 240.0
#: What batching.py takes, and each of its loops.
BATCHING_S = 100.0
BATCHING_LOOP_S = 3


def main() -> int:
    """Read the arguments, run, report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    plan = parser.add_mutually_exclusive_group()
    plan.add_argument("--full", dest="plan", action="store_const", const="full", help="everything (default)")
    plan.add_argument(
        "--quick", dest="plan", action="store_const", const="quick", help="30 floats only, under 8 minutes"
    )
    plan.add_argument("--smoke", dest="plan", action="store_const", const="smoke", help="does it work at all")
    plan.add_argument("--report", action="store_true", help="only write RESULTS.md anew from results.json")
    plan.add_argument("--install", action="store_true", help="only make the peers' environments")
    plan.add_argument(
        "--instructions", action="store_true", help="only count instructions, and add them to the report"
    )
    plan.add_argument(
        "--batching", action="store_true", help="only measure batching efficiency, and add it to the report"
    )
    plan.add_argument(
        "--keep-instructions", action="store_true", help="count them, and compare with these from now on"
    )
    parser.add_argument("--minutes", type=float, help="what the run may take; rounds are left out first")
    parser.add_argument("--only", default="", help=f"some of {','.join(TARGETS)}")
    parser.add_argument(
        "--out", type=Path, help="folder of the report (smoke: the cache, otherwise benchmarks/)"
    )
    given = parser.parse_args()
    chosen = PLANS[given.plan or "full"]
    if given.minutes:
        chosen = replace(chosen, budget_s=given.minutes * 60)
    folder = given.out or (CACHE / "smoke" if chosen.name == "smoke" else FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    if given.report or given.instructions or given.batching:
        results = Results.load(folder / "results.json")
        for what, wanted in ((BATCHING, given.batching), (INSTRUCTIONS, given.instructions)):
            if wanted:
                _EXTRAS[what][1](results)
                results.left_out = [other for other in results.left_out if other != what]
        results.save(folder / "results.json")
        write_report(results, folder)
        return 0
    if given.keep_instructions:
        print(keep(count_instructions()))
        return 0
    wanted = given.only.split(",") if given.only else list(TARGETS)
    unknown = set(wanted) - set(TARGETS)
    if unknown:
        parser.error(f"no such server: {', '.join(sorted(unknown))}")
    if not given.only and chosen.name != "full":
        wanted = [target for target in wanted if target not in ONLY_FULL]
    benchmark = Benchmark(chosen, {target: TARGETS[target]() for target in wanted})
    if given.install:
        benchmark.install()
        return 0
    try:
        benchmark.run(_extras(chosen) if "headrace" in wanted else {})
    finally:  # what was measured until then is kept
        benchmark.results.save(folder / "results.json")
    write_report(benchmark.results, folder)
    print(f"written: {folder / 'RESULTS.md'}")
    return 0


def _extras(plan: Plan) -> dict[str, tuple[float, Callable[[Results], None]]]:
    """Further measurements of the plan, with the seconds that each takes."""
    wanted = {BATCHING: plan.batching, INSTRUCTIONS: plan.instructions}
    return {what: extra for what, extra in _EXTRAS.items() if wanted[what]}


def _instructions(results: Results) -> None:
    results.instructions = count_instructions()


def _batching(results: Results) -> None:
    """What `python -m benchmarks.batching` prints, a line of JSON for each model, size of request and way."""
    print(BATCHING, flush=True)
    results.absent.pop("batching", None)  # of an attempt before
    argv = [sys.executable, "-m", "benchmarks.batching", "--seconds", str(BATCHING_LOOP_S)]
    copy = native.find()
    path = os.pathsep.join([str(copy), python_path()] if copy else [python_path()])
    environment = {**os.environ, "PYTHONPATH": path}
    try:
        done = subprocess.run(
            argv,
            cwd=copy or REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
    except subprocess.SubprocessError as error:
        results.absent["batching"] = f"batching efficiency: {error}"
        return
    for line in filter(lambda one: one.startswith("{"), done.stdout.splitlines()):
        said = json.loads(line)
        name = f"{said['model']}, {said['request_rows']:,} rows a request, {said['way']}"
        print(f"  {name}: {said['efficiency']:.1%}", flush=True)
        results.batching[name] = {
            "model": said["model"],
            "way": said["way"],
            "request_rows": said["request_rows"],
            "offline_rows_per_s": said["offline_rows_per_s"][str(said["best_rows"])],
            "offline_batch": said["best_rows"],
            "served_rows_per_s": said["served_rows_per_s"],
            "efficiency": said["efficiency"],
            "lowest": min(said["efficiencies"]),
            "highest": max(said["efficiencies"]),
        }


#: What is measured beside the servers, with the seconds that it takes.
_EXTRAS: dict[str, tuple[float, Callable[[Results], None]]] = {
    BATCHING: (BATCHING_S, _batching),
    INSTRUCTIONS: (INSTRUCTIONS_S, _instructions),
}


if __name__ == "__main__":
    sys.exit(main())
