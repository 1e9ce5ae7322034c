"""What is the same for every call of one key to one model by the Open Inference Protocol over REST, as it was
found out from those that came before."""

from __future__ import annotations

from collections.abc import Callable

from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest, SealedReply

from services.gateway.asked import Asked
from services.gateway.catalogue import ServedModel
from services.gateway.codecs.v2 import V2Request, V2State, answer_head
from services.gateway.codecs.v2_answers import AnswerForm, answer_form
from services.gateway.codecs.v2_forms import Read, RequestForm
from services.gateway.codecs.v2_learning import request_form
from services.gateway.signature import ModelSignature

#: Forms of requests, and of answers told apart.
_FORMS, _ANSWERS = 8, 256
#: So many bodies were learned and no new form was of use: then they have something of their own each time,
#: and only one in so many is looked at again.
_WASTED, _SELDOM = 32, 64

_Told = tuple[str, str, str, frozenset[str] | None, int]


class V2Plan:
    """Good for as long as `model` is what the catalogue has under its name; a key that changes is another
    key. Large bodies are read in threads: forms are exchanged as a whole, and what a race loses is learned
    again."""

    __slots__ = ("_answers", "_forms", "_missed", "_wasted", "answered", "model")

    def __init__(self, model: ServedModel) -> None:
        self.model = model
        #: Takes the seconds of every answer; set by who counts them.
        self.answered: Callable[[float], None] | None = None
        self._forms: tuple[RequestForm, ...] = ()
        self._answers: dict[_Told, AnswerForm] = {}
        self._wasted = 0
        self._missed = 0

    def request(
        self, body: bytes, end: int, request_id: bytes, received_at_us: int
    ) -> tuple[Read, RequestForm] | None:
        """What `body` asks for, whose JSON ends at `end`, and by which form it was read; None where it is of
        none that is known."""
        for form in self._forms:
            read = form.request(body, end, request_id, received_at_us)
            if read is not None:
                form.recent = True
                if not form.used:
                    form.used = True
                    self._wasted = 0
                return read, form
        return None

    def learn(
        self,
        body: bytes,
        end: int,
        asked: V2Request,
        request: PredictRequest,
        signature: ModelSignature,
        state: V2State,
        timeout_s: float,
    ) -> None:
        """Know the form of `body`, which the ordinary way has read, unless nothing comes of learning."""
        self._missed += 1
        if self._wasted >= _WASTED and self._missed % _SELDOM:
            return
        form = request_form(body, end, asked, request, signature, state, timeout_s)
        self._wasted += 1
        if form is None:
            return
        forms = list(self._forms)
        if len(forms) >= _FORMS:
            _forget_one(forms)
        self._forms = (*forms, form)

    def answer(
        self, reply: SealedReply, asked: Asked, request_id: bytes, _latency_ms: float
    ) -> tuple[bytes, bytes] | None:
        """Headers and body; None where they take the ordinary way."""
        state = asked.v2
        if state is None or reply.cached or reply.fallback or reply.parameters:
            return None
        outputs = reply.outputs
        size = len(outputs[0]) if outputs else 0
        form = self._answers.get((reply.version, reply.variant, reply.experiment, state.binary, size))
        if form is None:
            return None
        said = form.body(reply, state.id or request_id.decode())
        return (answer_head(said[1]), said[0]) if said is not None else None

    def learn_answer(self, state: V2State, reply: PredictReply) -> None:
        """Know the form of `reply` to a request of `state`, where it has one."""
        form = answer_form(self.model.name, state, reply)
        if form is None:
            return
        if len(self._answers) >= _ANSWERS:
            self._answers.clear()
        size = len(reply.outputs[0].SerializeToString()) if reply.outputs else 0
        self._answers[reply.version, reply.variant, reply.experiment, state.binary, size] = form


def _forget_one(forms: list[RequestForm]) -> None:
    """Drop the oldest of `forms` that read nothing since it was spared last."""
    for _spared in range(len(forms)):
        oldest = forms.pop(0)
        if not oldest.recent:
            return
        oldest.recent = False
        forms.append(oldest)
    forms.pop(0)
