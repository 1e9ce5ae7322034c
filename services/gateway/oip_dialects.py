"""The Open Inference Protocol as hot routes speak it: V2 over REST, in JSON and binary, and gRPC."""

from __future__ import annotations

from functools import partial

from google.protobuf.message import DecodeError
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest
from headrace.v1.tensor_pb2 import Code
from open_inference.open_inference_pb2 import ModelInferRequest

from services.common.errors import BodyTooLarge, HeadraceError, MalformedBody
from services.common.frames.detached import Buffer
from services.common.problems import HTTP_STATUS, problem_headers
from services.common.shared_memory import in_shared_memory
from services.gateway.call import Call
from services.gateway.catalogue import Catalogue, ServedVersion
from services.gateway.codecs import oip, v2
from services.gateway.codecs.classes import put_classes, wanted_classes
from services.gateway.codecs.compiled import JSON
from services.gateway.codecs.infer_forms import named, names_of, request_form
from services.gateway.codecs.places import output_places
from services.gateway.codecs.trailers import trailers
from services.gateway.datatypes import BYTES
from services.gateway.errors import as_oip
from services.gateway.infer_plans import InferPlan
from services.gateway.keys import Key
from services.gateway.regions import Regions
from services.gateway.speaking import FALLBACK, CommonSpeaker, lines_of, name_of
from services.gateway.targets import Target
from services.gateway.v2_plans import V2Plan

#: Learning reads a message three times, perhaps in a thread beside others: what it adds to is never removed
#: from under who reads.
_LEARNED_BYTES = 2 << 20
#: JSON parts of a V2 body that are parsed in no time.
_LIGHT_JSON_BYTES, _LENGTH_DIGITS = 4096, 12


class V2Speaker(CommonSpeaker):
    """`/v2/models/{model}[/versions/{version}]/infer`."""

    def __init__(self, catalogue: Catalogue, regions: Regions) -> None:
        super().__init__(catalogue)
        self._regions = regions

    def light(self, call: Call, key: Key) -> bool:
        said = call.head.json_length
        if said is None or not said.isdigit() or int(said[:_LENGTH_DIGITS]) > _LIGHT_JSON_BYTES:
            return False
        model = self._catalogue.find(call.target.model)
        return model is not None and all(
            spec.datatype is not BYTES for spec in model.default.signature.inputs
        )

    def quick(self, call: Call, key: Key, received_at_us: int) -> bytes | None:
        head, body = call.head, call.body
        target = head.target
        plan = key.plans.get(_v2_names(target))
        if plan is None or type(body) is not bytes or plan.model is not self._catalogue.find(target.model):
            return None
        found = plan.request(body, v2.json_end(body, head.json_length), call.request_id, received_at_us)
        if found is None:
            return None
        (request, call.tensors, call.v2), form = found
        call.model = plan.model
        call.plan = plan
        call.priority = form.priority
        call.asked_timeout_s = form.timeout_s
        return request  # type: ignore[no-any-return]  # plans of other dialects are kept there too

    def read(self, call: Call, key: Key, request: PredictRequest) -> None:
        target = call.target
        version = self.version(call, key, request, target.model, target.version)
        raw = call.head.json_length == b"0"
        if raw:
            asked, binary = v2.raw_request(version.signature, call.body)
        else:
            asked, binary = v2.decode_request(call.body, call.head.json_length)
        timeout_s = call.asked_timeout_s = v2.timeout_of(asked.parameters)
        apart: list[Buffer] = []
        find = partial(self._regions.find, key.key_id)
        state = call.v2 = v2.fill_request(request, version.signature, asked, binary, apart, find)
        outputs = [(one.name, one.parameters) for one in asked.outputs or ()]
        call.places = output_places(outputs, find)
        call.classes = wanted_classes(version.signature, outputs)
        if apart:
            call.tensors = tuple(apart)
        body, model = call.body, call.model
        if raw or model is None or len(body) > _LEARNED_BYTES or _unlike_others(call, request):
            return
        names = _v2_names(target)
        plan = key.plans.get(names)
        if plan is None or plan.model is not model:
            plan = V2Plan(model)
            key.keep_plan(names, plan)
        call.plan = plan
        end = len(body) - len(binary)
        plan.learn(bytes(body), end, asked, request, version.signature, state, timeout_s)

    def write(self, call: Call, reply: PredictReply, latency_ms: float) -> tuple[bytes, bytes]:
        state = call.v2
        if state is None:
            raise ValueError("a reply to a request that was not read")
        if call.classes is not None:
            put_classes(reply, call.classes, self.answered_by(call, reply).signature)
        body, json_length = v2.encode_answer(name_of(call), state, call.request_id.hex(), reply, call.places)
        if isinstance(call.plan, V2Plan):
            call.plan.learn_answer(state, reply)
        headers = v2.answer_head(json_length)
        return (headers + FALLBACK if reply.fallback else headers), body

    def refuse(self, error: HeadraceError, request_id: str) -> tuple[int, bytes, bytes]:
        status, body = as_oip(error)
        headers = [pair for pair in problem_headers(error) if pair[0] != b"content-type"]
        return status, JSON + lines_of(headers), body


