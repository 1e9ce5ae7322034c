"""From the files of an upload, and what its sender says of them, to a backend and a signature. Blocking."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from headrace.v1.tensor_pb2 import DataType, Signature, Task, TensorSpec

from services.common.errors import InvalidArgument
from services.registry.onnx_file import MODEL_FILE, TASKS, check_names, read_onnx
from services.registry.schemas import SignatureOverrides, TensorOverride

TOKENIZER_FILE = "tokenizer.json"
ONNX = "onnx"
EMBEDDING = "embedding"
BACKENDS = (ONNX, EMBEDDING)

_TOKENIZER_LIMIT = 256 << 20
_ENCODER_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "position_ids"}


class Described(NamedTuple):
    """What files come to. `random`: equal inputs have unequal answers."""

    backend: str
    signature: Signature
    random: bool


def describe(files: Mapping[str, Path], backend: str, overrides: SignatureOverrides) -> Described:
    """Backend, signature and more of the version made of `files` (path inside the version → file on disk).

    An empty `backend` is chosen by what is there. Raises InvalidArgument: field `backend` for an unknown
    one, `files` for files that are missing, unknown or corrupt, `signature.…` for an override that
    contradicts the file.
    """
    if backend and backend not in BACKENDS:
        raise InvalidArgument(f"backend is one of {', '.join(BACKENDS)}", field="backend")
    if MODEL_FILE not in files:
        raise InvalidArgument(_no_model_file(files), field="files")
    read = read_onnx(files[MODEL_FILE])
    missing = sorted(read.external_data - files.keys())
    if missing:
        raise InvalidArgument(
            f"{MODEL_FILE} keeps weights in files that are not here: {missing}; push them with it",
            field="files",
        )
    inputs = {spec.name for spec in read.signature.inputs}
    if not backend:
        backend = EMBEDDING if TOKENIZER_FILE in files and inputs <= _ENCODER_INPUTS else ONNX
    signature = read.signature
    if backend == EMBEDDING:
        _check_tokenizer(files)
        signature = _embedding_signature(read.signature)
    return Described(backend, complete(signature, overrides), read.random)


def complete(signature: Signature, overrides: SignatureOverrides) -> Signature:
    """`signature` with what `overrides` adds. A tensor may be narrowed (a variable dimension made fixed) and
    named, never changed. Raises InvalidArgument naming the field under `signature.`."""
    result = Signature()
    result.CopyFrom(signature)
    _narrow(result.inputs, overrides.inputs, "inputs")
    _narrow(result.outputs, overrides.outputs, "outputs")
    variable = all(spec.shape and spec.shape[0] == -1 for spec in (*result.inputs, *result.outputs))
    if overrides.batched and not variable:
        raise InvalidArgument(
            "batched needs a variable first dimension in every tensor", field="signature.batched"
        )
    result.batched = variable and (signature.batched if overrides.batched is None else overrides.batched)
    if overrides.task is not None:
        result.task = TASKS[overrides.task]
    outputs = {spec.name for spec in result.outputs}
    for role in ("prediction_output", "probability_output"):
        name = getattr(overrides, role)
        if name is None:
            continue
        if name and name not in outputs:
            raise InvalidArgument(f"the model has no output {name!r}", field=f"signature.{role}")
        setattr(result, role, name)
    if overrides.classes is not None:
        result.classes[:] = overrides.classes
    check_names(result, "signature", fields=True)
    return result


def _narrow(specs: Sequence[TensorSpec], overrides: Sequence[TensorOverride], kind: str) -> None:
    by_name = {spec.name: spec for spec in specs}
    seen: set[str] = set()
    for index, override in enumerate(overrides):
        place = f"signature.{kind}[{index}]"
        spec = by_name.get(override.name)
        if spec is None or override.name in seen:
            problem = "is named twice" if spec is not None else f"is not one of {sorted(by_name)}"
            raise InvalidArgument(f"{override.name!r} {problem}", field=f"{place}.name")
        seen.add(override.name)
        if override.datatype is not None and f"DATA_TYPE_{override.datatype}" != DataType.Name(spec.datatype):
            actual = DataType.Name(spec.datatype).removeprefix("DATA_TYPE_")
            raise InvalidArgument(
                f"{override.name!r} is {actual} in the file, not {override.datatype}",
                field=f"{place}.datatype",
            )
        if override.shape is not None:
            _check_shape(spec, override.shape, f"{place}.shape")
            spec.shape[:] = override.shape
        if override.columns is not None:
            spec.columns[:] = override.columns


def _check_shape(spec: TensorSpec, shape: Sequence[int], field: str) -> None:
    fits = len(shape) == len(spec.shape) and all(
        have in (-1, want) for have, want in zip(spec.shape, shape, strict=True)
    )
    if not fits:
        raise InvalidArgument(
            f"{spec.name!r} has shape {list(spec.shape)} in the file, which {list(shape)} contradicts",
            field=field,
        )


def _check_tokenizer(files: Mapping[str, Path]) -> None:
    path = files.get(TOKENIZER_FILE)
    if path is None:
        raise InvalidArgument(f"backend embedding needs a file {TOKENIZER_FILE}", field="files")
    if path.stat().st_size > _TOKENIZER_LIMIT:
        raise InvalidArgument(f"{TOKENIZER_FILE} is larger than any tokenizer", field="files")
    try:
        tokenizer = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deep
        raise InvalidArgument(f"{TOKENIZER_FILE} is not JSON", field="files") from error
    if not isinstance(tokenizer, dict) or not isinstance(tokenizer.get("model"), dict):
        raise InvalidArgument(f"{TOKENIZER_FILE} holds no tokenizer: it lacks `model`", field="files")


def _embedding_signature(encoder: Signature) -> Signature:
    """The public face of an encoder with its tokenizer: texts in, one vector each out."""
    unknown = sorted({spec.name for spec in encoder.inputs} - _ENCODER_INPUTS)
    if unknown:
        raise InvalidArgument(f"an encoder does not take {unknown}", field="files")
    vectors = [spec for spec in encoder.outputs if len(spec.shape) == 2]
    named = [spec for spec in vectors if spec.name == "embeddings"]
    chosen = named or vectors
    if len(chosen) != 1 or chosen[0].datatype != DataType.DATA_TYPE_FP32 or chosen[0].shape[1] < 1:
        raise InvalidArgument(
            "an encoder has one FP32 output of shape [-1, d], pooled inside the graph, with d known",
            field="files",
        )
    return Signature(
        inputs=[TensorSpec(name="text", datatype=DataType.DATA_TYPE_BYTES, shape=[-1])],
        outputs=[
            TensorSpec(name="embeddings", datatype=DataType.DATA_TYPE_FP32, shape=[-1, chosen[0].shape[1]])
        ],
        batched=True,
        task=Task.TASK_EMBEDDING,
        prediction_output="embeddings",
    )


def _no_model_file(files: Mapping[str, Path]) -> str:
    several = [path for path in files if path.endswith(".onnx")]
    if several:
        return f"of several ONNX files one is named {MODEL_FILE}; here are {', '.join(sorted(several)[:5])}"
    return (
        f"a version is an ONNX file, and here is {', '.join(sorted(files)[:5])}: export the model "
        "(skl2onnx.to_onnx, torch.onnx.export, onnxmltools)"
    )
