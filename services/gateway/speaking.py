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

    @staticmethod
    def answered_by(call: Call, reply: PredictReply) -> ServedVersion:
        """The version that gave `reply`."""
        served = call.model
        if served is None:
            raise ValueError("a reply to a request that named no model")
        # A version that has been taken out of service meanwhile is described by the one that replaced it.
        return served.versions.get(reply.version, served.default)


def name_of(call: Call) -> str:
    """The model's name as its answer gives it."""
    return call.model.name if call.model is not None else ""


def lines_of(headers: list[tuple[bytes, bytes]]) -> bytes:
    """`headers` as they stand in an HTTP head."""
    return b"".join([b"%s: %s\r\n" % pair for pair in headers])
