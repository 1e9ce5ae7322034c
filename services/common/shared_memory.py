"""Bytes in POSIX shared memory, read by who does not trust its owner.

Nothing is mapped: an owner may shorten its object at any time, and a process that touches a page beyond the
end of what it has mapped is killed. `pread` just comes back short. What it costs is one copy, of
the same size as the one out of a socket that it replaces."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from headrace.v1.dataplane_pb2 import PredictRequest

from services.common.errors import InvalidArgument

#: Where the C library keeps the objects of `shm_open`.
DIRECTORY: Final = Path("/dev/shm")  # noqa: S108 - its place is fixed
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
#: Semaphores of the C library, and what PostgreSQL keeps there: of no client, though of the same user.
_OTHERS: Final = ("sem.", "PostgreSQL.")


def in_shared_memory(request: PredictRequest) -> bool:
    """Whether an input of `request` lies there: what it holds may be another thing at any time, so that such
    a request can be sent again while its caller waits, and not be compared or remembered afterwards."""
    return any(tensor.HasField("shared_memory") for tensor in request.inputs)


def object_name(key: str, field: str) -> str:
    """The name of the object that a client calls `key`, as for `shm_open`: one slash in front, or none.

    Raises InvalidArgument naming `field`."""
    name = key.removeprefix("/")
    if not _NAME.fullmatch(name) or name.startswith(_OTHERS):
        raise InvalidArgument(f"{key[:80]!r} names no shared memory of a client", field=field)
    return name


def read(name: str, offset: int, nbytes: int, field: str) -> bytes:
    """`nbytes` bytes of the object from `offset`, as they are now.

    Raises InvalidArgument naming `field` where the object is gone or ends before them."""
    with _opened(name, field) as file:
        # Before memory is taken for what may not be there.
        if os.fstat(file).st_size < offset + nbytes:
            raise _shorter(name, field)
        data = os.pread(file, nbytes, offset)
    if len(data) != nbytes:
        raise _shorter(name, field)
    return data


@contextmanager
def _opened(name: str, field: str) -> Iterator[int]:
    try:
        # Whatever else a name may lead to, a link, a pipe without a writer, is not waited for or followed.
        file = os.open(DIRECTORY / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
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


def _shorter(name: str, field: str) -> InvalidArgument:
    return InvalidArgument(f"shared memory {name} ends before the tensor does", field=field)
