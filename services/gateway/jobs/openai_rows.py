"""An OpenAI batch file as rows of a job: every line's inputs through the codec of its route, written as an
Arrow file with one row per row of the model, and beside it what each line comes to.

So the workers see an ordinary tabular input, a line may hold any number of rows, and a line that its route
would refuse is refused with the same words. Blocking, in a thread; memory holds one batch of rows and a few
words per line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from headrace.v1.tensor_pb2 import Tensor

from services.common.errors import HeadraceError, InvalidArgument
from services.common.problems import http_status
from services.gateway.codecs import native, openai
from services.gateway.codecs.results import bytes_elements
from services.gateway.datatypes import BY_NUMBER, BYTES
from services.gateway.errors import openai_error
from services.gateway.jobs.openai_lines import EMBEDDINGS, Finding, Line, LineReader
from services.gateway.signature import InputSpec, ModelSignature

_FLUSH_ROWS = 4096
_FLUSH_BYTES = 8 << 20


class LinePlan(msgspec.Struct, array_like=True):
    """What becomes of one line: `rows` of the job, or, where that is 0, `status` and `error` at once."""

    custom_id: str
    rows: int
    #: One row without the list around it.
    single: bool = False
    base64: bool = False
    outputs: list[str] = []
    status: int = 0
    error: dict[str, str | None] | None = None


plans = msgspec.json.Decoder(LinePlan)


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a file came to. `rows` counts those of the job, 0 where every line was refused."""

    model: str
    version: str
    lines: int
    rows: int


class Refused(Exception):
    """The file is no batch."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        super().__init__(findings[0].message)
        self.findings = list(findings)


def first_line(source: Path, endpoint: str) -> tuple[str, str]:
    """Model and version that the file asks for. Raises Refused where no line says so."""
    reader = LineReader(endpoint)
    with source.open("rb") as file:
        for _line in reader.read(file):
            return reader.wanted.model, reader.wanted.version
    raise Refused(reader.findings)


def compile_lines(
    source: Path, endpoint: str, signature: ModelSignature, rows_to: Path, plans_to: Path
) -> Compiled:
    """Write the rows of `source` to `rows_to` (Arrow IPC file, a column per input) and a JSON line per line
    to `plans_to`. Raises Refused with everything found wrong with the lines themselves."""
    if not signature.batched:
        finding = Finding("unsupported_model", "The model takes no rows.", None, "body.model")
        raise Refused([finding])
    try:
        schema = pa.schema([pa.field(spec.name, arrow_type(spec)) for spec in signature.inputs])
    except InvalidArgument as error:  # whatever the lines say
        raise Refused([Finding("unsupported_model", error.message, None, "body.model")]) from None
    reader = LineReader(endpoint)
    total = 0
    with (
        source.open("rb") as file,
        plans_to.open("wb") as planned,
        pa.OSFile(str(rows_to), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        held: list[list[Tensor]] = []
        rows = size = 0
        for line in reader.read(file):
            plan, tensors = plan_of(line, endpoint, signature)
            planned.write(msgspec.json.encode(plan) + b"\n")
            if not tensors or reader.findings:
                continue
            held.append(tensors)
            rows += plan.rows
            size += sum(len(tensor.data) for tensor in tensors)
            total += plan.rows
            if rows >= _FLUSH_ROWS or size >= _FLUSH_BYTES:
                writer.write_batch(record_batch(schema, signature, held))
                held, rows, size = [], 0, 0
        if held:
            writer.write_batch(record_batch(schema, signature, held))
    if reader.findings:
        raise Refused(reader.findings)
    return Compiled(reader.wanted.model, reader.wanted.version, reader.count, total)


def plan_of(line: Line, endpoint: str, signature: ModelSignature) -> tuple[LinePlan, list[Tensor]]:
    """What `line` comes to, and its inputs; a line that its route would refuse has none."""
    try:
        if endpoint == EMBEDDINGS:
            body = openai.decode_embeddings(line.body)
            native.require_embedding(signature, body.model)
            tensors = openai.embedding_inputs(signature, body)
            plan = LinePlan(line.custom_id, tensors[0].shape[0], base64=body.encoding_format == "base64")
            return plan, tensors
        return _plan_of_native(line, signature)
    except HeadraceError as error:
        status = http_status(error)
        status = 400 if status == 422 else status
        return LinePlan(line.custom_id, 0, status=status, error=openai_error(error, status)), []


def _plan_of_native(line: Line, signature: ModelSignature) -> tuple[LinePlan, list[Tensor]]:
    body = native.decode_body(line.body)
    single, tensors = native.inputs_of(signature, body)
    native.check_outputs(signature, body.outputs or ())
    return LinePlan(line.custom_id, tensors[0].shape[0], single=single, outputs=body.outputs or []), tensors


def arrow_type(spec: InputSpec) -> pa.DataType:
    """The type of a column that holds rows of `spec`: lists, of a fixed length where it is known."""
    datatype = spec.datatype
    if datatype is BYTES:
        kind = pa.string()
    elif datatype.dtype is None:
        raise InvalidArgument(f"{spec.name} has a type that JSON does not have.", field=spec.name)
    else:
        kind = pa.from_numpy_dtype(datatype.dtype)
    for size in reversed(spec.row_shape):
        kind = pa.list_(kind, size) if size >= 0 else pa.list_(kind)
    return kind


def record_batch(
    schema: pa.Schema, signature: ModelSignature, held: Sequence[Sequence[Tensor]]
) -> pa.RecordBatch:
    """The inputs of several lines below each other."""
    columns = []
    for position, spec in enumerate(signature.inputs):
        tensors = [line[position] for line in held]
        columns.append(_column(schema.field(position).type, spec, tensors))
    return pa.record_batch(columns, schema=schema)


def _column(kind: pa.DataType, spec: InputSpec, tensors: Sequence[Tensor]) -> pa.Array:
    if spec.datatype is BYTES:
        return pa.array([row for tensor in tensors for row in rows_of(tensor)], kind)
    if any(size < 0 for size in spec.row_shape):
        return pa.concat_arrays([_numbers(spec, tensor.data, tensor.shape[1:]) for tensor in tensors])
    return _numbers(spec, b"".join([tensor.data for tensor in tensors]), spec.row_shape)


def _numbers(spec: InputSpec, data: bytes, shape: Sequence[int]) -> pa.Array:
    """Rows of `shape`, as lists in lists. Not by pyarrow's own way from rows, which takes no array of two
    dimensions for a list of lists."""
    array: pa.Array = pa.array(np.frombuffer(data, spec.datatype.dtype))
    for size, declared in reversed(list(zip(shape, spec.row_shape, strict=True))):
        if declared >= 0:
            array = pa.FixedSizeListArray.from_arrays(array, size)
        else:
            array = pa.ListArray.from_arrays(np.arange(0, len(array) + 1, size, dtype=np.int32), array)
    return array


def rows_of(tensor: Tensor) -> list[Any]:
    """The rows of a tensor: texts in lists, numbers as arrays, so that FP32 keeps its short form in JSON."""
    datatype = BY_NUMBER[tensor.datatype]
    if datatype is not BYTES:
        return list(np.frombuffer(tensor.data, datatype.dtype).reshape(tensor.shape))
    parts = [part.decode() for part in bytes_elements(tensor.data)]
    elements = np.empty(len(parts), dtype=object)
    elements[:] = parts
    texts: list[Any] = elements.reshape(tensor.shape).tolist()
    return texts
