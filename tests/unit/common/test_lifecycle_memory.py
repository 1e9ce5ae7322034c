"""Freed memory stays with a process of the data plane."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]

# Twenty blocks of a megabyte, twice: the second time asks how many pages had to be fetched again.
MEASURE = """
import resource, sys
from services.common.lifecycle import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def fill():
    blocks = [bytes([one]) * (1 << 20) for one in range(20)]
    del blocks
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill()
before = faults()
fill()
print(faults() - before)
"""


def fetched_again(mode: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, mode],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return int(done.stdout)


def test_freed_blocks_are_used_again_without_fetching_their_pages() -> None:
    kept, usual = fetched_again("keep"), fetched_again("usual")
    assert kept < 100
    assert usual > 1000
