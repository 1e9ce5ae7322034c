"""What each hot route speaks: how its body becomes a request, its reply a body, its error an error body."""

from __future__ import annotations

from functools import partial

from google.protobuf.message import DecodeError
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest
from headrace.v1.tensor_pb2 import Code
from open_inference.open_inference_pb2 import ModelInferRequest

from services.common.errors import BodyTooLarge, HeadraceError, InvalidArgument, MalformedBody
from services.common.frames.detached import Buffer
from services.common.problems import HTTP_STATUS, problem_headers
from services.common.shared_memory import in_shared_memory
from services.gateway.call import Call, Speaker
from services.gateway.catalogue import Catalogue, ServedVersion
from services.gateway.codecs import native, oip, openai, v2
from services.gateway.codecs.compiled import JSON
from services.gateway.codecs.infer_forms import named, names_of, request_form
from services.gateway.codecs.places import output_places
from services.gateway.codecs.rows_body import LONG_BODY_BYTES, decode_long, decode_rows, with_context
from services.gateway.codecs.trailers import trailers
from services.gateway.datatypes import BYTES
from services.gateway.errors import as_oip, as_openai, as_problem
from services.gateway.infer_plans import InferPlan
from services.gateway.keys import Key
from services.gateway.plans import Plan, plan_of
from services.gateway.regions import Regions
from services.gateway.targets import Dialect, Target
from services.gateway.v2_plans import V2Plan

_FALLBACK = b"x-headrace-fallback: true\r\n"
#: After so many bodies in a row of another form than the most common one, a client's are not tried for it.
_ODD_BODIES = 8
#: Learning reads a message three times, perhaps in a thread beside others: what it adds to is never removed
#: from under who reads.
_LEARNED_BYTES = 2 << 20
#: JSON parts of a V2 body that are parsed in no time.
_LIGHT_JSON_BYTES, _LENGTH_DIGITS = 4096, 12
#: The backend whose models say how many tokens a text has.
_COUNTS_TOKENS = "embedding"


def speakers(catalogue: Catalogue, regions: Regions) -> dict[Dialect, Speaker]:
    """A speaker for every dialect."""
    return {
        Dialect.NATIVE: NativeSpeaker(catalogue),
        Dialect.EMBED: EmbedSpeaker(catalogue),
        Dialect.V2: V2Speaker(catalogue, regions),
        Dialect.OPENAI_EMBEDDINGS: OpenAIEmbeddingsSpeaker(catalogue),
        Dialect.GRPC: GrpcSpeaker(catalogue, regions),
    }


class _Speaker:
    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def quick(self, call: Call, key: Key, received_at_us: int) -> bytes | None:
        return None

    def light(self, call: Call, key: Key) -> bool:
        return False

    def _version(
        self, call: Call, key: Key, request: PredictRequest, model: str, asked: str
    ) -> ServedVersion:
        """Note model and version in call and request, once the key may call the model."""
        key.require_model(model)
        served = call.model = self._catalogue.model(model)
        request.model = served.name
        if asked:
            request.version = asked
            return served.version(asked)
        return served.default

    @staticmethod
    def _answered_by(call: Call, reply: PredictReply) -> ServedVersion:
        served = call.model
        if served is None:
            raise ValueError("a reply to a request that named no model")
        # A version that has been taken out of service meanwhile is described by the one that replaced it.
        return served.versions.get(reply.version, served.default)


