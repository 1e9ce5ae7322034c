"""What is the same for every ModelInfer call of one key to one model over gRPC, as it was found out from
those that came before."""

from __future__ import annotations

from collections.abc import Callable

from headrace.v1.dataplane_pb2 import PredictReply, SealedReply

from services.common.frames.detached import Buffer
from services.gateway.asked import Asked
from services.gateway.catalogue import ServedModel
from services.gateway.codecs.compiled import UNITS
from services.gateway.codecs.infer_forms import AnswerForm, RequestForm, answer_form, id_at, user_at

#: Sizes of messages, and forms of one size; answers told apart.
_SIZES, _OF_ONE_SIZE, _ANSWERS = 256, 4, 256
#: Sizes that came once.
_SEEN = 1024
#: Forms in a row that were of no use: then a client's messages have something of their own each time.
_WASTED = 32
#: What names, an id and a user add to a form, roughly.
_NAMES_BYTES = 512

Read = tuple[bytes, tuple[Buffer, ...] | None, bytes, RequestForm]


class InferPlan:
    """Good for as long as `model` is what the catalogue has under its name; a key that changes is another
    key."""

    __slots__ = ("_answers", "_forms", "_seen", "_wasted", "answered", "model")

    def __init__(self, model: ServedModel) -> None:
        self.model = model
        #: Takes the seconds of every answer; set by who counts them.
        self.answered: Callable[[float], None] | None = None
        self._forms: dict[int, list[RequestForm]] = {}
        self._answers: dict[tuple[str, str, str, int], AnswerForm] = {}
        self._seen: set[int] = set()
        self._wasted = 0

    def request(self, body: bytes, at: int, request_id: bytes, received_at_us: int) -> Read | None:
        """The PredictRequest of a message whose names end at `at`, its tensors where they stand apart before
        it, its id, and its form; None where it is of
        none that is known. Raises IndexError."""
        asked_id, at = id_at(body, at)
        user, at = user_at(body, at)
        for form in self._forms.get(len(body) - at, ()):
            made = form.request(body, at, request_id, received_at_us)
            if made is not None:
                form.used = True
                request, tensors = made
                if user:
                    request += UNITS[len(user)] + user
                return request, tensors, asked_id, form
        return None

    def knows(self, size: int) -> bool:
        """Whether messages of about `size` bytes, names included, were learned."""
        # Of what is known now: a thread that reads a large body may learn another size meanwhile.
        return any(known <= size <= known + _NAMES_BYTES for known in tuple(self._forms))

    def wants(self, body: bytes) -> bool:
        """Whether to learn the form of `body`: the second of its size, unless nothing comes of learning."""
        if self._wasted >= _WASTED:
            return False
        size = len(body)
        if size in self._seen:
            return True
        if len(self._seen) >= _SEEN:
            self._seen.clear()
        self._seen.add(size)
        return False

    def learn(self, form: RequestForm) -> None:
        """Know `form`."""
        forms = self._forms.get(form.size)
        if forms is None:
            if len(self._forms) >= _SIZES:
                self._forms.clear()
            forms = self._forms[form.size] = []
        if len(forms) >= _OF_ONE_SIZE:
            self._wasted = 0 if forms.pop(0).used else self._wasted + 1
        forms.append(form)

    def answer(
        self, reply: SealedReply, asked: Asked, request_id: bytes, _latency_ms: float
    ) -> tuple[bytes, bytes] | None:
        """No headers and the ModelInferResponse; None where it takes the ordinary way."""
        sealed = reply.outputs[:]
        size = len(sealed[0]) if sealed else 0
        form = self._answers.get((reply.version, reply.variant, reply.experiment, size))
        if form is None or reply.cached or reply.fallback or reply.parameters:
            return None
        message = form.message(sealed, asked.asked_id or request_id)
        return (b"", message) if message is not None else None

    def learn_answer(self, reply: PredictReply) -> None:
        """Know the form of `reply`, where it has one."""
        form = answer_form(self.model.name, reply)
        if form is None:
            return
        if len(self._answers) >= _ANSWERS:
            self._answers.clear()
        size = len(reply.outputs[0].SerializeToString()) if reply.outputs else 0
        self._answers[reply.version, reply.variant, reply.experiment, size] = form
