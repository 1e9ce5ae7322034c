"""What a chunk came to, as bytes: answers as an Arrow IPC stream, failures as JSON lines. Nothing in them
depends on time, worker or attempt, so that a chunk done again gives the same bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import numpy as np
import orjson
import pyarrow as pa
from headrace.v1.tensor_pb2 import Code, Signature

from services.common.errors import HeadraceError
from services.worker.batch.rows import Places
from services.worker.tensors import Array

BATCH_ROWS = 8192


@dataclass(frozen=True, slots=True)
class Answers:
    """Rows that were answered, all of one shape: `places` ascending, `outputs` with the rows first."""

    places: Places
    outputs: Mapping[str, Array]


def results_bytes(
    answers: Sequence[Answers],
    first_row: int,
    custom_ids: Sequence[str | None] | None,
    shapes: Mapping[str, tuple[int, ...]],
) -> bytes:
    """Columns `row`, `custom_id` where there are ids, and one per output; in the order of the rows, batches
    of at most 8,192. `shapes` are those of one row of each output, -1 where it varies; empty bytes where no
    row was answered."""
    if not answers:
        return b""
    places = np.concatenate([part.places for part in answers])
    order = None if len(answers) == 1 else np.argsort(places, kind="stable")
    columns: dict[str, pa.Array] = {}
    ordered = places if order is None else places[order]
    columns["row"] = pa.array((ordered + first_row).astype(np.uint64))
    if custom_ids is not None:
        if len(ordered) == len(custom_ids):
            columns["custom_id"] = pa.array(custom_ids, pa.string())
        else:
            columns["custom_id"] = pa.array([custom_ids[place] for place in ordered.tolist()], pa.string())
    for name in answers[0].outputs:
        arrays = [part.outputs[name] for part in answers]
        column = _column(arrays, shapes.get(name, arrays[0].shape[1:]))
        columns[name] = column if order is None else column.take(pa.array(order))
    sink = io.BytesIO()
    batch = pa.record_batch(columns)
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        for first in range(0, batch.num_rows, BATCH_ROWS):
            writer.write_batch(batch.slice(first, BATCH_ROWS))
    return sink.getvalue()


def errors_bytes(
    failures: Mapping[int, HeadraceError], first_row: int, custom_ids: Sequence[str | None] | None
) -> bytes:
    """One line per failed row, in their order."""
    lines = []
    for place in sorted(failures):
        error = failures[place]
        line: dict[str, object] = {"row": first_row + place}
        if custom_ids is not None and custom_ids[place] is not None:
            line["custom_id"] = custom_ids[place]
        told = {"code": Code.Name(error.code).removeprefix("CODE_"), "message": error.message}
        line["error"] = told | ({"field": error.field} if error.field else {})
        lines.append(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
    return b"".join(lines)


def output_shapes(signature: Signature) -> dict[str, tuple[int, ...]]:
    """The shape of one row of every output: the columns' types follow the signature, never a chunk's data."""
    skipped = 1 if signature.batched else 0
    return {spec.name: tuple(spec.shape)[skipped:] for spec in signature.outputs}


def _column(arrays: Sequence[Array], shape: tuple[int, ...]) -> pa.Array:
    """One output of all rows. Where a row's shape is fixed, fixed-size lists, else lists."""
    rows = sum(len(array) for array in arrays)
    rank = arrays[0].ndim - 1
    if len(shape) != rank:
        shape = (-1,) * rank
    flat = (
        np.concatenate([array.reshape(-1) for array in arrays]) if len(arrays) > 1 else arrays[0].reshape(-1)
    )
    column = _values(flat)
    for axis in range(rank - 1, -1, -1):
        size, sizes = shape[axis], {array.shape[axis + 1] for array in arrays}
        if size >= 0 and sizes == {size}:
            column = pa.FixedSizeListArray.from_arrays(column, size)
            continue
        lists = [(prod(array.shape[: axis + 1]), array.shape[axis + 1]) for array in arrays]
        lengths = np.concatenate([np.full(count, length, np.int64) for count, length in lists])
        offsets = np.fromiter(accumulate(lengths.tolist(), initial=0), np.int64, len(lengths) + 1)
        column = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), column)
    if len(column) != rows:
        raise ValueError(f"{len(column)} results for {rows} rows")
    return column


def _values(flat: Array) -> pa.Array:
    if flat.dtype != object:
        return pa.array(flat)
    if any(isinstance(value, bytes) for value in flat):
        return pa.array([value if isinstance(value, bytes) else str(value).encode() for value in flat])
    return pa.array([str(value) for value in flat], pa.string())
