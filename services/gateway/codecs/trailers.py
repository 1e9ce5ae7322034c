"""What a gRPC call ends with, as the bytes of a header block that reads the same on every connection."""

from __future__ import annotations

from collections.abc import Iterable

from services.common.frames.header_blocks import grpc_message, literal

_MAX_MESSAGE = 1024


def trailers(code: int, message: str = "", more: Iterable[tuple[str, str]] = ()) -> bytes:
    """A block of trailers. Names in `more` are lower case."""
    block = literal(b"grpc-status", b"%d" % code)
    if message:
        block += literal(b"grpc-message", grpc_message(message[:_MAX_MESSAGE]).encode())
    for name, value in more:
        block += literal(name.encode(), value.encode("latin-1", "replace"))
    return block
