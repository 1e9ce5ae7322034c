"""One supervisor per home: a file lock that the kernel releases when its last holder is gone."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

#: How long `acquire` tries: `held` has the lock for an instant, a supervisor for as long as it lives.
PATIENCE_S = 0.5


def acquire(path: Path) -> int | None:
    """An open descriptor that holds the lock, or None where somebody else does."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + PATIENCE_S
    while not _locked(descriptor, fcntl.LOCK_EX):
        if time.monotonic() > deadline:
            os.close(descriptor)
            return None
        time.sleep(0.01)
    return descriptor


def held(path: Path) -> bool:
    """Whether a supervisor, or what is left of one, holds the lock. Never keeps one from starting."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _locked(descriptor, fcntl.LOCK_SH)  # shared: two who ask do not see each other
    finally:
        os.close(descriptor)


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
