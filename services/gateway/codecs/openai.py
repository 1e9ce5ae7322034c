"""Bodies of the routes that OpenAI's clients call: `/v1/embeddings`."""

from __future__ import annotations

from base64 import b64encode
from typing import Any, Literal

import msgspec
import numpy as np
import orjson
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest
from headrace.v1.tensor_pb2 import Tensor

from services.common.errors import InvalidArgument
from services.common.targeting import MAX_UNIT
from services.gateway.codecs.native import wrong_field
from services.gateway.codecs.results import Array, array_of, nested
from services.gateway.codecs.rows import tensors_of_inputs
from services.gateway.codecs.tensors import PARSE_ERRORS, malformed
from services.gateway.signature import ModelSignature

#: Output that embedding models give when it is asked for: tokens of each row.
TOKENS = "headrace.tokens"
_MAX_INPUTS = 2048
_QUOTE = b'"'[0]


class EmbeddingsBody(msgspec.Struct, forbid_unknown_fields=True):
    """`input` is a text or a list of texts; `user` keeps its version, as `user_id` does elsewhere."""

    model: str
    input: msgspec.Raw
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None


_body = msgspec.json.Decoder(EmbeddingsBody)


def decode_embeddings(raw: bytes | bytearray | memoryview) -> EmbeddingsBody:
    """The outer object. Raises InvalidArgument or MalformedBody."""
    try:
        body = _body.decode(raw)
    except msgspec.ValidationError as error:
        raise wrong_field(error) from None
    except PARSE_ERRORS as error:
        raise malformed(error) from None
    if body.user is not None and len(body.user) > MAX_UNIT:
        raise InvalidArgument(f"user is longer than {MAX_UNIT} characters.", field="user")
    return body


def embedding_inputs(signature: ModelSignature, body: EmbeddingsBody) -> list[Tensor]:
    """The texts as the model's input, one row each. Raises InvalidArgument naming the element, and for a
    length of vectors that is not the model's."""
    raw = bytes(body.input)
    if raw[0] == _QUOTE:
        raw = b"[" + raw + b"]"
    tensors = tensors_of_inputs(signature, raw, "input")
    if tensors[0].shape[0] > _MAX_INPUTS:
        raise InvalidArgument(f"input has more than {_MAX_INPUTS} texts.", field="input")
    if body.dimensions is not None:
        given = next(spec.shape[-1] for spec in signature.outputs if spec.name == signature.prediction)
        if body.dimensions != given:
            raise InvalidArgument(f"The model gives vectors of {given} dimensions.", field="dimensions")
    return tensors


def fill_embeddings(request: PredictRequest, signature: ModelSignature, body: EmbeddingsBody) -> None:
    """Put texts and unit into `request`."""
    request.inputs.extend(embedding_inputs(signature, body))
    if body.user is not None:
        request.unit = body.user


def encode_embeddings(model: str, signature: ModelSignature, reply: PredictReply, *, base64: bool) -> bytes:
    """The JSON answer of `/v1/embeddings`."""
    arrays = {tensor.name: array_of(tensor) for tensor in reply.outputs}
    vectors = arrays.get(signature.prediction)
    if vectors is None:
        vectors = next(array for name, array in arrays.items() if name != TOKENS)
    answer = embeddings_answer(model, vectors, arrays.get(TOKENS), base64=base64)
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)


def embeddings_answer(model: str, vectors: Array, tokens: Array | None, *, base64: bool) -> dict[str, Any]:
    """The answer as orjson takes it: `vectors` [n, d]; `tokens` [n]. Without them `usage` is null: nothing is
    known, which is not the same as nothing used."""
    used = None if tokens is None else int(tokens.sum())
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _packed(row) if base64 else nested(row)}
            for index, row in enumerate(vectors)
        ],
        "model": model,
        "usage": None if used is None else {"prompt_tokens": used, "total_tokens": used},
    }


def _packed(row: Array) -> str:
    """FP32, little-endian, in base64."""
    return b64encode(np.ascontiguousarray(row, dtype="<f4").tobytes()).decode()
