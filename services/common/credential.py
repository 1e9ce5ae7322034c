"""The credential that services of one installation show each other, free of any transport."""

from __future__ import annotations

import hmac


def bearer(token: str) -> str:
    """The value of the `authorization` header or metadata entry."""
    return f"Bearer {token}"


def accepts(header: bytes | str | None, token: str) -> bool:
    """Whether `header` carries `token`; takes the same time however much of it is right."""
    if header is None:
        return False
    given = header.encode() if isinstance(header, str) else header
    scheme, _, value = given.partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(value.strip(), token.encode())
