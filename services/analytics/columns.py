"""Records of the prediction log as Arrow columns: one row per logged request, no loop over requests."""

from __future__ import annotations

import re
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
from services.common.tensors import NUMPY_TYPES, decode_bytes

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

_MODEL = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
#: Empty: answered by the router for no version in particular.
_VERSION = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})?")
#: The end of the year 9999.
_LATEST_US = 253_402_300_799_000_000

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
    """One record of inference.predictions.v1. Raises InvalidArgument for one that cannot be kept: whatever
    passes here can be stored, so that no record stops the others behind it.

    A column may be absent (all zero); one that is there has an entry for every request.
    """
    try:
        batch = PredictionBatch.FromString(value or b"")
    except DecodeError:
        raise InvalidArgument("not a PredictionBatch") from None
    n, rest = divmod(len(batch.request_ids), 16)
    if len(batch.batch_id) != 16 or rest or not n:
        raise InvalidArgument("batch_id or request_ids are missing or cut")
    if not _MODEL.fullmatch(batch.model) or not _VERSION.fullmatch(batch.version):
        raise InvalidArgument("model or version is no name")
    if not 0 <= batch.answered_at_us <= _LATEST_US:
        raise InvalidArgument("answered_at_us is no time")
    for name in (*(field for field, _, _ in _NUMBERS), "variants"):
        length = len(getattr(batch, name))
        if length not in (0, n):
            raise InvalidArgument(f"{name} has {length} entries for {n} requests")
    if batch.variants and max(batch.variants) >= len(batch.variant_names):
        raise InvalidArgument("a variant is not named")
    for name in ("codes", "origins"):
        numbers = getattr(batch, name)
        if numbers and not 0 <= min(numbers) <= max(numbers) <= 255:
            raise InvalidArgument(f"{name} holds numbers that are none")
    if not 0 <= batch.writer <= 255 or any(
        "\0" in tensor.name for tensors in (batch.inputs, batch.outputs) for tensor in tensors
    ):
        raise InvalidArgument("the writer is unknown or a tensor has no proper name")
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
    answered = _Answered.of(counts, numbers["code"] == Code.CODE_OK, numbers["rows"].astype(np.int64))
    inputs = _payload([batch.inputs for batch in batches], answered)
    outputs = _payload([batch.outputs for batch in batches], answered)
    columns["predicted"], columns["predicted_text"] = _predictions(
        outputs.get(prediction_output) if prediction_output else next(iter(outputs.values()), None), answered
    )
    table = pa.table([columns[name] for name in CORE.names], schema=CORE)
    for kind, payload in (("input", inputs), ("output", outputs)):
        for name, tensor in payload.items():
            table = table.append_column(*tensor.column(f"{kind}:{name}", answered))
    return table


@dataclass(frozen=True, slots=True)
class _Answered:
    """Which requests have rows in the tensors of their record: `ok` and `rows` over all requests, `counts`,
    `ok_counts` and `ok_rows` over records."""

    counts: NDArray[np.int64]
    ok: NDArray[np.bool_]
    rows: NDArray[np.int64]
    ok_counts: NDArray[np.int64]
    ok_rows: NDArray[np.int64]

    @classmethod
    def of(cls, counts: NDArray[np.int64], ok: NDArray[np.bool_], rows: NDArray[np.int64]) -> _Answered:
        starts = np.cumsum(counts) - counts
        answered_rows = np.where(ok, rows, 0)
        return cls(
            counts,
            ok,
            answered_rows,
            np.add.reduceat(ok.astype(np.int64), starts),
            np.add.reduceat(answered_rows, starts),
        )


@dataclass(frozen=True, slots=True)
class _Tensors:
    """The tensors of one name of all records, end to end. Over records: `widths` elements a row, `whole`
    where one request owns the tensor as it is, `fits` where the tensor is one of these requests."""

    flat: pa.Array
    datatype: int
    row_shape: tuple[int, ...]
    widths: NDArray[np.int64]
    whole: NDArray[np.bool_]
    fits: NDArray[np.bool_]

    def rows(self, answered: _Answered) -> NDArray[np.int64]:
        """How many rows each request has in it."""
        whole = np.repeat(self.whole, answered.counts)
        rows = np.where(whole, answered.ok.astype(np.int64), answered.rows)
        return np.where(np.repeat(self.fits, answered.counts), rows, 0)

    def here(self, answered: _Answered) -> NDArray[np.bool_]:
        """Which requests have elements in it."""
        return answered.ok & np.repeat(self.fits, answered.counts)

    def column(self, name: str, answered: _Answered) -> tuple[pa.Field, pa.Array]:
        """Each request's elements, row-major; null where it has none. The metadata say datatype and shape of
        a row."""
        lengths = self.rows(answered) * np.repeat(self.widths, answered.counts)
        offsets = pa.array(np.concatenate(([0], np.cumsum(lengths))), pa.int64())
        values = pa.LargeListArray.from_arrays(offsets, self.flat, mask=pa.array(~self.here(answered)))
        shape = ",".join(str(size) for size in self.row_shape)
        return pa.field(
            name, values.type, metadata={"datatype": str(self.datatype), "row_shape": shape}
        ), values


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


