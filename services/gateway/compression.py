"""Request bodies that clients sent compressed."""

from __future__ import annotations

import zlib

from services.common.errors import BodyTooLarge, InvalidArgument, MalformedBody

# zlib's window bits: +16 expects gzip's frame, +32 would accept either.
_WINDOW = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}


def decompressed(body: bytes | bytearray, encoding: bytes, limit: int) -> bytes:
    """The body that `Content-Encoding: encoding` stands for. Raises BodyTooLarge where it grows beyond
    `limit` bytes (nothing beyond is unpacked), MalformedBody, or InvalidArgument for an unknown encoding."""
    name = encoding.strip().lower()
    if name in (b"", b"identity"):
        return bytes(body)
    if name not in _WINDOW:
        raise InvalidArgument("Content-Encoding must be gzip, deflate or identity.", field="Content-Encoding")
    unpacker = zlib.decompressobj(_WINDOW[name])
    try:
        plain = unpacker.decompress(bytes(body), limit + 1)
    except zlib.error:
        raise MalformedBody(f"The body is not {name.decode()}.") from None
    if len(plain) > limit:
        raise BodyTooLarge(f"The body unpacks to more than {limit} bytes.")
    if not unpacker.eof or unpacker.unused_data:
        raise MalformedBody(f"The body is not one whole {name.decode()} stream.")
    return plain
