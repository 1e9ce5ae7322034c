"""Records of the prediction log as Arrow columns: one row per logged request, no loop over requests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from google.protobuf.message import DecodeError
from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import Code
from numpy.typing import NDArray

from services.analytics.arrays import numbers_array, texts_array
from services.analytics.packed import Packed
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
        # Null: assigned by no experiment. Segments from before there were any lack the column.
        ("experiment", pa.dictionary(pa.int32(), pa.string())),
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

#: Names that were looked at before: most records are of a few versions.
_known_names: set[tuple[str, str]] = set()
_MAX_KNOWN = 10_000

#: Bytes of a record below which it is mostly numbers.
_SMALL = 64 << 10

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


class Logged(NamedTuple):
    """A record of the prediction log, as it came and parsed, with how many requests it tells of."""

    batch_id: bytes
    value: bytes
    batch: PredictionBatch
    requests: int

    @classmethod
    def of(cls, batch: PredictionBatch, value: bytes) -> Logged:
        return cls(batch.batch_id, value, batch, len(batch.request_ids) // 16)


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
    name = (batch.model, batch.version)
    if name not in _known_names:
        _check_names(*name)
    if not 0 <= batch.answered_at_us <= _LATEST_US:
        raise InvalidArgument("answered_at_us is no time")
    # Repeated fields are sliced wherever they are read: iterating them is several times as slow.
    codes, origins, variants = batch.codes, batch.origins, batch.variants
    lengths = {
        len(batch.unit_hashes),
        len(batch.propensities),
        len(batch.revisions),
        len(codes),
        len(origins),
        len(batch.attempts),
        len(batch.cached),
        len(batch.latency_us),
        len(batch.queue_us),
        len(batch.compute_us),
        len(batch.rows),
        len(variants),
        len(batch.answered_before_us),
        len(batch.experiments),
    }
    if not lengths <= {0, n}:
        _blame_column(batch, n)
    if max(variants[:], default=-1) >= len(batch.variant_names):
        raise InvalidArgument("a variant is not named")
    if batch.experiments and max(batch.experiments[:]) > len(batch.experiment_ids):
        raise InvalidArgument("an experiment is not named")
    numbers = {*codes[:], *origins[:], batch.writer}
    if not 0 <= min(numbers) <= max(numbers) <= 255:
        raise InvalidArgument("codes, origins or the writer hold numbers that are none")
    for tensor in batch.inputs[:] + batch.outputs[:]:
        if "\0" in tensor.name:
            raise InvalidArgument("a tensor has no proper name")
    return batch


def _check_names(model: str, version: str) -> None:
    if not MODEL.fullmatch(model) or not _VERSION.fullmatch(version):
        raise InvalidArgument("model or version is no name")
    if len(_known_names) >= _MAX_KNOWN:
        _known_names.clear()
    _known_names.add((model, version))


def _blame_column(batch: PredictionBatch, n: int) -> None:
    for name in (*(field for field, _, _ in _NUMBERS), "variants", "answered_before_us", "experiments"):
        length = len(getattr(batch, name))
        if length not in (0, n):
            raise InvalidArgument(f"{name} has {length} entries for {n} requests")


def drop_payload(batch: PredictionBatch, prediction_output: str | None) -> PredictionBatch:
    """The record, changed to what statistics need: of its tensors only the answer (see `to_table`) stays."""
    del batch.inputs[:]
    outputs = batch.outputs
    if prediction_output == "":
        del outputs[1:]
    elif len(outputs) != 1 or outputs[0].name != prediction_output:
        kept = [tensor for tensor in outputs if tensor.name == prediction_output]
        del outputs[:]
        outputs.extend(kept)
    return batch


def layout(batch: PredictionBatch) -> str:
    """Names and types of the record's payload: records of one layout share a file."""
    parts = [
        f"{kind}:{tensor.name}:{tensor.datatype}"
        for kind, tensors in (("input", batch.inputs[:]), ("output", batch.outputs[:]))
        for tensor in tensors
    ]
    return ",".join(parts)


