"""What speakers of all dialects have in common."""

from __future__ import annotations

from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest

from services.gateway.call import Call
from services.gateway.catalogue import Catalogue, ServedVersion
from services.gateway.keys import Key

#: What an answer says where another version than the one meant gave it.
FALLBACK = b"x-headrace-fallback: true\r\n"


class CommonSpeaker:
    """Finds models and versions; a dialect adds how it reads, writes and refuses."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def quick(self, call: Call, key: Key, received_at_us: int) -> bytes | None:
        """Part of Speaker: nothing is known before a body is read."""
        return None

    def light(self, call: Call, key: Key) -> bool:
        """Part of Speaker: bodies are read in a thread where they are large."""
        return False

    def version(self, call: Call, key: Key, request: PredictRequest, model: str, asked: str) -> ServedVersion:
        """Note model and version in call and request, once the key may call the model."""
        key.require_model(model)
        served = call.model = self._catalogue.model(model)
        request.model = served.name
        if asked:
            request.version = asked
            return served.version(asked)
        return served.default

    def answered_by(self, call: Call, reply: PredictReply) -> ServedVersion:
        """The version that gave `reply`; of one not heard of yet, as routers may have sooner, numbers are not
        given the names of another's classes."""
        served = call.model
        if served is None:
            raise ValueError("a reply to a request that named no model")
        found = served.answering(reply.version)
        if found is None:
            newer = self._catalogue.find(served.name)  # what was heard since the request was read
            found = newer.answering(reply.version) if newer is not None else None
        return found or served.default.unnamed


def name_of(call: Call) -> str:
    """The model's name as its answer gives it."""
    return call.model.name if call.model is not None else ""


def lines_of(headers: list[tuple[bytes, bytes]]) -> bytes:
    """`headers` as they stand in an HTTP head."""
    return b"".join([b"%s: %s\r\n" % pair for pair in headers])
