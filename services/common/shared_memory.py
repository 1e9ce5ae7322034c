"""Bytes in POSIX shared memory, read and written by who does not trust its owner.

Nothing is mapped here: an owner may shorten its object at any time, and a process that touches a page beyond
the end of what it has mapped is killed, unless it is guarded as in `worker/bus_errors.py`. `pread` just comes
back short. What it costs is one copy, of the same size as the one out of a socket that it replaces."""

from __future__ import annotations

import functools
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Final

from headrace.v1.dataplane_pb2 import PredictRequest

from services.common.errors import InvalidArgument

#: Where the C library keeps the objects of `shm_open`.
DIRECTORY: Final = Path("/dev/shm")  # noqa: S108 - its place is fixed
_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
#: Semaphores of the C library, and what PostgreSQL keeps there: of no client, though of the same user.
_OTHERS: Final = ("sem.", "PostgreSQL.")


def in_shared_memory(request: PredictRequest) -> bool:
    """Whether an input of `request` lies there: what it holds may be another thing at any time, so that such
    a request can be sent again while its caller waits, and not be compared or remembered afterwards."""
    for tensor in request.inputs:  # noqa: SIM110 - a generator costs more than what it goes through
        if tensor.HasField("shared_memory"):
            return True
    return False


def object_name(key: str, field: str) -> str:
    """The name of the object that a client calls `key`, as for `shm_open`: one slash in front, or none.

    Raises InvalidArgument naming `field`."""
    name = key.removeprefix("/")
    if not _NAME.fullmatch(name) or name.startswith(_OTHERS):
        raise InvalidArgument(f"{key[:80]!r} names no shared memory of a client", field=field)
    return name


@functools.cache
def boot() -> str:
    """Which machine this is, since when it runs; objects do not outlive it. Empty where the system does not
    say."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""


def inspect(name: str, field: str) -> tuple[int, int]:
    """The size in bytes of the object as it is now, and its identity: never 0, and another for an object of
    the same name that was made later, on another machine or in a container with a directory of its own.

    Raises InvalidArgument naming `field` where there is none that can be read."""
    with _opened(name, field, os.O_RDONLY) as file:
        status = os.fstat(file)
        return status.st_size, identity_of(status)


def read(name: str, offset: int, nbytes: int, field: str, identity: int = 0) -> bytes:
    """`nbytes` bytes of the object from `offset`, as they are now. `identity` 0: whatever has the name.

    Raises InvalidArgument naming `field` where the object is gone, another one, or ends before them."""
    with _opened(name, field, os.O_RDONLY) as file:
        # Before memory is taken for what may not be there.
        _check(file, name, offset + nbytes, field, identity)
        data = os.pread(file, nbytes, offset)
    if len(data) != nbytes:
        raise _shorter(name, field)
    return data


def write(name: str, offset: int, data: bytes | memoryview, field: str, identity: int = 0) -> None:
    """Put `data` into the object at `offset`.

    Raises InvalidArgument naming `field` where the object is gone, another one, or ends before the end of
    `data`; some of it may have been written only where memory ran out."""
    with _opened(name, field, os.O_RDWR) as file:
        # An object that is shortened just now is made longer again, which harms its owner only.
        _check(file, name, offset + len(data), field, identity)
        view = memoryview(data)
        while view:
            written = os.pwrite(file, view, offset)
            view, offset = view[written:], offset + written


@contextmanager
def _opened(name: str, field: str, how: int) -> Iterator[int]:
    try:
        # Whatever else a name may lead to, a link, a pipe without a writer, is not waited for or followed.
        file = os.open(DIRECTORY / name, how | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InvalidArgument(f"shared memory {name} cannot be opened: {reason}", field=field) from None
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise InvalidArgument(f"{name} is no shared memory", field=field)
        yield file
    except OSError as error:
        raise InvalidArgument(f"shared memory {name} cannot be used: {error.strerror}", field=field) from None
    finally:
        os.close(file)


def _check(file: int, name: str, end: int, field: str, identity: int) -> None:
    status = os.fstat(file)
    if identity and identity != identity_of(status):
        raise InvalidArgument(
            f"shared memory {name} is another object than was registered, or of another machine", field=field
        )
    if status.st_size < end:
        raise _shorter(name, field)


def identity_of(status: os.stat_result) -> int:
    """Of the object that `status` is of, as `inspect` gives it."""
    said = f"{boot()}:{status.st_dev}:{status.st_ino}"
    return int.from_bytes(blake2b(said.encode(), digest_size=8).digest()) | 1


def _shorter(name: str, field: str) -> InvalidArgument:
    return InvalidArgument(f"shared memory {name} ends before the tensor does", field=field)
