"""What calls end with, as the bytes of header blocks that read the same on every connection."""

from __future__ import annotations

from typing import Final

from headrace.v1.tensor_pb2 import Code

from services.common.frames.header_blocks import literal
from services.gateway.codecs.trailers import trailers

#: The static table has `:status: 200` as a whole.
_STATUS_200: Final = b"\x88"
#: Begins every answer.
HEAD: Final = _STATUS_200 + literal(b"content-type", b"application/grpc")
#: Ends every answer that is a good one.
OK: Final = literal(b"grpc-status", b"0")
#: Encodings of messages that are taken, besides none.
ENCODINGS: Final = frozenset({b"gzip", b"deflate"})
ACCEPTED: Final = ("grpc-accept-encoding", "identity,deflate,gzip")


def refused_http(code: int) -> bytes:
    """The head of an answer to what is no gRPC call."""
    return literal(b":status", b"%d" % code)


UNKNOWN_METHOD: Final = trailers(Code.CODE_UNIMPLEMENTED, "Method not found!")
TOO_MUCH_METADATA: Final = trailers(Code.CODE_RESOURCE_EXHAUSTED, "The metadata of this call is too large.")
UNKNOWN_ENCODING: Final = trailers(
    Code.CODE_UNIMPLEMENTED, "Messages are taken as they are, or as gzip or deflate.", (ACCEPTED,)
)
MALFORMED_TIMEOUT: Final = trailers(Code.CODE_INTERNAL, "grpc-timeout is malformed.")
GOING_AWAY: Final = trailers(Code.CODE_UNAVAILABLE, "The server is going away.")
LATE: Final = trailers(Code.CODE_DEADLINE_EXCEEDED, "The deadline passed.")