def _payload(tensors_of: Sequence[Sequence[Tensor]], answered: _Answered) -> dict[str, _Tensors]:
    """The tensors by name, in the order in which the first record that has them names them."""
    by_name: dict[str, list[Tensor | None]] = {}
    for place, tensors in enumerate(tensors_of):
        for tensor in tensors:
            if tensor.name not in by_name:
                by_name[tensor.name] = [None] * len(tensors_of)
            by_name[tensor.name][place] = tensor
    joined = {name: _join(tensors, answered) for name, tensors in by_name.items()}
    return {name: tensors for name, tensors in joined.items() if tensors is not None}


def _join(tensors: Sequence[Tensor | None], answered: _Answered) -> _Tensors | None:
    """None where no tensor is one of its requests."""
    widths = np.zeros(len(tensors), dtype=np.int64)
    whole, fits = np.zeros(len(tensors), dtype=bool), np.zeros(len(tensors), dtype=bool)
    datatype, data, shapes = 0, [], set()
    ok_rows, ok_counts = answered.ok_rows.tolist(), answered.ok_counts.tolist()
    for place, tensor in enumerate(tensors):
        if tensor is None or datatype not in (0, tensor.datatype):
            continue
        shape = tuple(tensor.shape)
        batched = bool(shape) and shape[0] == ok_rows[place]
        # A model without a batch dimension answers one request a run, which owns the tensor as it is.
        if not batched and ok_counts[place] != 1:
            continue
        row_shape = shape[1:] if batched else shape
        if not _fills(tensor, prod(shape)):
            continue
        datatype = tensor.datatype
        widths[place], whole[place], fits[place] = prod(row_shape), not batched, True
        data.append(tensor.data)
        shapes.add(row_shape)
    if not data:
        return None
    row_shape = shapes.pop() if len(shapes) == 1 else ()
    return _Tensors(_flat(b"".join(data), datatype), datatype, row_shape, widths, whole, fits)


def _fills(tensor: Tensor, elements: int) -> bool:
    if tensor.datatype in NUMPY_TYPES:
        return len(tensor.data) == elements * NUMPY_TYPES[tensor.datatype].itemsize
    try:
        return len(decode_bytes(tensor.data)) == elements
    except InvalidArgument:
        return False


def _flat(data: bytes, datatype: int) -> pa.Array:
    if datatype == DataType.DATA_TYPE_BYTES:
        return pa.array(decode_bytes(data), pa.binary())
    array = np.frombuffer(data, NUMPY_TYPES[datatype])
    if datatype == DataType.DATA_TYPE_BF16:
        return pa.array((array.astype(np.uint32) << 16).view(np.float32))
    if datatype == DataType.DATA_TYPE_FP16:
        return pa.array(array.astype(np.float32))
    return pa.array(array)


def _predictions(tensors: _Tensors | None, answered: _Answered) -> tuple[pa.Array, pa.Array]:
    """The answer per row of each request, as numbers and as texts; null where there is none.

    One value a row is the answer; several are scores of classes, whose best is.
    """
    nothing = np.zeros(answered.ok.size, dtype=np.int64)
    numbers, texts = pa.array([], pa.float64()), pa.array([], pa.string())
    number_rows = text_rows = None
    if tensors is not None and np.unique(tensors.widths[tensors.fits]).size == 1:
        width = int(tensors.widths[tensors.fits][0])
        rows = tensors.rows(answered)
        if tensors.datatype == DataType.DATA_TYPE_BYTES:
            if width == 1:
                words = [one.decode("utf-8", "replace") for one in tensors.flat.to_pylist()]
                texts, text_rows = pa.array(words, pa.string()), rows
        elif 1 <= width <= _MAX_CLASSES:
            table = tensors.flat.to_numpy(zero_copy_only=False).reshape(-1, width)
            best = table[:, 0] if width == 1 else np.argmax(table, axis=1)
            numbers, number_rows = pa.array(best.astype(np.float64)), rows
    here = np.zeros(answered.ok.size, dtype=bool) if tensors is None else tensors.here(answered)
    return (
        _lists(numbers, nothing if number_rows is None else number_rows, here & (number_rows is not None)),
        _lists(texts, nothing if text_rows is None else text_rows, here & (text_rows is not None)),
    )


def _lists(flat: pa.Array, lengths: NDArray[np.int64], here: NDArray[np.bool_]) -> pa.Array:
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat, mask=pa.array(~here))
