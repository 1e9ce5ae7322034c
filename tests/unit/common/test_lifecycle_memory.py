"""Freed memory stays with a process of the data plane, and goes back from a reader of events."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]

# Four blocks of ten megabytes, twice: the second time asks how many pages had to be fetched again.
MEASURE = """
import resource, sys
from services.common.lifecycle import give_freed_memory_back, keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
if sys.argv[1] == "give":
    give_freed_memory_back()
if "large" in sys.argv:
    bytes(24 << 20)  # having freed a large block, the C library keeps twice as much of smaller ones
def fill():
    blocks = [bytes([one + 1]) * (10 << 20) for one in range(4)]
    del blocks
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill()
before = faults()
fill()
print(faults() - before)
"""


def fetched_again(*modes: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *modes],
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


def test_freed_blocks_are_given_back_whatever_was_freed_before() -> None:
    given_back, usual = fetched_again("give", "large"), fetched_again("usual", "large")
    assert given_back > 1000
    assert usual < 100
