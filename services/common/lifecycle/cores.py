"""Which core an event loop stays on, where each core of the machine has one that is alike.

Linux wakes a thread on the core that it last ran on unless another is idle, and one that runs what has a low
priority is not idle to it: two event loops then share one core for tens of milliseconds, while a reader of
events has the other for itself.
"""

from __future__ import annotations

import os
from contextlib import suppress

#: Where this process could run before one of its threads was told to stay.
_allowed: set[int] = set()


def cores_for(processes: int) -> list[int] | None:
    """A core for each of several processes that are alike; None where they are not exactly as many as the
    cores that this process may use. Fewer have better choices than cores that somebody else may have chosen
    as well, and one of more would share its core for good."""
    if processes < 2 or not hasattr(os, "sched_getaffinity"):
        return None
    allowed = sorted(os.sched_getaffinity(0))
    return allowed if len(allowed) == processes else None


def stay_on(core: int) -> None:
    """Keep the calling thread on `core`, where the system lets us. Threads that it starts from then on begin
    there; what they run may go elsewhere with `roam`."""
    with suppress(OSError, AttributeError):  # a container may have lost that core since
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {core})
        _allowed.update(allowed)


def roam() -> None:
    """Let the calling thread run on every core again that its process had: the initializer of thread pools
    whose work should not wait for the event loop's core."""
    if _allowed:
        with suppress(OSError):
            os.sched_setaffinity(0, _allowed)