class NativeSpeaker(_Speaker):
    """`/v1/predict` and `/v1/models/{model}/predict`."""

    def quick(self, call: Call, key: Key, received_at_us: int) -> bytes | None:
        if len(call.body) >= LONG_BODY_BYTES:
            long = self._long(call, key, received_at_us)
            if long is not None:
                return long
        head = call.head
        if head.odd >= _ODD_BODIES:
            return None
        body = decode_rows(call.body)
        if body is None:
            head.odd += 1
            return None
        head.odd = 0
        plan = self._plan(call, key, body.model)
        if plan is None:
            return None
        rows, row = body.inputs, body.input
        if row is not None:
            if rows is not None or not plan.takes_single_rows:
                return None
            rows = [row]
        elif rows is None:
            return None
        request: bytes | None = plan.rows.serialized(rows, call.request_id, received_at_us, body.user_id)
        if body.session_id is not None or body.attributes is not None:
            request = with_context(request, body)
        if request is None:
            return None
        call.model = plan.model
        call.single = row is not None
        if len(rows) == 1:
            call.plan = plan
        return request

    def _long(self, call: Call, key: Key, received_at_us: int) -> bytes | None:
        """The same of a body with many numbers."""
        raw = bytes(call.body)
        found = decode_long(raw)
        if found is None:
            return None
        body, start, end = found
        plan = self._plan(call, key, body.model)
        if plan is None:
            return None
        made = plan.rows.packed(raw, start, end, call.request_id, received_at_us, body.user_id)
        if made is None:
            return None
        packed, tensors, rows = made
        request: bytes | None = packed
        if body.session_id is not None or body.attributes is not None:
            request = with_context(request, body)
        if request is None:
            return None
        call.model = plan.model
        call.tensors = tensors
        if rows == 1:
            call.plan = plan
        return request

    def _plan(self, call: Call, key: Key, name: str) -> Plan | None:
        """The plan for the model that body and path name; None where they disagree, or there is none."""
        named = call.head.target.model
        if named and (name and name != named):
            return None
        name = named or name
        plan = key.plans.get(name)
        model = self._catalogue.find(name)
        if plan is None or plan.model is not model:
            plan = plan_of(key, model) if model is not None else None
            if plan is None:
                return None
            key.plans[name] = plan
        return plan

    def read(self, call: Call, key: Key, request: PredictRequest) -> None:
        body = native.decode_body(call.body)
        model = body.model
        named = call.target.model
        if named:
            if model and model != named:
                raise InvalidArgument(f"The path names the model {named}.", field="model")
            model = named
        elif not model:
            raise InvalidArgument("model is missing.", field="model")
        asked = "" if body.version is None else str(body.version)
        version = self._version(call, key, request, model, asked)
        call.single = native.fill_request(request, version.signature, body)

    def write(self, call: Call, reply: PredictReply, latency_ms: float) -> tuple[bytes, bytes]:
        return JSON, native.encode_answer(
            call.request_id.hex(),
            _name(call),
            self._answered_by(call, reply).signature,
            reply,
            single=call.single,
            latency_ms=latency_ms,
        )

    def refuse(self, error: HeadraceError, request_id: str) -> tuple[int, bytes, bytes]:
        status, body = as_problem(error, request_id)
        return status, _lines(problem_headers(error)), body


class EmbedSpeaker(NativeSpeaker):
    """`/v1/embed`."""

    def quick(self, call: Call, key: Key, received_at_us: int) -> bytes | None:
        return None

    def read(self, call: Call, key: Key, request: PredictRequest) -> None:
        super().read(call, key, request)
        served = call.model
        if served is not None:
            native.require_embedding(served.version(request.version).signature, served.name)

    def write(self, call: Call, reply: PredictReply, latency_ms: float) -> tuple[bytes, bytes]:
        signature = self._answered_by(call, reply).signature
        return JSON, native.encode_embeddings(
            call.request_id.hex(), _name(call), signature, reply, latency_ms
        )


class V2Speaker(_Speaker):
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
        version = self._version(call, key, request, target.model, target.version)
        asked, binary = v2.decode_request(call.body, call.head.json_length)
        timeout_s = call.asked_timeout_s = v2.timeout_of(asked.parameters)
        apart: list[Buffer] = []
        find = partial(self._regions.find, key.key_id)
        state = call.v2 = v2.fill_request(request, version.signature, asked, binary, apart, find)
        call.places = output_places([(one.name, one.parameters) for one in asked.outputs or ()], find)
        if apart:
            call.tensors = tuple(apart)
        body, model = call.body, call.model
        if model is None or len(body) > _LEARNED_BYTES or _elsewhere(call, request):
            return
        names = _v2_names(target)
        plan = key.plans.get(names)
        if plan is None or plan.model is not model:
            plan = key.plans[names] = V2Plan(model)
        call.plan = plan
        end = len(body) - len(binary)
        plan.learn(bytes(body), end, asked, request, version.signature, state, timeout_s)

    def write(self, call: Call, reply: PredictReply, latency_ms: float) -> tuple[bytes, bytes]:
        state = call.v2
        if state is None:
            raise ValueError("a reply to a request that was not read")
        body, json_length = v2.encode_answer(_name(call), state, call.request_id.hex(), reply, call.places)
        if isinstance(call.plan, V2Plan):
            call.plan.learn_answer(state, reply)
        headers = v2.answer_head(json_length)
        return (headers + _FALLBACK if reply.fallback else headers), body

    def refuse(self, error: HeadraceError, request_id: str) -> tuple[int, bytes, bytes]:
        status, body = as_oip(error)
        headers = [pair for pair in problem_headers(error) if pair[0] != b"content-type"]
        return status, JSON + _lines(headers), body


