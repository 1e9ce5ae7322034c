"""Records of the prediction log as Arrow columns: one row per logged request, no loop over requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import pyarrow as pa
from google.protobuf.message import DecodeError
from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import Code, DataType, Tensor
from numpy.typing import NDArray

from services.common.errors import InvalidArgument
from services.common.tensors import to_array

#: Columns that every segment has; `input:<name>` and `output:<name>` follow where payloads are logged.
CORE = pa.schema(
    [
        ("request_id", pa.binary(16)),
        ("batch_id", pa.binary(16)),
        ("position", pa.uint32()),
        ("writer", pa.uint8()),
        ("source", pa.dictionary(pa.int32(), pa.string())),
        ("model", pa.dictionary(pa.int32(), pa.string())),
        ("version", pa.dictionary(pa.int32(), pa.string())),
        ("artifact_digest", pa.dictionary(pa.int32(), pa.string())),
        ("variant", pa.dictionary(pa.int32(), pa.string())),
        ("unit_hash", pa.uint64()),
        ("propensity", pa.float32()),
        ("revision", pa.uint64()),
        ("code", pa.uint8()),
        ("origin", pa.uint8()),
        ("attempt", pa.uint32()),
        ("cached", pa.bool_()),
        ("answered_at_us", pa.int64()),
        ("latency_us", pa.uint32()),
        ("queue_us", pa.uint32()),
        ("compute_us", pa.uint32()),
        ("rows", pa.uint32()),
        ("predicted", pa.list_(pa.float64())),
        ("predicted_text", pa.list_(pa.string())),
    ]
)

#: Wider answers than that (embeddings) are no class scores.
_MAX_CLASSES = 1000

_NUMBERS: tuple[tuple[str, str, str], ...] = (
    # field of the record, column, numpy type
    ("unit_hashes", "unit_hash", "u8"),
    ("propensities", "propensity", "f4"),
    ("revisions", "revision", "u8"),
    ("codes", "code", "u1"),
    ("origins", "origin", "u1"),
    ("attempts", "attempt", "u4"),
    ("cached", "cached", "?"),
    ("latency_us", "latency_us", "u4"),
    ("queue_us", "queue_us", "u4"),
    ("compute_us", "compute_us", "u4"),
    ("rows", "rows", "u4"),
)


def parse(value: bytes | None) -> PredictionBatch:
    """One record of inference.predictions.v1. Raises InvalidArgument where its columns do not fit together.

    A column may be absent (all zero); one that is there has an entry for every request.
    """
    try:
        batch = PredictionBatch.FromString(value or b"")
    except DecodeError:
        raise InvalidArgument("not a PredictionBatch") from None
    n, rest = divmod(len(batch.request_ids), 16)
    if len(batch.batch_id) != 16 or not batch.model or rest or not n:
        raise InvalidArgument("batch_id, model or request_ids are missing or cut")
    for name in (*(field for field, _, _ in _NUMBERS), "variants"):
        length = len(getattr(batch, name))
        if length not in (0, n):
            raise InvalidArgument(f"{name} has {length} entries for {n} requests")
    if batch.variants and max(batch.variants) >= len(batch.variant_names):
        raise InvalidArgument("a variant is not named")
    return batch


def layout(batch: PredictionBatch) -> str:
    """Names and types of the record's payload: records of one layout share a file."""
    parts = [
        f"{kind}:{tensor.name}:{tensor.datatype}"
        for kind, tensors in (("input", batch.inputs), ("output", batch.outputs))
        for tensor in tensors
    ]
    return ",".join(parts)


