"""Records of the prediction log as Arrow columns: one row per logged request, no loop over requests."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from google.protobuf.message import DecodeError
from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import Code
from numpy.typing import NDArray

from services.analytics.payload import Answered, predictions, tensors_by_name
from services.common.errors import InvalidArgument

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

MODEL = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
#: Empty: answered by the router for no version in particular.
_VERSION = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})?")
#: The end of the year 9999.
_LATEST_US = 253_402_300_799_000_000

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
    if not MODEL.fullmatch(batch.model) or not _VERSION.fullmatch(batch.version):
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


def without_payload(batch: PredictionBatch, prediction_output: str | None) -> PredictionBatch:
    """The record as statistics need it: of its tensors only the answer (see `to_table`) is left."""
    slim = PredictionBatch()
    slim.CopyFrom(batch)
    del slim.inputs[:]
    kept = [tensor for tensor in batch.outputs if tensor.name == prediction_output]
    if prediction_output == "":
        kept = list(batch.outputs[:1])
    del slim.outputs[:]
    slim.outputs.extend(kept)
    return slim


def layout(batch: PredictionBatch) -> str:
    """Names and types of the record's payload: records of one layout share a file."""
    parts = [
        f"{kind}:{tensor.name}:{tensor.datatype}"
        for kind, tensors in (("input", batch.inputs), ("output", batch.outputs))
        for tensor in tensors
    ]
    return ",".join(parts)


def to_table(batches: Sequence[PredictionBatch], prediction_output: str | None = "") -> pa.Table:
    """Records of one layout as one table. `prediction_output` names the output that holds the answer (empty:
    the first; None: not known, so no answer is taken from any). A payload that does not fit its requests is
    left out, never its requests.
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
    answered = Answered.of(counts, numbers["code"] == Code.CODE_OK, numbers["rows"].astype(np.int64))
    inputs = tensors_by_name([batch.inputs for batch in batches], answered)
    outputs = tensors_by_name([batch.outputs for batch in batches], answered)
    answer = None
    if prediction_output is not None:
        answer = outputs.get(prediction_output) if prediction_output else next(iter(outputs.values()), None)
    columns["predicted"], columns["predicted_text"] = predictions(answer, answered)
    table = pa.table([columns[name] for name in CORE.names], schema=CORE)
    for kind, payload in (("input", inputs), ("output", outputs)):
        for name, tensor in payload.items():
            table = table.append_column(*tensor.column(f"{kind}:{name}", answered))
    return table


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
