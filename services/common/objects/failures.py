"""What the store's own errors mean to its callers."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from obstore.exceptions import (
    BaseError,
    InvalidPathError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from services.common.errors import Aborted, InvalidArgument, NotFound, ResourceExhausted, Unavailable

log = structlog.get_logger(__name__)

_FULL = {errno.ENOSPC, errno.EDQUOT}


def checked_path(path: str) -> str:
    """`path` itself. Raises InvalidArgument unless it is relative and stays inside the store."""
    if not path or "\0" in path or any(part in {"", ".", ".."} for part in path.split("/")):
        raise InvalidArgument(f"{path!r} is no path of an object.", field="path")
    return path


@contextmanager
def store_errors(path: str) -> Iterator[None]:
    """Turn errors of obstore and of the file system into ours; details go to the log."""
    try:
        yield
    except FileNotFoundError:
        raise NotFound(f"There is no object at {path}.") from None
    except InvalidPathError:
        raise InvalidArgument(f"{path!r} is no path of an object.", field="path") from None
    except PreconditionError as error:
        raise Aborted(f"The object at {path} was replaced while it was read.") from error
    except (PermissionDeniedError, UnauthenticatedError) as error:
        log.warning("artifact_store_refuses", path=path, reason=str(error))
        raise Unavailable("The artifact store refuses access; its credentials need a look.") from error
    except BaseError as error:
        log.warning("artifact_store_failed", path=path, reason=str(error))
        if "No space left on device" in str(error):
            raise ResourceExhausted("The disk of the artifact store is full.") from error
        raise Unavailable("The artifact store does not answer.", retry_after_ms=1000) from error
    except OSError as error:
        log.warning("artifact_store_failed", path=path, reason=str(error))
        if error.errno in _FULL:
            raise ResourceExhausted("The disk is full.") from error
        raise Unavailable(f"A file cannot be read or written: {error.strerror}.") from error
