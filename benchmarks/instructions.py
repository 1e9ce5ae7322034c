"""Instructions per request, a figure that can be compared across machines: by `perf stat` where the machine
counts instructions, otherwise not at all."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any


def count_instructions() -> dict[str, Any]:
    """Instructions per part of Headrace, or why they cannot be counted."""
    if shutil.which("perf") is None:
        return {"absent": "`perf` is not installed."}
    said = subprocess.run(
        ["perf", "stat", "-x,", "-e", "instructions:u", "true"], capture_output=True, text=True, check=False
    )
    if said.returncode != 0 or "not supported" in said.stderr or "not counted" in said.stderr:
        return {"absent": "`perf stat -e instructions` is not supported on this machine (no counters)."}
    return {}
