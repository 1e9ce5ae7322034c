"""What keeps a client that shortens its shared memory from ending a process that has it mapped.

Who touches a mapped page that its object does not have any more is sent SIGBUS, and no check beforehand
excludes that. Here the signal's handler puts zeros in the place of what is gone, and the read goes on.

The handler is Python, called through ctypes in the midst of the instruction that failed. That is sound here,
as it would not be for a signal that comes at any time: it is the reading thread's own, raised by nothing but
a load from such a mapping, and whoever loads from one (a model's kernels, a copy) holds no lock then that the
handler needs. A thread that had given the interpreter up takes it for as long as the handler runs. What is
not ours goes to whatever handled the signal before.
"""

from __future__ import annotations

import ctypes
import mmap
import signal
import sys
import threading
import weakref
from typing import Any, Final

import numpy as np

_PAGE: Final = mmap.PAGESIZE
_SA_SIGINFO: Final = 4
#: The object ends before the address. Other codes tell of broken hardware.
_BUS_ADRERR: Final = 2
_MAP_FIXED: Final = 0x10
_FAILED: Final = ctypes.c_void_p(-1).value


class _SigInfo(ctypes.Structure):
    """What Linux's siginfo_t begins with, on machines of 64 bits."""

    _fields_ = (
        ("signo", ctypes.c_int),
        ("errno", ctypes.c_int),
        ("code", ctypes.c_int),
        ("padding", ctypes.c_int),
        ("address", ctypes.c_size_t),
    )


class _SigAction(ctypes.Structure):
    """The C library's `struct sigaction` there, and room for a larger one."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
        ("spare", ctypes.c_ulong * 8),
    )


class Mapped(mmap.mmap):
    """An object mapped for reading. It changes as its owner changes it; once `shortened`, what lay beyond its
    new end reads as zeros for good."""

    shortened = False


#: Where each begins. Weak references to instances of a subclass end before what is mapped is unmapped.
_guarded: dict[int, weakref.ref[Mapped]] = {}
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
)  # fmt: skip
_libc.sigaction.argtypes = (ctypes.c_int, ctypes.POINTER(_SigAction), ctypes.POINTER(_SigAction))
_installing = threading.Lock()
_before: _SigAction | None = None


def map_guarded(file: int, nbytes: int) -> Mapped:
    """The first `nbytes` bytes of the object that is open as `file`, for reading; what views it keeps it.

    Raises OSError or ValueError where it cannot be mapped, or not be guarded."""
    _install()
    mapped = Mapped(file, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    address = np.frombuffer(mapped, np.uint8).ctypes.data
    _guarded[address] = weakref.ref(mapped, lambda _gone: _guarded.pop(address, None))
    return mapped


def _install() -> None:
    """Handle the signal from now on, for as long as the process runs."""
    global _before  # noqa: PLW0603 - a process has one handler of a signal
    with _installing:
        if _before is not None:
            return
        if sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != 8:
            raise OSError("nothing is guarded on this system")
        ours = _SigAction(handler=ctypes.cast(_handler, ctypes.c_void_p).value, flags=_SA_SIGINFO)
        before = _SigAction()
        if _libc.sigaction(signal.SIGBUS, ctypes.byref(ours), ctypes.byref(before)):
            raise OSError(ctypes.get_errno(), "the signal cannot be handled")
        _before = before


def _on_bus_error(_signal: int, info: int, _context: object) -> None:
    mended = False
    try:
        said = _SigInfo.from_address(info)
        mended = said.code == _BUS_ADRERR and _fill(said.address)
    finally:
        if not mended:
            # The instruction is tried again, and then meets whoever handled the signal before.
            _libc.sigaction(signal.SIGBUS, ctypes.byref(_before) if _before is not None else None, None)


def _fill(address: int) -> bool:
    """Put zeros at `address`, and behind it to the end of the mapping that it is part of; False where it is
    part of none."""
    for begin, known in list(_guarded.items()):
        mapped = known()
        if mapped is not None and begin <= address < begin + len(mapped):
            page = address & -_PAGE
            end = begin + (len(mapped) + _PAGE - 1 & -_PAGE)
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
            mapped.shortened = True
            return bool(_libc.mmap(page, end - page, mmap.PROT_READ, flags, -1, 0) != _FAILED)
    return False


_handler: Any = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(_on_bus_error)
