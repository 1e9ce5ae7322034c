"""Which paths are hot: answered by `predict.py`, whatever brought them there."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass


class Dialect(enum.StrEnum):
    """What a route speaks; the value is its label in metrics."""

    NATIVE = "predict"
    EMBED = "embed"
    V2 = "v2_infer"
    OPENAI_EMBEDDINGS = "openai_embeddings"
    GRPC = "grpc_infer"
    #: Requests of a stream are counted among the others over gRPC; only their errors are said otherwise.
    GRPC_STREAM = "grpc_stream_infer"


@dataclass(frozen=True, slots=True)
class Target:
    """A hot route. `model` and `version` are what the path names, empty where it leaves them to the body."""

    dialect: Dialect
    model: str = ""
    version: str = ""


_FIXED = {
    b"/v1/predict": Target(Dialect.NATIVE),
    b"/api/v1/predict": Target(Dialect.NATIVE),
    b"/v1/embed": Target(Dialect.EMBED),
    b"/v1/embeddings": Target(Dialect.OPENAI_EMBEDDINGS),
}
_NATIVE = re.compile(rb"/(?:api/)?v1/models/([A-Za-z0-9._-]{1,128})/predict")
_V2 = re.compile(rb"/v2/models/([A-Za-z0-9._-]{1,128})(?:/versions/([A-Za-z0-9._-]{1,128}))?/infer")
#: Paths are the clients', authenticated or not, so what is remembered is bounded in number and length.
_REMEMBERED = 4096
_MAX_REMEMBERED_BYTES = 300
_known: dict[bytes, Target | None] = {}


def target_of(path: bytes) -> Target | None:
    """The hot route of a request path without query; None where the path is no hot one. Paths with percent
    escapes or a query are none either: they take the ordinary way to the same answer."""
    try:
        return _known[path]
    except KeyError:
        pass
    found = _parsed(path)
    if len(path) <= _MAX_REMEMBERED_BYTES:
        if len(_known) >= _REMEMBERED:
            _known.clear()
        _known[path] = found
    return found


def _parsed(path: bytes) -> Target | None:
    fixed = _FIXED.get(path)
    if fixed is not None:
        return fixed
    native = _NATIVE.fullmatch(path)
    if native is not None:
        return Target(Dialect.NATIVE, native[1].decode())
    infer = _V2.fullmatch(path)
    if infer is not None:
        return Target(Dialect.V2, infer[1].decode(), (infer[2] or b"").decode())
    return None
