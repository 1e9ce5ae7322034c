"""What makes two requests the same to the result cache. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import Final

from headrace.v1.dataplane_pb2 import PredictRequest

from services.router.routing_table import Target

_PREFIX: Final = "headrace:result:2:"
_DIGEST_BYTES: Final = 32


def cache_key(target: Target, request: PredictRequest) -> bytes:
    """The key of the answer that `target` gives to `request`.

    Two requests share a key only if they are for the same artifact of the same version, have the same inputs
    bit for bit, in whatever order, the same parameters, and ask for the same outputs in the same order.
    """
    digest = blake2b(digest_size=_DIGEST_BYTES)
    for part in _parts(target, request):
        # Every part says how long it is, so that no two lists of parts read the same.
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    model, version = target.key
    return f"{_PREFIX}{model}:{version}:{digest.hexdigest()}".encode()


def _parts(target: Target, request: PredictRequest) -> Iterator[bytes]:
    yield target.digest.encode()
    inputs = request.inputs
    for tensor in inputs if len(inputs) == 1 else sorted(inputs, key=lambda one: one.name):
        yield tensor.name.encode()
        yield repr((tensor.datatype, *tensor.shape)).encode()
        yield tensor.data
    yield b"parameters"
    if request.parameters:
        for name in sorted(request.parameters):
            yield name.encode()
            yield request.parameters[name].SerializeToString(deterministic=True)
    yield b"outputs"
    for output in request.outputs:
        yield output.encode()
