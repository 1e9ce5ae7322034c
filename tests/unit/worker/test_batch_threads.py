"""Batch threads step back, and nothing else of the process does."""

from __future__ import annotations

import os
import sys
import threading

from services.worker.batch.threads import batch_thread


def _niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_a_batch_thread_is_nicer_than_the_rest_of_the_process() -> None:
    before = _niceness()
    with batch_thread("batch-test") as thread:
        assert (thread.submit(_niceness).result() > before) == (sys.platform == "linux")
        assert thread.submit(lambda: threading.current_thread().name).result() == "batch-test_0"
    assert _niceness() == before