def to_table(batches: Sequence[PredictionBatch], prediction_output: str = "") -> pa.Table:
    """Records of one layout as one table. `prediction_output` names the output that holds the answer (empty:
    the first). A payload that does not fit its requests is left out, never its requests.
    """
    counts = np.array([len(batch.request_ids) // 16 for batch in batches], dtype=np.int64)
    total = int(counts.sum())
    columns: dict[str, pa.Array] = {
        "request_id": _binary(b"".join([batch.request_ids for batch in batches])),
        "batch_id": _binary(b"".join([batch.batch_id * n for batch, n in zip(batches, counts, strict=True)])),
        "position": pa.array(np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts), pa.uint32()),
        "writer": pa.array(np.repeat([batch.writer for batch in batches], counts), pa.uint8()),
        "answered_at_us": pa.array(
            np.repeat([batch.answered_at_us for batch in batches], counts), pa.int64()
        ),
        "variant": _variants(batches, counts),
    }
    for name in ("source", "model", "version", "artifact_digest"):
        columns[name] = _repeated([getattr(batch, name) for batch in batches], counts)
    numbers = {column: _numbers(batches, counts, field, kind) for field, column, kind in _NUMBERS}
    numbers["origin"] = np.maximum(numbers["origin"], 1)  # unspecified is online
    for column, values in numbers.items():
        columns[column] = pa.array(values, CORE.field(column).type)
    answered = _Answered(counts, numbers["code"] == Code.CODE_OK, numbers["rows"].astype(np.int64))
    columns["predicted"], columns["predicted_text"] = _predictions(batches, answered, prediction_output)
    payload = {
        **_payload("input", [batch.inputs for batch in batches], answered),
        **_payload("output", [batch.outputs for batch in batches], answered),
    }
    table = pa.table([columns[name] for name in CORE.names], schema=CORE)
    for field, values in payload.items():
        table = table.append_column(field, values)
    return table


@dataclass(frozen=True, slots=True)
class _Answered:
    """Which requests of each record have rows in its tensors. `ok` and `rows` are over all requests."""

    counts: NDArray[np.int64]
    ok: NDArray[np.bool_]
    rows: NDArray[np.int64]

    def of_batch(self, place: int) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """`ok` and `rows` of one record's requests."""
        end = int(self.counts[: place + 1].sum())
        part = slice(end - int(self.counts[place]), end)
        return self.ok[part], self.rows[part]


@dataclass(frozen=True, slots=True)
class _Values:
    """One tensor of one record, flat, and how many elements each of its requests has in it."""

    flat: pa.Array
    lengths: NDArray[np.int64]
    row_shape: tuple[int, ...]
    datatype: int


def _binary(data: bytes) -> pa.Array:
    return pa.Array.from_buffers(pa.binary(16), len(data) // 16, [None, pa.py_buffer(data)])


def _numbers(
    batches: Sequence[PredictionBatch], counts: NDArray[np.int64], field: str, kind: str
) -> NDArray[np.generic]:
    values: list[float] = []
    for batch, n in zip(batches, counts.tolist(), strict=True):
        values.extend(getattr(batch, field) or [0] * n)
    return np.array(values, dtype=kind)


def _repeated(names: Sequence[str], counts: NDArray[np.int64]) -> pa.Array:
    known = list(dict.fromkeys(names))
    places = np.repeat(np.array([known.index(name) for name in names], dtype=np.int32), counts)
    return pa.DictionaryArray.from_arrays(pa.array(places, pa.int32()), pa.array(known, pa.string()))


def _variants(batches: Sequence[PredictionBatch], counts: NDArray[np.int64]) -> pa.Array:
    known: dict[str, int] = {}
    parts = []
    for batch, n in zip(batches, counts.tolist(), strict=True):
        names = list(batch.variant_names) or [batch.version]
        places = np.array([known.setdefault(name, len(known)) for name in names], dtype=np.int32)
        parts.append(places[np.array(batch.variants or [0] * n, dtype=np.int64)])
    indices = pa.array(np.concatenate(parts), pa.int32())
    return pa.DictionaryArray.from_arrays(indices, pa.array(list(known), pa.string()))


def _values(tensor: Tensor, ok: NDArray[np.bool_], rows: NDArray[np.int64]) -> _Values | None:
    """None where the tensor is not one of these requests."""
    shape = tuple(tensor.shape)
    lengths = np.where(ok, rows, 0)
    if shape and shape[0] == lengths.sum():
        row_shape = shape[1:]
        lengths = lengths * prod(row_shape)
    elif ok.sum() == 1:  # a model without a batch dimension answers one request a run
        row_shape = shape
        lengths = np.where(ok, prod(shape), 0)
    else:
        return None
    try:
        array = to_array(tensor.data, tensor.datatype, shape).ravel()
    except InvalidArgument:
        return None
    if tensor.datatype == DataType.DATA_TYPE_BYTES:
        flat = pa.array(array.tolist(), pa.binary())
    elif tensor.datatype == DataType.DATA_TYPE_BF16:
        flat = pa.array((array.astype(np.uint32) << 16).view(np.float32))
    elif tensor.datatype == DataType.DATA_TYPE_FP16:
        flat = pa.array(array.astype(np.float32))
    else:
        flat = pa.array(array)
    return _Values(flat, lengths, row_shape, tensor.datatype)


def _payload(
    kind: str, tensors_of: Sequence[Sequence[Tensor]], answered: _Answered
) -> dict[pa.Field, pa.Array]:
    """A list column per tensor: each request's elements, row-major; null where it has none. The field's
    metadata say datatype and shape of a row."""
    found: dict[pa.Field, pa.Array] = {}
    names = list(dict.fromkeys(tensor.name for tensors in tensors_of for tensor in tensors))
    for name in names:
        parts: list[_Values | None] = []
        for place, tensors in enumerate(tensors_of):
            tensor = next((one for one in tensors if one.name == name), None)
            parts.append(None if tensor is None else _values(tensor, *answered.of_batch(place)))
        present = [part for part in parts if part is not None]
        if not present:
            continue
        column = _lists(parts, present, answered)
        shape = ",".join(str(size) for size in present[0].row_shape)
        details = {"datatype": str(present[0].datatype), "row_shape": shape}
        found[pa.field(f"{kind}:{name}", column.type, metadata=details)] = column
    return found


def _lists(parts: Sequence[_Values | None], present: Sequence[_Values], answered: _Answered) -> pa.Array:
    lengths = np.concatenate(
        [
            np.zeros(int(n), dtype=np.int64) if part is None else part.lengths
            for part, n in zip(parts, answered.counts, strict=True)
        ]
    )
    here = np.concatenate(
        [np.full(int(n), part is not None) for part, n in zip(parts, answered.counts, strict=True)]
    )
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    flat = pa.concat_arrays([part.flat for part in present])
    mask = pa.array(~(here & answered.ok))
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), flat, mask=mask)