class OpenAIEmbeddingsSpeaker(_Speaker):
    """`/v1/embeddings`."""

    def read(self, call: Call, key: Key, request: PredictRequest) -> None:
        body = openai.decode_embeddings(call.body)
        version = self._version(call, key, request, body.model, "")
        native.require_embedding(version.signature, request.model)
        openai.fill_embeddings(request, version.signature, body)
        call.base64 = body.encoding_format == "base64"
        if version.backend == _COUNTS_TOKENS:
            request.outputs.extend((version.signature.prediction, openai.TOKENS))

    def write(self, call: Call, reply: PredictReply, latency_ms: float) -> tuple[bytes, bytes]:
        signature = self._answered_by(call, reply).signature
        return JSON, openai.encode_embeddings(_name(call), signature, reply, base64=call.base64)

    def refuse(self, error: HeadraceError, request_id: str) -> tuple[int, bytes, bytes]:
        status, body = as_openai(error)
        headers = [pair for pair in problem_headers(error) if pair[0] != b"content-type"]
        return status, JSON + _lines(headers), body


class GrpcSpeaker(_Speaker):
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
        version = self._version(call, key, request, asked.model_name, asked.model_version)
        call.asked_id = asked.id.encode()
        find = partial(self._regions.find, key.key_id)
        oip.fill_request(request, version.signature, asked, find)
        call.places = output_places([(one.name, oip.scalars(one.parameters)) for one in asked.outputs], find)
        timeout_s = oip.timeout_of(asked)
        call.asked_timeout_s = _shorter(call.head.timeout_s, timeout_s)
        if (
            call.head.content_encoding is None
            and len(call.body) <= _LEARNED_BYTES
            and not _elsewhere(call, request)
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
            plan = key.plans[names] = InferPlan(model)
        call.plan = plan
        if plan.wants(body):
            form = request_form(body, names, asked, request, version.signature, timeout_s)
            if form is not None:
                plan.learn(form)

    def write(self, call: Call, reply: PredictReply, latency_ms: float) -> tuple[bytes, bytes]:
        if isinstance(call.plan, InferPlan):
            call.plan.learn_answer(reply)
        request_id = call.asked_id.decode() or call.request_id.hex()
        return b"", oip.to_response(_name(call), request_id, reply, call.places).SerializeToString()

    def refuse(self, error: HeadraceError, request_id: str) -> tuple[int, bytes, bytes]:
        if isinstance(error, BodyTooLarge):
            return 413, b"", trailers(Code.CODE_RESOURCE_EXHAUSTED, error.message)
        message = error.message
        if error.field and error.field not in message:
            message = f"{error.field}: {message}"
        # What gRPC's own retry policy reads.
        more = [("grpc-retry-pushback-ms", str(error.retry_after_ms))] if error.retry_after_ms else []
        # Under HTTP's numbers, so that one rule counts failures whatever brought them.
        return HTTP_STATUS[error.code], b"", trailers(error.code, message, more)


def _shorter(one: float, other: float) -> float:
    """The shorter of two times of which 0 is none."""
    return min(one, other) if one and other else one or other


def _v2_names(target: Target) -> str:
    """What plans for a path are kept by; no model has such a name."""
    return f"{target.model}/{target.version}"


def _elsewhere(call: Call, request: PredictRequest) -> bool:
    """Whether tensors lie in shared memory: what bodies have in common is not learned from such."""
    return call.places is not None or in_shared_memory(request)


def _name(call: Call) -> str:
    return call.model.name if call.model is not None else ""


def _lines(headers: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join([b"%s: %s\r\n" % pair for pair in headers])
