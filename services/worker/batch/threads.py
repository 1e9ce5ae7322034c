"""Threads for batch work, which step back for whatever answers requests."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

# One request crosses several processes of a machine, and in each of them would wait for its turn behind these
# threads. Not the lowest: one that holds the interpreter's lock must get on with it.
_NICE = 10


def batch_thread(name: str) -> ThreadPoolExecutor:
    """One thread that the scheduler gives little to while others want the processor (Linux only)."""
    return ThreadPoolExecutor(1, thread_name_prefix=name, initializer=_step_back)


def _step_back() -> None:
    if sys.platform == "linux":  # elsewhere a priority belongs to the whole process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
