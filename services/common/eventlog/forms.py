"""Forms of prediction records: what is the same, byte for byte, in all records that one writer makes of
batches of one size, and where in them stands what differs.

A record is parsed once to learn its form. One that fits a known form is cut apart by comparing and slicing,
which costs a quarter of parsing it and comparing its layout; the pieces are what a joined record is made of.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import Tensor

#: Equal for records that can be joined.
Layout = tuple[object, ...]

#: Columns that every record has, with a number per request.
COLUMNS: Final = (
    "unit_hashes", "variants", "propensities", "revisions", "codes", "origins", "attempts", "cached",
    "latency_us", "queue_us", "compute_us", "rows",
)  # fmt: skip

#: What is cut out of a record, in this order: batch id, time, request ids, unit hashes; latency, queue and
#: compute (columns of varints, of any length); the data of inputs, then of outputs.
Cut = tuple[bytes, int, bytes, bytes, bytes, bytes, bytes, *tuple[bytes, ...]]

_BATCH_ID: Final = PredictionBatch.BATCH_ID_FIELD_NUMBER
_ANSWERED_AT: Final = PredictionBatch.ANSWERED_AT_US_FIELD_NUMBER
_REQUEST_IDS: Final = PredictionBatch.REQUEST_IDS_FIELD_NUMBER
_UNIT_HASHES: Final = PredictionBatch.UNIT_HASHES_FIELD_NUMBER
_VARIANTS: Final = PredictionBatch.VARIANTS_FIELD_NUMBER
#: Columns of numbers of any length, which differ in the records of a form.
VARINT_COLUMNS: Final = (
    PredictionBatch.LATENCY_US_FIELD_NUMBER,
    PredictionBatch.QUEUE_US_FIELD_NUMBER,
    PredictionBatch.COMPUTE_US_FIELD_NUMBER,
)
_TENSORS: Final = (PredictionBatch.INPUTS_FIELD_NUMBER, PredictionBatch.OUTPUTS_FIELD_NUMBER)
#: All columns that differ, in the order of a Cut.
CUT_COLUMNS: Final = (_REQUEST_IDS, _UNIT_HASHES, *VARINT_COLUMNS)
_DIFFERS: Final = (_BATCH_ID, _ANSWERED_AT, *CUT_COLUMNS)
_REPEATED: Final = (
    *_TENSORS, PredictionBatch.VARIANT_NAMES_FIELD_NUMBER, PredictionBatch.EXPERIMENT_IDS_FIELD_NUMBER,
)  # fmt: skip
_KNOWN: Final = frozenset(PredictionBatch.DESCRIPTOR.fields_by_number) - {
    PredictionBatch.ANSWERED_BEFORE_US_FIELD_NUMBER
}
#: Columns that are the same in all records of a form, by field number.
SAME_COLUMNS: Final = (
    _VARIANTS,
    PredictionBatch.PROPENSITIES_FIELD_NUMBER,
    PredictionBatch.REVISIONS_FIELD_NUMBER,
    PredictionBatch.CODES_FIELD_NUMBER,
    PredictionBatch.ORIGINS_FIELD_NUMBER,
    PredictionBatch.ATTEMPTS_FIELD_NUMBER,
    PredictionBatch.CACHED_FIELD_NUMBER,
    PredictionBatch.ROWS_FIELD_NUMBER,
    PredictionBatch.EXPERIMENTS_FIELD_NUMBER,
)


class _Run:
    """A stretch of a record with fixed places: constants, and between them what differs."""

    __slots__ = ("constants", "layout", "size")

    def __init__(self, layout: str, constants: tuple[object, ...]) -> None:
        compiled = struct.Struct(layout)
        self.layout = compiled.unpack_from
        self.size = compiled.size
        self.constants = constants


class Form:
    """One form. `layout` is that of all its records, `requests` how many each has, `rows` those of its
    tensors; `columns` are the contents of SAME_COLUMNS, empty where there are none."""

    __slots__ = ("_first", "_rest", "columns", "example", "layout", "requests", "rows")

    def __init__(
        self, example: PredictionBatch, layout: Layout, columns: tuple[bytes, ...], runs: list[_Run]
    ) -> None:
        self.example = example
        self.layout = layout
        self.columns = columns
        self.requests = len(example.request_ids) // 16
        self.rows = sum([rows for rows, code in zip(example.rows, example.codes, strict=True) if not code])
        self._first, *self._rest = runs

    def cut(self, record: bytes) -> Cut | None:
        """What `record` has in the places that differ; None where it is of another form."""
        first = self._first
        try:
            got = first.layout(record)
            if got[::2] != first.constants:
                return None
            cut = got[1::2]
            at = first.size
            for run in self._rest:
                length = record[at]
                at += 1
                if length > 127:
                    high = record[at]
                    if high > 127:
                        return None
                    length += (high - 1) << 7
                    at += 1
                end = at + length
                if record[end - 1] > 127:  # the last number is cut short
                    return None
                got = run.layout(record, end)
                if got[::2] != run.constants:
                    return None
                cut += (record[at:end], *got[1::2])
                at = end + run.size
        except (struct.error, IndexError):
            return None
        return cut if at == len(record) else None


def learn(data: bytes, record: PredictionBatch, layout: Layout) -> Form | None:
    """The form of `data`, which is `record` and has `layout`; None where it is in none: records of our own
    writers all are."""
    requests = len(record.request_ids) // 16
    if not requests or len(record.request_ids) % 16 or len(record.batch_id) != 16:
        return None
    if any(len(getattr(record, name)) != requests for name in COLUMNS):
        return None
    if len(record.experiments) != (requests if record.experiment_ids else 0):
        return None
    runs = _runs(data)
    if runs is None:
        return None
    # Of the bytes as protobuf writes them: the columns of a joined record are made of these.
    canonical = record.SerializeToString()
    contents = {number: canonical[start:end] for number, _, start, end in fields(canonical)}
    example = PredictionBatch()
    example.CopyFrom(record)
    return Form(example, layout, tuple([contents.get(number, b"") for number in SAME_COLUMNS]), runs)


def place(data: bytes) -> int:
    """Where in records like this one stands how many requests it has: a few bytes from there on tell most
    forms of one writer apart. 0 where that is nowhere."""
    for number, tag, _, _ in fields(data):
        if number in (_VARIANTS, _REQUEST_IDS):
            return tag
    return 0


def _runs(data: bytes) -> list[_Run] | None:
    runs: list[_Run] = []
    layout, constants, constant_from = "<", [], 0
    order: list[int] = []
    seen: set[int] = set()

    def constant(end: int) -> None:
        nonlocal layout
        layout += f"{end - constant_from}s"
        constants.append(data[constant_from:end])

    try:
        for number, tag, start, end in fields(data):
            wire = data[tag] & 7
            if number not in _KNOWN or (number in seen and number not in _REPEATED):
                return None
            if (wire == 1) != (number == _ANSWERED_AT):
                return None
            seen.add(number)
            if number in _TENSORS:
                start = _data_of_tensor(data, start, end)  # noqa: PLW2901 - the rest of it is constant
                if not start:
                    return None
            elif number not in _DIFFERS:
                continue
            order.append(number)
            if number in VARINT_COLUMNS:
                # Its length differs too: the stretch ends before it.
                constant(_varint(data, tag)[1])
                runs.append(_Run(layout, tuple(constants)))
                layout, constants = "<", []
            else:
                constant(start)
                layout += "Q" if number == _ANSWERED_AT else f"{end - start}s"
            constant_from = end
    except IndexError:
        return None
    constant(len(data))
    runs.append(_Run(layout, tuple(constants)))
    return runs if order == sorted(order) and tuple(order[: len(_DIFFERS)]) == _DIFFERS else None


def delimited(field: int, data: bytes) -> bytes:
    """A field of bytes, a message or packed numbers; nothing where `data` is empty, as protobuf has it."""
    if not data:
        return b""
    out = bytearray()
    for number in (field << 3 | 2, len(data)):
        rest = number
        while rest > 127:
            out.append(rest & 127 | 128)
            rest >>= 7
        out.append(rest)
    return bytes(out) + data


def fields(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Of each field: its number, where its tag and its contents begin, and where it ends. Raises IndexError
    where a message ends early or has what ours have not."""
    at = 0
    while at < len(data):
        tag = at
        key, at = _varint(data, at)
        wire, start = key & 7, at
        if wire == 0:
            _, at = _varint(data, at)
        elif wire == 1:
            at += 8
        elif wire == 2:
            length, start = _varint(data, at)
            at = start + length
        elif wire == 5:
            at += 4
        else:
            raise IndexError("a group")
        if at > len(data):
            raise IndexError("cut short")
        yield key >> 3, tag, start, at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
        shift += 7


def _data_of_tensor(data: bytes, start: int, end: int) -> int:
    """Where the data of the tensor at `start` begins; 0 where it does not end the tensor."""
    last = 0
    for number, _, first, behind in fields(data[start:end]):
        last = start + first if number == Tensor.DATA_FIELD_NUMBER and start + behind == end else 0
    return last
