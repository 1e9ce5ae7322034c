"""How long the body of a request may be."""

from __future__ import annotations

from typing import Final

from starlette.types import Scope

MAX_BODY_BYTES: Final = 8 << 20


def is_upload(scope: Scope) -> bool:
    """Whether it brings a new version: these are received piece by piece, within bounds of their own."""
    return bool(scope["method"] == "POST" and scope["path"].endswith("/versions"))
