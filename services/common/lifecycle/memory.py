"""What the C library does with memory that is freed, on the data plane."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Final

#: Of mallopt (malloc.h): give memory at the heap's end back from so much on; blocks from so much on come from
#: the system each time.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT_BYTES: Final = 64 << 20
_HEAP_BLOCK_BYTES: Final = 16 << 20


def keep_freed_memory() -> None:
    """Have glibc keep up to 64 MiB of freed memory for what comes next; does nothing elsewhere.

    It would give a tensor's memory back to the system when it is freed and fetch it anew for the next one,
    page by page: at half a megabyte that costs several times what copying the tensor does.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_MMAP_THRESHOLD, _HEAP_BLOCK_BYTES)