class GrpcSpeaker(CommonSpeaker):
    """`inference.GRPCInferenceService/ModelInfer`. Bodies are messages; an error's body is the trailers that
    say it, since gRPC has no body for errors."""

    def __init__(self, catalogue: Catalogue, regions: Regions) -> None:
        super().__init__(catalogue)
        self._regions = regions

    def light(self, call: Call, key: Key) -> bool:
        if len(call.body) > _LEARNED_BYTES:
            return False
        body = call.body = bytes(call.body)
        try:
            plan = key.plans.get(body[: named(body)])
        except IndexError:
            return False
        return isinstance(plan, InferPlan) and plan.knows(len(body))

    def quick(self, call: Call, key: Key, received_at_us: int) -> bytes | None:
        body = call.body
        if type(body) is not bytes:
            return None
        try:
            at = named(body)
            plan = key.plans.get(body[:at])
            if plan is None:
                return None
            read = plan.request(body, at, call.request_id, received_at_us)
        except IndexError:
            return None
        if read is None or plan.model is not self._catalogue.find(plan.model.name):
            return None
        request, call.tensors, call.asked_id, form = read
        call.model = plan.model
        call.plan = plan
        call.priority = form.priority
        call.asked_timeout_s = _shorter(call.head.timeout_s, form.timeout_s)
        return request  # type: ignore[no-any-return]  # plans of other dialects are kept there too

    def read(self, call: Call, key: Key, request: PredictRequest) -> None:
        try:
            asked = ModelInferRequest.FromString(call.body)  # type: ignore[arg-type]  # takes any buffer
        except DecodeError:
            raise MalformedBody("The message is no ModelInferRequest.") from None
        call.asked_id = asked.id.encode()
        version = self.version(call, key, request, asked.model_name, asked.model_version)
        find = partial(self._regions.find, key.key_id)
        oip.fill_request(request, version.signature, asked, find)
        outputs = [(one.name, oip.scalars(one.parameters)) for one in asked.outputs]
        call.places = output_places(outputs, find)
        call.classes = wanted_classes(version.signature, outputs)
        timeout_s = oip.timeout_of(asked)
        call.asked_timeout_s = _shorter(call.head.timeout_s, timeout_s)
        if (
            call.head.content_encoding is None
            and len(call.body) <= _LEARNED_BYTES
            and not _unlike_others(call, request)
        ):
            self._learn(call, key, asked, request, version, timeout_s)

    def _learn(
        self,
        call: Call,
        key: Key,
        asked: ModelInferRequest,
        request: PredictRequest,
        version: ServedVersion,
        timeout_s: float,
    ) -> None:
        """Have the next message of this form read by what is known of it."""
        model, body = call.model, bytes(call.body)
        names = names_of(body, asked)
        if model is None or names is None:
            return
        plan = key.plans.get(names)
        if plan is None or plan.model is not model:
            plan = InferPlan(model)
            key.keep_plan(names, plan)
        call.plan = plan
        if plan.wants(body):
            form = request_form(body, names, asked, request, version.signature, timeout_s)
            if form is not None:
                plan.learn(form)

    def write(self, call: Call, reply: PredictReply, latency_ms: float) -> tuple[bytes, bytes]:
        if isinstance(call.plan, InferPlan):
            call.plan.learn_answer(reply)
        if call.classes is not None:
            put_classes(reply, call.classes, self.answered_by(call, reply).signature)
        request_id = call.asked_id.decode() or call.request_id.hex()
        return b"", oip.to_response(name_of(call), request_id, reply, call.places).SerializeToString()

    def refuse(self, error: HeadraceError, request_id: str) -> tuple[int, bytes, bytes]:
        if isinstance(error, BodyTooLarge):
            return 413, b"", trailers(Code.CODE_RESOURCE_EXHAUSTED, error.message)
        # What gRPC's own retry policy reads.
        more = [("grpc-retry-pushback-ms", str(error.retry_after_ms))] if error.retry_after_ms else []
        # Under HTTP's numbers, so that one rule counts failures whatever brought them.
        return HTTP_STATUS[error.code], b"", trailers(error.code, _sentence(error), more)


class GrpcStreamSpeaker(GrpcSpeaker):
    """Requests of `ModelStreamInfer`. An error's body is its sentence, since one request's error does not end
    the stream and so is no status."""

    def refuse(self, error: HeadraceError, request_id: str) -> tuple[int, bytes, bytes]:
        status = 413 if isinstance(error, BodyTooLarge) else HTTP_STATUS[error.code]
        return status, b"", _sentence(error).encode()


def _sentence(error: HeadraceError) -> str:
    if error.field and error.field not in error.message:
        return f"{error.field}: {error.message}"
    return error.message


def _shorter(one: float, other: float) -> float:
    """The shorter of two times of which 0 is none."""
    return min(one, other) if one and other else one or other


def _v2_names(target: Target) -> str:
    """What plans for a path are kept by; no model has such a name."""
    return f"{target.model}/{target.version}"


def _unlike_others(call: Call, request: PredictRequest) -> bool:
    """Whether tensors lie in shared memory, or are wanted as classes: what bodies have in common is not
    learned from such."""
    return call.places is not None or call.classes is not None or in_shared_memory(request)
