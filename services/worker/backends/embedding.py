"""Text in, vectors out: a tokenizer in front of an ONNX encoder that pools and normalises inside its
graph."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from headrace.v1.tensor_pb2 import DataType, Signature
from tokenizers import Encoding, Tokenizer

from services.common.errors import InvalidArgument
from services.worker.backends.onnx import model_file, open_session
from services.worker.backends.port import TOKENS, BackendOptions, LoadFailed
from services.worker.tensors import Array

# Where the artifact does not say: what sentence-transformers use for MiniLM; no BERT takes more than the
# second.
_DEFAULT_TOKENS = 256
_MOST_TOKENS = 512
_COLUMNS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}


class EmbeddingBackend:
    """`tokenizer.json` and an encoder. One BYTES input of UTF-8 text; texts are cut to `max_tokens` tokens
    and padded to the longest of their batch."""

    device = "cpu"
    # Texts are padded here, after the tokenizer.
    padding = None

    def __init__(
        self,
        tokenizer: Tokenizer,
        session: ort.InferenceSession,
        text: str,
        outputs: Mapping[str, str],
        max_tokens: int,
    ) -> None:
        """`text` is the input's name; `outputs` are the encoder's by the signature's names."""
        self._tokenizer = tokenizer
        self._tokenizer.enable_truncation(max_tokens)
        self._tokenizer.no_padding()
        padding = tokenizer.token_to_id("[PAD]")
        self._padding = {
            "input_ids": 0 if padding is None else padding,
            "attention_mask": 0,
            "token_type_ids": 0,
        }
        self._session = session
        self._input = text
        self._outputs = dict(outputs)
        self._columns = [node.name for node in session.get_inputs()]

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        texts = [self._text(row) for row in inputs[self._input].flat]
        encodings = self._encoded(texts)
        longest = max(len(encoding.ids) for encoding in encodings)
        feed = {name: self._column(name, encodings, longest) for name in self._columns}
        names = [name for name in outputs if name != TOKENS] or list(self._outputs)
        ran = self._session.run([self._outputs[name] for name in names], feed)
        answer = dict(zip(names, ran, strict=True))
        if TOKENS in outputs:
            answer[TOKENS] = np.array([len(encoding.ids) for encoding in encodings], np.int64)
        return answer

    def close(self) -> None:
        del self._session

    def _encoded(self, texts: list[str]) -> list[Encoding]:
        try:
            return self._tokenizer.encode_batch_fast(texts)
        except Exception:
            raise
        except BaseException as panic:
            # Of the library's Rust, such as an expression that gives up on a text. It is no Exception, and
            # who runs models in threads expects nothing else.
            raise RuntimeError(f"the tokenizer panicked: {panic}") from panic

    def _text(self, row: bytes) -> str:
        try:
            return row.decode()
        except UnicodeDecodeError:
            raise InvalidArgument(f"{self._input} is not UTF-8 text", field=f"inputs.{self._input}") from None

    def _column(self, name: str, encodings: Sequence[Encoding], longest: int) -> Array:
        column = np.full((len(encodings), longest), self._padding[name], dtype=np.int64)
        for row, encoding in enumerate(encodings):
            column[row, : len(encoding.ids)] = getattr(encoding, _COLUMNS[name])
        return column


def load(directory: Path, signature: Signature, options: BackendOptions) -> EmbeddingBackend:
    """Load tokenizer and encoder from `directory`. Raises LoadFailed."""
    if len(signature.inputs) != 1 or signature.inputs[0].datatype != DataType.DATA_TYPE_BYTES:
        raise LoadFailed("an embedding model takes one BYTES input")
    if not signature.batched or not signature.outputs:
        raise LoadFailed("an embedding model is batched and names its outputs")
    path = directory / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise LoadFailed(f"tokenizer.json cannot be read: {error}") from error
    session = open_session(model_file(directory), options)
    graph = {node.name for node in session.get_inputs()}
    if not {"input_ids", "attention_mask"} <= graph <= set(_COLUMNS):
        raise LoadFailed(f"the encoder takes {', '.join(sorted(graph))}, not input_ids and attention_mask")
    outputs = {spec.name: _encoder_output(session, spec.name, signature) for spec in signature.outputs}
    return EmbeddingBackend(tokenizer, session, signature.inputs[0].name, outputs, _max_tokens(directory))


def _encoder_output(session: ort.InferenceSession, name: str, signature: Signature) -> str:
    """The encoder's output of that name; where there is none and the signature has a single output, the only
    one with a vector per text: the public name need not be the graph's."""
    given: dict[str, list[object]] = {node.name: node.shape for node in session.get_outputs()}
    if name in given:
        return name
    vectors = [other for other, shape in given.items() if len(shape) == 2]
    if len(signature.outputs) == 1 and len(vectors) == 1:
        return vectors[0]
    raise LoadFailed(f"the encoder has no output {name}; it has {', '.join(sorted(given))}")


def _max_tokens(directory: Path) -> int:
    """`max_seq_length` of sentence_bert_config.json where the artifact carries it."""
    path = directory / "sentence_bert_config.json"
    if not path.exists():
        return _DEFAULT_TOKENS
    try:
        length = json.loads(path.read_bytes())["max_seq_length"]
        return min(int(length), _MOST_TOKENS)
    except (ValueError, KeyError, TypeError) as error:
        raise LoadFailed(f"sentence_bert_config.json names no max_seq_length: {error}") from error
