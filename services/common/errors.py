"""Errors that carry a domain code; each transport maps the code once (`problems.py`, `grpc_server.py`)."""

from __future__ import annotations

from headrace.v1.tensor_pb2 import Code


class HeadraceError(Exception):
    """A failure that its caller may be told about.

    `message` is one sentence for the caller, without internals. `field` names the input it is about
    (`inputs.x`, `weights[1]`), None where it is about no single one. `retry_after_ms` is set where trying
    again later can help.
    """

    code: Code = Code.CODE_INTERNAL

    def __init__(self, message: str, *, field: str | None = None, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_ms = retry_after_ms


class InvalidArgument(HeadraceError):
    """The request itself is wrong and stays wrong."""

    code = Code.CODE_INVALID_ARGUMENT


class Unauthenticated(HeadraceError):
    """No key, or one that is not known, expired or revoked."""

    code = Code.CODE_UNAUTHENTICATED


class PermissionDenied(HeadraceError):
    """The key is good but lacks the scope or the model."""

    code = Code.CODE_PERMISSION_DENIED


class NotFound(HeadraceError):
    """The thing named does not exist."""

    code = Code.CODE_NOT_FOUND


class AlreadyExists(HeadraceError):
    """The name is taken by something else."""

    code = Code.CODE_ALREADY_EXISTS


class Aborted(HeadraceError):
    """Somebody else changed it meanwhile; read it again and retry."""

    code = Code.CODE_ABORTED


class FailedPrecondition(HeadraceError):
    """The request is fine, the state it meets is not."""

    code = Code.CODE_FAILED_PRECONDITION


class ResourceExhausted(HeadraceError):
    """A limit or a full queue; nothing was started."""

    code = Code.CODE_RESOURCE_EXHAUSTED


class DeadlineExceeded(HeadraceError):
    """The deadline passed, or cannot be met any more."""

    code = Code.CODE_DEADLINE_EXCEEDED


class Unavailable(HeadraceError):
    """Nobody can answer now; trying again may help."""

    code = Code.CODE_UNAVAILABLE


class Cancelled(HeadraceError):
    """Nobody waits for the answer any more."""

    code = Code.CODE_CANCELLED


class Internal(HeadraceError):
    """A fault of ours. The message says nothing about internals; the log does."""

    code = Code.CODE_INTERNAL


class Unimplemented(HeadraceError):
    """The thing asked for exists in the protocol, not here."""

    code = Code.CODE_UNIMPLEMENTED


class DataLoss(HeadraceError):
    """Stored bytes are not what was stored: a digest does not match, a file is cut short."""

    code = Code.CODE_DATA_LOSS


class MalformedBody(InvalidArgument):
    """The body cannot be parsed at all, so there is no field to name."""


class BodyTooLarge(InvalidArgument):
    """The body is longer than is accepted; it was not read to its end."""


class Fatal(Exception):
    """The process cannot start or go on. The message is one sentence for its operator, shown without a
    traceback; `exit_code` is what the process ends with."""

    exit_code = 1


_BY_CODE: dict[Code, type[HeadraceError]] = {
    kind.code: kind
    for kind in (
        InvalidArgument,
        Unauthenticated,
        PermissionDenied,
        NotFound,
        AlreadyExists,
        Aborted,
        FailedPrecondition,
        ResourceExhausted,
        DeadlineExceeded,
        Unavailable,
        Cancelled,
        Internal,
        Unimplemented,
        DataLoss,
    )
}


def error_of(
    code: Code, message: str, *, field: str | None = None, retry_after_ms: int | None = None
) -> HeadraceError:
    """The error that a peer's reply stands for; unknown codes are Internal."""
    kind = _BY_CODE.get(code, Internal)
    return kind(message, field=field or None, retry_after_ms=retry_after_ms or None)
