"""What can go wrong, as types. Every error says what the server said."""

from __future__ import annotations


class HeadraceError(Exception):
    """A call that did not succeed.

    `status` is the HTTP status (0: no answer came), `code` the domain code such as `INVALID_ARGUMENT`,
    `field` the input it is about, `retry_after` seconds after which trying again may help. Absent ones are
    None.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 0,
        code: str | None = None,
        field: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.field = field
        self.request_id = request_id
        self.retry_after = retry_after


class InvalidRequest(HeadraceError):
    """The request itself is wrong (400, 413, 422); `field` names where."""


class Unauthenticated(HeadraceError):
    """No key, or one that is not known, expired or revoked (401)."""


class PermissionDenied(HeadraceError):
    """The key lacks the scope or the model (403)."""


class NotFound(HeadraceError):
    """The thing named does not exist (404)."""


class Conflict(HeadraceError):
    """The name is taken, or the state does not allow it (409)."""


class RateLimited(HeadraceError):
    """A limit or a full queue; nothing was started (429)."""


class Unavailable(HeadraceError):
    """Nobody can answer now (503)."""


class DeadlineExceeded(HeadraceError):
    """No answer in time, by the server's account (504) or by ours."""


class ConnectionFailed(HeadraceError):
    """No connection, or it broke; whether the request was carried out is unknown unless it was never sent."""


BY_STATUS: dict[int, type[HeadraceError]] = {
    400: InvalidRequest,
    401: Unauthenticated,
    403: PermissionDenied,
    404: NotFound,
    409: Conflict,
    413: InvalidRequest,
    422: InvalidRequest,
    429: RateLimited,
    503: Unavailable,
    504: DeadlineExceeded,
}
