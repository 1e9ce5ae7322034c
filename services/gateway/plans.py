"""What is the same for every call of one key to one model, found out once: that the key may call it, how its
requests begin, how its answers read, how long they may take."""

from __future__ import annotations

from collections.abc import Callable

from headrace.v1.dataplane_pb2 import SealedReply

from services.gateway.asked import Asked
from services.gateway.catalogue import ServedModel
from services.gateway.codecs.compiled import JSON, RowAnswer, RowsRequest, compile_answer, compile_request
from services.gateway.keys import Key

#: Versions, variants and experiments come from routers: few, and bounded all the same.
_REMEMBERED_ANSWERS = 64


class Plan:
    """For rows of the native dialect. Good for as long as `model` is what the catalogue has under its name; a
    key that changes is another key."""

    __slots__ = ("_answers", "answered", "model", "rows", "takes_single_rows")

    def __init__(self, model: ServedModel, rows: RowsRequest) -> None:
        self.model = model
        self.rows = rows
        self.takes_single_rows = model.default.signature.batched
        #: Takes the seconds of every answer; set by who counts them.
        self.answered: Callable[[float], None] | None = None
        self._answers: dict[tuple[str, str, str], RowAnswer | None] = {}

    def answer(
        self, reply: SealedReply, asked: Asked, request_id: bytes, latency_ms: float
    ) -> tuple[bytes, bytes] | None:
        """Headers and body of a native answer; None where they take the ordinary way."""
        told_apart = (reply.version, reply.variant, reply.experiment)
        try:
            found = self._answers[told_apart]
        except KeyError:
            found = self._answer_of(*told_apart)
        if found is None:
            return None
        text = found.text(reply, request_id, latency_ms, single=asked.single)
        return (JSON, text) if text is not None else None

    def _answer_of(self, version: str, variant: str, experiment: str) -> RowAnswer | None:
        model = self.model
        served = model.answering(version)
        made = None
        if served is not None:
            made = compile_answer(model.name, version, variant, served.signature, experiment)
        if len(self._answers) >= _REMEMBERED_ANSWERS:
            self._answers.clear()
        self._answers[version, variant, experiment] = made
        return made


def plan_of(key: Key, model: ServedModel) -> Plan | None:
    """The plan for calls of `key` to `model`, by rows of its default version; None where there is none, or
    where the key is not for the model."""
    if key.models and model.name not in key.models:
        return None
    rows = compile_request(model.default.signature, model.name, key.key_id)
    return Plan(model, rows) if rows is not None else None
