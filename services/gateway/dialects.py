"""What each hot route speaks: how its body becomes a request, its reply a body, its error an error body. Here
the native routes and OpenAI's embeddings."""

from __future__ import annotations

from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest

from services.common.errors import HeadraceError, InvalidArgument
from services.common.problems import problem_headers
from services.gateway.call import Call, Speaker
from services.gateway.catalogue import Catalogue
from services.gateway.codecs import native, openai
from services.gateway.codecs.compiled import JSON
from services.gateway.codecs.rows_body import LONG_BODY_BYTES, decode_long, decode_rows, with_context
from services.gateway.errors import as_openai, as_problem
from services.gateway.keys import Key
from services.gateway.oip_dialects import GrpcSpeaker, GrpcStreamSpeaker, V2Speaker
from services.gateway.plans import Plan, plan_of
from services.gateway.regions import Regions
from services.gateway.speaking import CommonSpeaker, lines_of, name_of
from services.gateway.targets import Dialect

#: After so many bodies in a row of another form than the most common one, a client's are not tried for it.
_ODD_BODIES = 8
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
        Dialect.GRPC_STREAM: GrpcStreamSpeaker(catalogue, regions),
    }


class NativeSpeaker(CommonSpeaker):
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
            key.keep_plan(name, plan)
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
        version = self.version(call, key, request, model, asked)
        call.single = native.fill_request(request, version.signature, body)

    def write(self, call: Call, reply: PredictReply, latency_ms: float) -> tuple[bytes, bytes]:
        return JSON, native.encode_answer(
            call.request_id.hex(),
            name_of(call),
            self.answered_by(call, reply).signature,
            reply,
            single=call.single,
            latency_ms=latency_ms,
        )

    def refuse(self, error: HeadraceError, request_id: str) -> tuple[int, bytes, bytes]:
        status, body = as_problem(error, request_id)
        return status, lines_of(problem_headers(error)), body


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
        signature = self.answered_by(call, reply).signature
        return JSON, native.encode_embeddings(
            call.request_id.hex(), name_of(call), signature, reply, latency_ms
        )


class OpenAIEmbeddingsSpeaker(CommonSpeaker):
    """`/v1/embeddings`."""

    def read(self, call: Call, key: Key, request: PredictRequest) -> None:
        body = openai.decode_embeddings(call.body)
        version = self.version(call, key, request, body.model, "")
        native.require_embedding(version.signature, request.model)
        openai.fill_embeddings(request, version.signature, body)
        call.base64 = body.encoding_format == "base64"
        served, output = call.model, version.signature.prediction
        if served is not None and all(  # any version of it may answer
            one.backend == _COUNTS_TOKENS and one.signature.prediction == output
            for one in served.versions.values()
        ):
            request.outputs.extend((output, openai.TOKENS))

    def write(self, call: Call, reply: PredictReply, latency_ms: float) -> tuple[bytes, bytes]:
        signature = self.answered_by(call, reply).signature
        return JSON, openai.encode_embeddings(name_of(call), signature, reply, base64=call.base64)

    def refuse(self, error: HeadraceError, request_id: str) -> tuple[int, bytes, bytes]:
        status, body = as_openai(error)
        headers = [pair for pair in problem_headers(error) if pair[0] != b"content-type"]
        return status, JSON + lines_of(headers), body