def to_table(
    batches: Sequence[PredictionBatch],
    prediction_output: str | None = "",
    values: Sequence[bytes] | None = None,
) -> pa.Table:
    """Records of one layout as one table. `prediction_output` names the output that holds the answer (empty:
    the first; None: not known, so no answer is taken from any). A payload that does not fit its requests is
    left out, never its requests. `values` are the serialized records, where they are at hand.
    """
    whole = _whole(values)
    # A record's bytes are walked field by field; those of many small ones are fewer fields together.
    packed = Packed(values if whole is None else [whole.SerializeToString()]) if values else None
    counts = np.array([len(batch.request_ids) // 16 for batch in batches], dtype=np.int64)
    total = int(counts.sum())
    columns: dict[str, pa.Array] = {
        "request_id": _binary(b"".join([batch.request_ids for batch in batches])),
        "batch_id": _binary(b"".join([batch.batch_id * n for batch, n in zip(batches, counts, strict=True)])),
        "position": numbers_array(
            (np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)).astype("u4")
        ),
        "writer": numbers_array(np.repeat([batch.writer for batch in batches], counts).astype("u1")),
        "answered_at_us": numbers_array(_answered_at(batches, counts, packed)),
        "variant": _variants(batches, counts, whole),
        "experiment": _experiments(batches, counts, whole),
    }
    for name in ("source", "model", "version", "artifact_digest"):
        columns[name] = _repeated([getattr(batch, name) for batch in batches], counts)
    numbers = {column: _numbers(batches, counts, packed, field, kind) for field, column, kind in _NUMBERS}
    numbers["origin"] = np.maximum(numbers["origin"], 1)  # unspecified is online
    for column, figures in numbers.items():
        columns[column] = numbers_array(figures)
    answered = Answered.of(counts, numbers["code"] == Code.CODE_OK, numbers["rows"].astype(np.int64))
    inputs = tensors_by_name([batch.inputs[:] for batch in batches], answered)
    outputs = tensors_by_name([batch.outputs[:] for batch in batches], answered)
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


def _whole(values: Sequence[bytes] | None) -> PredictionBatch | None:
    """All records as one: serialized messages end to end are one message in which repeated fields are
    joined. That is a tenth of the work of asking each, unless their tensors, which are copied, are large."""
    if values is None or sum(map(len, values)) > _SMALL * len(values):
        return None
    return PredictionBatch.FromString(b"".join(values))


def _numbers(
    batches: Sequence[PredictionBatch],
    counts: NDArray[np.int64],
    packed: Packed | None,
    field: str,
    kind: str,
) -> NDArray[np.generic]:
    # A record has an entry for each of its requests, or none: as many as requests are all of them.
    found = packed.numbers(field, int(counts.sum())) if packed is not None else None
    if found is not None:
        return found.astype(kind)
    given = [getattr(batch, field)[:] for batch in batches]
    if not any(given):
        return np.zeros(counts.sum(), dtype=kind)
    values: list[float] = []
    for entries, n in zip(given, counts.tolist(), strict=True):
        values += entries or [0] * n
    return np.array(values, dtype=kind)


def _answered_at(
    batches: Sequence[PredictionBatch], counts: NDArray[np.int64], packed: Packed | None
) -> NDArray[np.int64]:
    at = np.repeat(np.array([batch.answered_at_us for batch in batches], dtype=np.int64), counts)
    before = _numbers(batches, counts, packed, "answered_before_us", "i8")
    return at - before.astype(np.int64)


def _repeated(names: Sequence[str], counts: NDArray[np.int64]) -> pa.Array:
    known = list(dict.fromkeys(names))
    place_of = {name: place for place, name in enumerate(known)}
    places = np.repeat(np.array([place_of[name] for name in names], dtype=np.int32), counts)
    return pa.DictionaryArray.from_arrays(numbers_array(places), texts_array(known))


def _variants(
    batches: Sequence[PredictionBatch], counts: NDArray[np.int64], whole: PredictionBatch | None
) -> pa.Array:
    if whole is not None and not any(whole.variants[:]) and _one_name_each(batches, whole):
        return _repeated(whole.variant_names[:], counts)
    known: dict[str, int] = {}
    parts = []
    for batch, n in zip(batches, counts.tolist(), strict=True):
        names = batch.variant_names[:] or [batch.version]
        places = np.array([known.setdefault(name, len(known)) for name in names], dtype=np.int32)
        parts.append(places[np.array(batch.variants[:] or [0] * n, dtype=np.int64)])
    return pa.DictionaryArray.from_arrays(numbers_array(np.concatenate(parts)), texts_array(list(known)))


def _experiments(
    batches: Sequence[PredictionBatch], counts: NDArray[np.int64], whole: PredictionBatch | None
) -> pa.Array:
    """Null where no experiment assigned a request. Records without the column have no entries in it."""
    ids: list[str] = []
    if whole is not None:
        ids = whole.experiment_ids[:]
    else:
        for batch in batches:
            ids += batch.experiment_ids[:]
    if not ids:
        return pa.nulls(int(counts.sum()), CORE.field("experiment").type)
    entries: list[int] = []
    for batch in batches:
        entries += batch.experiments[:]
    named = np.array([len(batch.experiment_ids) for batch in batches], dtype=np.int64)
    local = np.zeros(counts.sum(), dtype=np.int64)
    local[np.repeat([bool(batch.experiments) for batch in batches], counts)] = entries
    # Its place among the ids of all records, then among those that differ.
    place = np.maximum(local - 1, 0) + np.repeat(np.cumsum(named) - named, counts)
    known = {name: index for index, name in enumerate(dict.fromkeys(ids))}
    of_place = np.array([*(known[name] for name in ids), 0], dtype=np.int32)
    indices = pa.array(of_place[place], mask=local == 0)
    return pa.DictionaryArray.from_arrays(indices, texts_array(list(known)))


def _one_name_each(batches: Sequence[PredictionBatch], whole: PredictionBatch) -> bool:
    names = len(whole.variant_names)
    return names == len(batches) and all(len(batch.variant_names) == 1 for batch in batches)
