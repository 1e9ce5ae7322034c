"""What a call and the plan that answers it want of each other. Not where they are used: mypyc forgets the
default None of an attribute that is typed by a protocol which it compiles too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from headrace.v1.dataplane_pb2 import SealedReply

from services.gateway.catalogue import ServedModel
from services.gateway.codecs.v2 import V2State


class Asked(Protocol):
    """What an answer takes from its call."""

    single: bool
    asked_id: bytes
    v2: V2State | None


class Answers(Protocol):
    """What answers by bytes that stand already."""

    model: ServedModel
    #: Takes the seconds of every answer; set by who counts them.
    answered: Callable[[float], None] | None

    def answer(
        self, reply: SealedReply, asked: Asked, request_id: bytes, latency_ms: float
    ) -> tuple[bytes, bytes] | None:
        """Headers, whole lines, and the body; None where they take the ordinary way."""
        ...
