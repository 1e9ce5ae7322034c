"""Request ids: 16 bytes in the layout of UUID version 7, so that they sort by time and any tool can read
them."""

from __future__ import annotations

import os
import random
import struct
import time
import uuid

from services.common.errors import InvalidArgument

# An instance of its own: a library that seeds the global generator must not make two processes agree on ids.
_random = random.Random(os.urandom(16))
_bits = _random.getrandbits
os.register_at_fork(after_in_child=lambda: _random.seed(os.urandom(16)))

_VARIANT = 0b10 << 62
_pack = struct.Struct(">QQ").pack


def new_id() -> bytes:
    """A fresh id: 48 bits of Unix milliseconds, 12 bits of fraction (about 0.25 µs), 62 random bits (RFC
    9562, version 7, method 3). Unique, not a secret."""
    milliseconds, nanoseconds = divmod(time.time_ns(), 1_000_000)
    # In two halves: integers beyond 64 bits cost more.
    return _pack(milliseconds << 16 | 0x7000 | (nanoseconds << 12) // 1_000_000, _VARIANT | _bits(62))


def id_text(identifier: bytes) -> str:
    """The id as people and JSON see it: 32 lower-case hex digits."""
    return identifier.hex()


def parse_id(text: str, field: str = "request_id") -> bytes:
    """The id that `text` stands for; hyphens of the UUID form are accepted. Raises InvalidArgument."""
    try:
        return uuid.UUID(text).bytes
    except ValueError:
        raise InvalidArgument(f"{field} is not an id of 32 hex digits", field=field) from None


def id_unix_ms(identifier: bytes) -> int:
    """When the id was made, in milliseconds since the Unix epoch."""
    return int.from_bytes(identifier[:6], "big")
