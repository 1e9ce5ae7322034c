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
#: By which clients of Triton ask that the error of a request ends its stream, as a status.
_ERROR_ENDS: Final = b"triton_grpc_error"
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
    """One of five: a hot call has `hot`, a stream of such `streamed`, another `method` and `metadata`, a
    refused one its answer, and what is no request has none of them."""

    __slots__ = (
        "encoding", "error_ends", "hot", "metadata", "method", "refusal", "refused_http", "streamed",
        "timeout_s",
    )  # fmt: skip

    def __init__(self) -> None:
        self.hot: Head | None = None
        #: What its requests have in common.
        self.streamed: Head | None = None
        #: Of a stream: whether it ends with the first request that fails, by this one's status.
        self.error_ends = False
        self.method: Method | None = None
        self.metadata: list[Field] = []
        #: Of compressed messages.
        self.encoding: bytes | None = None
        #: What the caller gives the call; 0: it does not say.
        self.timeout_s = 0.0
        #: Trailers; or, for what is no gRPC call, the answer's whole head.
        self.refusal = b""
        self.refused_http = False


def read_head(
    fields: list[Field] | None, hot_path: bytes, stream_path: bytes, methods: Mapping[bytes, Method]
) -> CallHead:
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
        hot = head.hot = _hot_head(by_name)
        hot.timeout_s = head.timeout_s
    elif path == stream_path:
        head.encoding = encoding if encoding != b"identity" else None
        head.streamed = _hot_head(by_name)
        head.error_ends = by_name.get(_ERROR_ENDS) == b"true"
    elif (method := methods.get(path)) is not None:
        head.encoding = encoding if encoding != b"identity" else None
        head.method = method
        head.metadata = [field for field in fields if not field[0].startswith(b":")]
    else:
        head.refusal = UNKNOWN_METHOD
    return head


def _hot_head(by_name: Mapping[bytes, bytes]) -> Head:
    """What the service reads of such a call."""
    hot = Head(_INFER)
    for name, attribute in _HOT.items():
        value = by_name.get(name)
        if value is not None:
            setattr(hot, attribute, value)
    return hot


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
