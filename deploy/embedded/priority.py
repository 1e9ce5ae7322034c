"""How those who read events make way for those who answer, where both share a machine."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from contextlib import suppress
from typing import Final

_NICE: Final = 19
#: Nanoseconds that one of them keeps a processor once somebody else wants it: the least that Linux takes
#: (since 6.12; before, nothing changes). With its own 3 ms, which the clock's tick makes 4, everybody whose
#: requests wait for that processor waits as long.
_SLICE_NS: Final = 100_000
#: `sched_setattr` has no function in older C libraries.
_SYSCALLS: Final = {"x86_64": 314, "aarch64": 274}
#: struct sched_attr in its first form: size, policy, flags, nice, priority, runtime, deadline, period.
_ATTRIBUTES: Final = struct.Struct("=IIQiIQQQ")
_LIBC: Final = ctypes.CDLL(None) if sys.platform == "linux" else None


def give_way(pid: int) -> None:
    """Put the process, and whatever threads it will start, behind all others. What the system does not allow
    is left."""
    with suppress(OSError):  # it may have ended already
        os.setpriority(os.PRIO_PROCESS, pid, _NICE)
    number = _SYSCALLS.get(platform.machine())
    if _LIBC is not None and number is not None:
        attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, os.SCHED_OTHER, 0, _NICE, 0, _SLICE_NS, 0, 0)
        _LIBC.syscall(number, pid, attributes, 0)
