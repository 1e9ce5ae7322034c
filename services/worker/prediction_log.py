"""The prediction log: what an executed batch becomes as records of inference.predictions.v1.

Everything that entered a run is in it, with the code it was answered with. What was refused before running is
not: whoever gives the final answer logs that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import Code

from services.common.eventlog.log import MAX_EVENT_BYTES
from services.worker.execution import Part
from services.worker.input_layout import InputLayout, MergeKey
from services.worker.item import Item
from services.worker.record_columns import (
    NOBODY,
    Alike,
    Answered,
    Said,
    add_clock_columns,
    said_by,
    said_columns,
)
from services.worker.tensors import Buffer, OutputColumn
from services.worker.wire import Kept, tag, tensor_head

_OK: Final = Code.CODE_OK
_INPUTS: Final = tag(PredictionBatch.INPUTS_FIELD_NUMBER, 2)
_OUTPUTS: Final = tag(PredictionBatch.OUTPUTS_FIELD_NUMBER, 2)
_MOST_KEPT: Final = 1024
_MOST_SAID: Final = 64
#: Tensors of one request, which are never parted: the log takes no larger event, and some of it is columns.
_MOST_BYTES: Final = MAX_EVENT_BYTES - (64 << 10)


@dataclass(frozen=True, slots=True)
class PayloadPolicy:
    """What of the tensors is logged, in bytes. Of requests with inputs larger than `small_bytes` (images,
    many rows) some have them in the log, as many as fit into `large_bytes_per_s`, the others their outputs
    alone; which ones depends on the time only, but for those that no record can hold. Outputs larger than
    `request_bytes` are left out. No record of several requests is larger than about `record_bytes`."""

    enabled: bool = True
    small_bytes: int = 1 << 12
    request_bytes: int = 1 << 16
    record_bytes: int = 4 << 20
    large_bytes_per_s: int = 4 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """One request of an executed batch: its answer's code and, for OK, the rows that are its own in
    `part`."""

    item: Item
    code: Code
    part: Part | None = None
    first_row: int = 0

    def outputs(self) -> list[Buffer]:
        """Its rows of every output."""
        columns = self.part.columns if self.part is not None else []
        return [column.rows(self.first_row, self.item.rows) for column in columns]


class Made:
    """`records` of a batch; `omitted` counts requests answered OK whose inputs or outputs are not there.
    `named`: variant and experiment, where it was seen that all have the same."""

    __slots__ = ("named", "omitted", "records")

    def __init__(self, records: list[bytes], omitted: int = 0, named: tuple[str, str] | None = None) -> None:
        self.records = records
        self.omitted = omitted
        self.named = named


class _Heads:
    """What precedes the data of every tensor, for batches of this layout."""

    __slots__ = ("columns", "heads", "key", "rows", "sizes")

    def __init__(
        self, key: MergeKey, rows: int, sizes: list[int], columns: list[OutputColumn], heads: list[bytes]
    ) -> None:
        self.key = key
        self.rows = rows
        self.sizes = sizes
        self.columns = [(column.name, column.shape) for column in columns]
        self.heads = heads

    def fit(self, key: MergeKey, rows: int, sizes: list[int], columns: list[OutputColumn]) -> bool:
        """Whether they are those of such a batch."""
        if rows != self.rows or sizes != self.sizes or key != self.key or len(columns) != len(self.columns):
            return False
        for position in range(len(columns)):
            name, shape = self.columns[position]
            if columns[position].name != name or columns[position].shape != shape:
                return False
        return True


class PredictionRecords:
    """Makes the records of one model version: PredictionBatch messages, serialised.

    Most of a record is the same for batches of one size, and is kept."""

    def __init__(
        self, source: str, model: str, version: str, artifact_digest: str, layout: InputLayout
    ) -> None:
        self.key = f"{model}/{version}".encode()
        self._layout = layout
        self._fixed = PredictionBatch(
            source=source,
            writer=PredictionBatch.WRITER_WORKER,
            model=model,
            version=version,
            artifact_digest=artifact_digest,
        ).SerializeToString()
        # By what the first of them says: who says so may be many.
        self._alike: Kept[Said, Alike] = Kept(_MOST_SAID)
        self._recently = Alike(NOBODY)
        self._heads: Kept[tuple[object, ...], _Heads] = Kept(_MOST_KEPT)
        # By the number of their rows those that were used last.
        self._last_heads: Kept[int, _Heads] = Kept(_MOST_KEPT)
        #: What may be spent on large inputs, and since when more of it is earned.
        self._large_bytes = 0.0
        self._large_at = 0.0

    def of_part(self, part: Part, times: Answered, policy: PayloadPolicy) -> Made:
        """The records of a batch whose members were all answered OK: the joined tensors go in as they are."""
        outputs = [column.data for column in part.columns]
        nbytes = 0
        for given in part.inputs:
            nbytes += len(given)
        for data in outputs:
            nbytes += len(data)
        if policy.enabled and (
            nbytes > policy.record_bytes
            or (nbytes > policy.request_bytes and _largest(part) > policy.request_bytes)
        ):
            return self.of_entries(list(entries_of(part)), times, policy)
        inputs: Sequence[Buffer] = part.inputs
        omitted = 0
        if policy.enabled and nbytes > policy.small_bytes:
            sizes = [item.nbytes for item in part.items]
            if max(sizes) > policy.small_bytes:
                if min(sizes) <= policy.small_bytes:
                    return self.of_entries(list(entries_of(part)), times, policy)
                # For all of them at once: one record either way.
                if not self._with_inputs(sum(map(len, inputs)), times.finished, policy):
                    inputs, omitted = (), len(sizes)
        named: tuple[str, str] | None = None
        alike = self._all_alike(part.items)
        if alike is not None:
            begin = alike.begins.get(len(part.items))
            if begin is None:
                begin = self._fixed + said_columns([alike.said] * len(part.items), [_OK] * len(part.items))
                alike.begins[len(part.items)] = begin
            named = alike.said[0], alike.said[6]
        else:
            said = [said_by(item) for item in part.items]
            begin = self._fixed + said_columns(said, [_OK] * len(said))
        pieces: list[Buffer] = [begin]
        add_clock_columns(pieces, part.items, times)
        if policy.enabled:
            self._add_tensors(pieces, part, part.rows, inputs, outputs)
        return Made([b"".join(pieces)], omitted, named)

    def _all_alike(self, items: Sequence[Item]) -> Alike | None:
        """What all of `items` say of themselves; None where they differ."""
        recently = self._recently
        if recently.holds(items):
            return recently
        said = said_by(items[0])
        alike = self._alike.get(said)
        if alike is None:
            alike = self._alike[said] = Alike(said)
        if not alike.holds(items):
            return None
        self._recently = alike
        return alike

    def of_entries(self, entries: Sequence[Entry], times: Answered, policy: PayloadPolicy) -> Made:
        """The records of a batch whose members fared differently, or that is too large for one record."""
        made = Made([])
        bare: list[Entry] = []
        chunk: list[Entry] = []
        size, chunk_inputs = 0, True
        for entry in entries:
            outputs = sum(map(len, entry.outputs()))
            if not policy.enabled or entry.part is None or outputs > min(policy.request_bytes, _MOST_BYTES):
                bare.append(entry)
                made.omitted += policy.enabled and entry.code == _OK
                continue
            fits = outputs + entry.item.nbytes <= _MOST_BYTES
            inputs = fits and self._with_inputs(entry.item.nbytes, times.finished, policy)
            made.omitted += not inputs
            nbytes = outputs + entry.item.nbytes * inputs
            if chunk and (
                size + nbytes > policy.record_bytes
                or inputs != chunk_inputs
                or not _alike(entry.part, chunk[-1].part)
            ):
                made.records.append(self._with_tensors(chunk, times, inputs=chunk_inputs))
                chunk, size = [], 0
            chunk.append(entry)
            size += nbytes
            chunk_inputs = inputs
        if chunk:
            made.records.append(self._with_tensors(chunk, times, inputs=chunk_inputs))
        if bare:
            made.records.append(self._bare(bare, times))
        return made

    def _with_inputs(self, nbytes: int, now: float, policy: PayloadPolicy) -> bool:
        """Whether inputs of this size are logged now; threads that decide at once may log one more. What they
        cost is owed afterwards: were it to be saved first, large ones would be logged more seldom."""
        if nbytes <= policy.small_bytes:
            return True
        earned = max(0.0, now - self._large_at) * policy.large_bytes_per_s
        self._large_at = now
        self._large_bytes = min(self._large_bytes + earned, policy.record_bytes)
        if self._large_bytes <= 0:
            return False
        self._large_bytes -= nbytes
        return True

    def _bare(self, entries: Sequence[Entry], times: Answered) -> bytes:
        return b"".join(self._columns(entries, times))

    def _with_tensors(self, entries: Sequence[Entry], times: Answered, *, inputs: bool) -> bytes:
        pieces = self._columns(entries, times)
        given = (
            [b"".join(data) for data in zip(*(e.item.data for e in entries), strict=True)] if inputs else []
        )
        outputs = [b"".join(data) for data in zip(*(e.outputs() for e in entries), strict=True)]
        part = next(e.part for e in entries if e.part is not None)
        self._add_tensors(pieces, part, sum(e.item.rows for e in entries), given, outputs)
        return b"".join(pieces)

    def _add_tensors(
        self, pieces: list[Buffer], part: Part, rows: int, inputs: Sequence[Buffer], outputs: Sequence[Buffer]
    ) -> None:
        """Without `inputs`: the outputs alone."""
        sizes = [len(given) for given in inputs] + [len(data) for data in outputs]
        key = part.key
        if key is None:
            key = part.items[0].key
        kept = self._last_heads.get(rows)
        if kept is None or not kept.fit(key, rows, sizes, part.columns):
            shapes = [(column.name, column.shape) for column in part.columns]
            layout = (key, rows, *sizes, *shapes)
            kept = self._heads.get(layout)
            if kept is None:
                heads = self._heads_of(part, rows, sizes, inputs=bool(inputs))
                kept = self._heads[layout] = _Heads(key, rows, sizes, part.columns, heads)
            self._last_heads[rows] = kept
        position = 0
        for given in inputs:
            pieces.append(kept.heads[position])
            pieces.append(given)
            position += 1
        for data in outputs:
            pieces.append(kept.heads[position])
            pieces.append(data)
            position += 1

    def _heads_of(self, part: Part, rows: int, sizes: list[int], *, inputs: bool) -> list[bytes]:
        """What precedes the data of every tensor."""
        batched = self._layout.batched
        named = self._layout.named_shapes(part.key or part.items[0].key, rows) if inputs else ()
        tensors = [(_INPUTS, *one) for one in named]
        for column in part.columns:
            shape = (rows, *column.shape) if batched else column.shape
            tensors.append((_OUTPUTS, column.name.encode(), column.datatype, shape))
        return [
            tensor_head(field, name, datatype, shape, size)
            for (field, name, datatype, shape), size in zip(tensors, sizes, strict=True)
        ]

    def _columns(self, entries: Sequence[Entry], times: Answered) -> list[Buffer]:
        """All but the tensors."""
        items = [entry.item for entry in entries]
        said = said_columns([said_by(item) for item in items], [entry.code for entry in entries])
        pieces: list[Buffer] = [self._fixed, said]
        add_clock_columns(pieces, items, times)
        return pieces


def entries_of(part: Part, code: Callable[[Item], Code] | None = None) -> Iterator[Entry]:
    """The members of `part` with the rows that are theirs; without `code` all were answered OK. Only an OK
    member keeps its tensors."""
    first = 0
    for item in part.items:
        answered = _OK if code is None else code(item)
        yield Entry(item, answered, part if answered == _OK else None, first)
        first += item.rows


def _largest(part: Part) -> int:
    """Bytes of the inputs or the outputs of the request that has most of them."""
    rows = max([item.rows for item in part.items])
    inputs = max([item.nbytes for item in part.items])
    return max(inputs, sum([len(column.data) for column in part.columns]) // max(1, part.rows) * rows)


def _alike(one: Part | None, other: Part | None) -> bool:
    """Whether the tensors of both fit into one record."""
    if one is other or one is None or other is None:
        return one is other
    shapes = [[column.shape for column in part.columns] for part in (one, other)]
    return one.key == other.key and shapes[0] == shapes[1]
