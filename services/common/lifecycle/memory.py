"""What the C library does with freed memory: the data plane keeps it, a reader of events gives it back."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Final

#: Of mallopt (malloc.h): give memory at the heap's end back from so much on; blocks from so much on come from
#: the system each time.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT_BYTES: Final = 64 << 20
_HEAP_BLOCK_BYTES: Final = 16 << 20
#: How many heaps threads share, at most.
_ARENA_MAX = -8
_BLOCKS_GIVEN_BACK: Final = 8 << 20


def keep_freed_memory() -> None:
    """Have glibc keep up to 64 MiB of freed memory for what comes next; does nothing elsewhere.

    It would give a tensor's memory back to the system when it is freed and fetch it anew for the next one,
    page by page: at half a megabyte that costs several times what copying the tensor does.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_MMAP_THRESHOLD, _HEAP_BLOCK_BYTES)


def give_freed_memory_back() -> None:
    """Have glibc share two heaps among all threads and take blocks of 8 MiB and more from the system, to
    which they go back when freed; does nothing elsewhere. Call it before any thread begins.

    Left to itself it keeps a heap for every thread that ever worked, each as large as the most that this
    thread once held, and after freeing one large block takes the next ones from those heaps, too. What a
    delivery under ordinary load takes is smaller, and kept: to fetch it anew, page by page, was a seventh of
    the process's time.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_ARENA_MAX, 2)
        mallopt(_MMAP_THRESHOLD, _BLOCKS_GIVEN_BACK)
        mallopt(_TRIM_THRESHOLD, 4 * _BLOCKS_GIVEN_BACK)
