"""Texts through a tokenizer and an ONNX encoder, both made here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from headrace.v1.tensor_pb2 import DataType, Signature, TensorSpec
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from services.common.errors import InvalidArgument
from services.worker.backends.embedding import EmbeddingBackend, load
from services.worker.backends.port import BackendOptions, LoadFailed

WORDS = {"[PAD]": 0, "[UNK]": 1, "one": 2, "two": 3, "three": 4}
SIGNATURE = Signature(
    inputs=[TensorSpec(name="text", datatype=DataType.DATA_TYPE_BYTES, shape=[-1])],
    outputs=[TensorSpec(name="embeddings", datatype=DataType.DATA_TYPE_FP32, shape=[-1, 2])],
    batched=True,
)


def encoder(*, token_types: bool) -> bytes:
    """[sum of the ids where the mask is 1, number of tokens] per text."""
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if token_types else [])]
    nodes = [
        helper.make_node("Mul", ["input_ids", "attention_mask"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "axes"], ["ids"], keepdims=1),
        helper.make_node("ReduceSum", ["attention_mask", "axes"], ["count"], keepdims=1),
        helper.make_node("Concat", ["ids", "count"], ["both"], axis=1),
        helper.make_node("Cast", ["both"], ["embeddings"], to=TensorProto.FLOAT),
    ]
    if token_types:
        nodes.append(helper.make_node("Identity", ["token_type_ids"], ["types"]))
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["n", "t"]) for name in names],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["n", 2])],
        [numpy_helper.from_array(np.array([1]), "axes")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def artifact(directory: Path, *, token_types: bool = False, max_tokens: int | None = None) -> Path:
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # What an artifact's own file says about length and padding does not hold: both are ours to decide.
    tokenizer.enable_truncation(1)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "model.onnx").write_bytes(encoder(token_types=token_types))
    if max_tokens is not None:
        config = json.dumps({"max_seq_length": max_tokens})
        (directory / "sentence_bert_config.json").write_text(config)
    return directory


def loaded(directory: Path) -> EmbeddingBackend:
    return load(directory, SIGNATURE, BackendOptions())


def embedded(backend: EmbeddingBackend, *texts: bytes) -> NDArray[np.float32]:
    column = np.empty(len(texts), object)
    column[:] = texts
    return backend.run({"text": column}, [])["embeddings"]


@pytest.mark.parametrize("token_types", [False, True])
def test_rows_of_different_lengths_keep_their_own_vectors(tmp_path: Path, token_types: bool) -> None:
    backend = loaded(artifact(tmp_path, token_types=token_types))
    vectors = embedded(backend, b"one", b"two three", b"one two three four", b"")
    assert vectors.tolist() == [[2, 1], [7, 2], [10, 4], [0, 0]]


def test_texts_are_cut_to_what_the_artifact_names(tmp_path: Path) -> None:
    backend = loaded(artifact(tmp_path, max_tokens=3))
    assert embedded(backend, b"one " * 10).tolist() == [[6, 3]]


def test_texts_are_cut_to_256_tokens_by_default(tmp_path: Path) -> None:
    assert embedded(loaded(artifact(tmp_path)), b"one " * 1000).tolist() == [[512, 256]]


def test_no_more_than_512_tokens_whatever_the_artifact_names(tmp_path: Path) -> None:
    assert embedded(loaded(artifact(tmp_path, max_tokens=100_000)), b"one " * 1000).tolist() == [[1024, 512]]


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument) as refused:
        embedded(loaded(artifact(tmp_path)), b"one", b"\xff")
    assert refused.value.field == "inputs.text"


def test_a_text_that_the_tokenizer_panics_at_fails_like_any_other(tmp_path: Path) -> None:
    """What it raises then is no Exception."""
    directory = artifact(tmp_path)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"(\w+\s?)+$"), "isolated")
    tokenizer.save(str(directory / "tokenizer.json"))
    backend = loaded(directory)
    with pytest.raises(RuntimeError, match="panicked"):
        embedded(backend, b"one", b"word " * 30 + b"!")
    assert embedded(backend, b"one").tolist() == [[2, 1]]


def test_an_artifact_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(encoder(token_types=False))
    with pytest.raises(LoadFailed, match=r"tokenizer\.json"):
        loaded(tmp_path)


def test_a_signature_that_is_no_embedding_is_refused(tmp_path: Path) -> None:
    numbers = Signature()
    numbers.CopyFrom(SIGNATURE)
    numbers.inputs[0].datatype = DataType.DATA_TYPE_FP32
    with pytest.raises(LoadFailed, match="one BYTES input"):
        load(artifact(tmp_path), numbers, BackendOptions())


def test_the_public_name_of_the_only_vector_need_not_be_the_graphs(tmp_path: Path) -> None:
    other = Signature()
    other.CopyFrom(SIGNATURE)
    other.outputs[0].name = "sentence"
    column = np.empty(1, object)
    column[:] = [b"two"]
    backend = load(artifact(tmp_path), other, BackendOptions())
    assert backend.run({"text": column}, ["sentence"])["sentence"].tolist() == [[3, 1]]


def test_an_output_that_the_encoder_lacks_is_refused(tmp_path: Path) -> None:
    other = Signature()
    other.CopyFrom(SIGNATURE)
    other.outputs.add().CopyFrom(SIGNATURE.outputs[0])
    other.outputs[1].name = "pooled"
    with pytest.raises(LoadFailed, match="no output pooled; it has embeddings"):
        load(artifact(tmp_path), other, BackendOptions())


def test_tokens_are_counted_where_asked_for(tmp_path: Path) -> None:
    backend = loaded(artifact(tmp_path, max_tokens=2))
    texts = np.array([b"one", b"one two three"], dtype=object)
    assert set(backend.run({"text": texts}, [])) == {"embeddings"}
    asked = backend.run({"text": texts}, ["embeddings", "headrace.tokens"])
    assert asked["headrace.tokens"].tolist() == [1, 2]  # what was cut off was not used
    assert set(backend.run({"text": texts}, ["headrace.tokens"])) == {"embeddings", "headrace.tokens"}
