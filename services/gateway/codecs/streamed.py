"""The messages of ModelStreamInfer: what one request is answered by, and whose request it was."""

from __future__ import annotations

from typing import Final

from open_inference.open_inference_pb2 import InferParameter, ModelInferResponse, ModelStreamInferResponse

from services.gateway.codecs.compiled import varint

#: Every answer is its request's last: none of our models answers by several.
_FINAL_NAME: Final = "triton_final_response"
#: Written behind a serialized ModelInferResponse, it adds the parameter.
_FINAL: Final = ModelInferResponse(
    parameters={_FINAL_NAME: InferParameter(bool_param=True)}
).SerializeToString()
#: Tag of ModelStreamInferResponse's infer_response (2).
_RESPONSE: Final = b"\x12"
#: Tags of ModelInferRequest's names (1, 2) and id (3), in the order in which serializers write them.
_MODEL, _VERSION, _ID = 0x0A, 0x12, 0x1A
_MAX_WORDS: Final = 1024


def streamed(message: bytes) -> bytes:
    """The serialized ModelInferResponse `message` as an answer on a stream."""
    return b"".join((_RESPONSE, varint(len(message) + len(_FINAL)), message, _FINAL))


def streamed_error(words: bytes, asked_id: bytes) -> bytes:
    """The answer to the request `asked_id`, which failed. Both are UTF-8."""
    said = ModelStreamInferResponse(error_message=words.decode()[:_MAX_WORDS])
    said.infer_response.id = asked_id.decode()
    said.infer_response.parameters[_FINAL_NAME].bool_param = True
    return said.SerializeToString()


def id_in(body: bytes | bytearray) -> bytes:
    """The id that a serialized ModelInferRequest gives itself, found without reading the rest; empty where it
    has none, or none where serializers write it."""
    at = 0
    try:
        for tag in (_MODEL, _VERSION, _ID):
            if body[at] != tag:
                continue
            size, at = _length(body, at + 1)
            if tag == _ID:
                found = bytes(body[at : at + size])
                found.decode()
                return found if len(found) == size else b""
            at += size
    except (IndexError, UnicodeDecodeError):
        pass
    return b""


def _length(body: bytes | bytearray, at: int) -> tuple[int, int]:
    """The length that stands at `at`, and where it ends. Raises IndexError where it is none."""
    size = shift = 0
    while shift < 35:
        byte = body[at]
        at += 1
        size |= (byte & 127) << shift
        if byte < 128:
            return size, at
        shift += 7
    raise IndexError("a length of too many bytes")
