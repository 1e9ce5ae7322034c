"""What the header block of a call says. A connection remembers it by the block's bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from services.common.frames.header_blocks import Field
from services.gateway.call import Head
from services.gateway.rpc.methods import Method
from services.gateway.rpc.statuses import (
    ENCODINGS,
    MALFORMED_TIMEOUT,
    TOO_MUCH_METADATA,
    UNKNOWN_ENCODING,
    UNKNOWN_METHOD,
    refused_http,
)
from services.gateway.targets import Dialect, Target

_PSEUDO: Final = frozenset({b":method", b":scheme", b":path", b":authority"})
_FORBIDDEN: Final = frozenset({b"connection", b"transfer-encoding", b"upgrade", b"keep-alive"})
#: Metadata that a hot call is read by, and the attribute of Head that takes each.
_HOT: Final = {
    b"authorization": "authorization",
    b"x-api-key": "api_key",
    b"x-request-priority": "priority",
    b"traceparent": "traceparent",
}
_INFER: Final = Target(Dialect.GRPC)
#: With or without the name of what is in the messages; grpc-web is another protocol.
_GRPC: Final = re.compile(rb"application/grpc(?:[+;]|$)")
_UNITS: Final = {
    b"H": 3600.0,
    b"M": 60.0,
    b"S": 1.0,
    b"m": 1e-3,
    b"u": 1e-6,
    b"n": 1e-9,
}
#: As a timeout that is over before it begins: 0 stands for none.
_NOW: Final = 1e-9


class CallHead:
    """One of four: a hot call has `hot`, another `method` and `metadata`, a refused one its answer, and what
    is no request has none of them."""

    __slots__ = ("encoding", "hot", "metadata", "method", "refusal", "refused_http", "timeout_s")

    def __init__(self) -> None:
        self.hot: Head | None = None
        self.method: Method | None = None
        self.metadata: list[Field] = []
        #: Of compressed messages.
        self.encoding: bytes | None = None
        #: What the caller gives the call; 0: it does not say.
        self.timeout_s = 0.0
        #: Trailers; or, for what is no gRPC call, the answer's whole head.
        self.refusal = b""
        self.refused_http = False


def read_head(fields: list[Field] | None, hot_path: bytes, methods: Mapping[bytes, Method]) -> CallHead:
    """What `fields` say; None: too much to be looked at."""
    head = CallHead()
    if fields is None:
        head.refusal = TOO_MUCH_METADATA
        return head
    by_name = _checked(fields)
    if by_name is None:
        return head
    if by_name[b":method"] != b"POST":
        head.refusal, head.refused_http = refused_http(405), True
        return head
    if _GRPC.match(by_name.get(b"content-type", b"")) is None:
        head.refusal, head.refused_http = refused_http(415), True
        return head
    path = by_name[b":path"]
    said = by_name.get(b"grpc-timeout")
    if said is not None:
        head.timeout_s = _seconds(said)
    encoding = by_name.get(b"grpc-encoding")
    if head.timeout_s < 0:
        head.refusal = MALFORMED_TIMEOUT
    elif encoding is not None and encoding != b"identity" and encoding not in ENCODINGS:
        head.refusal = UNKNOWN_ENCODING
    elif path == hot_path:
        head.encoding = encoding if encoding != b"identity" else None
        hot = head.hot = Head(_INFER)
        for name, attribute in _HOT.items():
            value = by_name.get(name)
            if value is not None:
                setattr(hot, attribute, value)
        hot.timeout_s = head.timeout_s
    elif (method := methods.get(path)) is not None:
        head.encoding = encoding if encoding != b"identity" else None
        head.method = method
        head.metadata = [field for field in fields if not field[0].startswith(b":")]
    else:
        head.refusal = UNKNOWN_METHOD
    return head


def _checked(fields: list[Field]) -> dict[bytes, bytes] | None:
    """The first value of each name; None where fields are malformed (RFC 9113, section 8.3)."""
    by_name: dict[bytes, bytes] = {}
    regular = False
    for name, value in fields:
        if name[:1] == b":":
            if regular or name in by_name or name not in _PSEUDO:
                return None
        else:
            regular = True
            if name in _FORBIDDEN or not name or name.lower() != name:
                return None
        by_name.setdefault(name, value)
    if b":method" not in by_name or b":path" not in by_name or b":scheme" not in by_name:
        return None
    return by_name


def _seconds(said: bytes) -> float:
    """What grpc-timeout says; below 0 where it is none."""
    digits, unit = said[:-1], _UNITS.get(said[-1:])
    if unit is None or not digits.isdigit() or len(digits) > 8:
        return -1.0
    return int(digits) * unit or _NOW