def _predictions(
    batches: Sequence[PredictionBatch], answered: _Answered, output: str
) -> tuple[pa.Array, pa.Array]:
    """The answer per row of each request, as numbers and as texts; null where there is none.

    One value a row is the answer; several are scores of classes, whose best is.
    """
    numbers: list[NDArray[np.float64]] = []
    texts: list[str] = []
    number_lengths, text_lengths = np.zeros(answered.ok.size, np.int64), np.zeros(answered.ok.size, np.int64)
    has_number, has_text = np.zeros(answered.ok.size, bool), np.zeros(answered.ok.size, bool)
    start = 0
    for place, batch in enumerate(batches):
        ok, rows = answered.of_batch(place)
        part = slice(start, start + ok.size)
        start += ok.size
        tensor = next((one for one in batch.outputs if one.name == output), None)
        if tensor is None and batch.outputs and not output:
            tensor = batch.outputs[0]
        values = None if tensor is None else _values(tensor, ok, rows)
        answer_rows = np.where(ok, rows, 0)
        count = int(answer_rows.sum())
        if values is None or not count or len(values.flat) % count:
            continue
        width = len(values.flat) // count
        if values.datatype == DataType.DATA_TYPE_BYTES:
            if width == 1:
                texts += [one.decode("utf-8", "replace") for one in values.flat.to_pylist()]
                text_lengths[part], has_text[part] = answer_rows, ok
        elif 1 <= width <= _MAX_CLASSES:
            table = values.flat.to_numpy(zero_copy_only=False).astype(np.float64).reshape(count, width)
            numbers.append(table[:, 0] if width == 1 else np.argmax(table, axis=1).astype(np.float64))
            number_lengths[part], has_number[part] = answer_rows, ok
    flat = np.concatenate(numbers) if numbers else np.zeros(0)
    return (
        _small_lists(pa.array(flat, pa.float64()), number_lengths, has_number),
        _small_lists(pa.array(texts, pa.string()), text_lengths, has_text),
    )


def _small_lists(flat: pa.Array, lengths: NDArray[np.int64], here: NDArray[np.bool_]) -> pa.Array:
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat, mask=pa.array(~here))
