"""The prediction log: what an executed batch becomes as records of inference.predictions.v1.

Everything that entered a run is in it, with the code it was answered with. What was refused before running is
not: whoever gives the final answer logs that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import Code, Tensor

from services.common.ids import new_id
from services.worker.batch_queue import Item
from services.worker.execution import Part
from services.worker.input_layout import InputLayout

_OK = Code.CODE_OK
_US_MAX = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class PayloadPolicy:
    """What of the tensors is logged. Sizes are bytes of inputs and outputs together: a request above
    `request_bytes` is logged without them, records are cut at about `record_bytes`."""

    enabled: bool = True
    request_bytes: int = 1 << 20
    record_bytes: int = 4 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """One request of an executed batch: its answer's code and, for OK, the rows that are its own in
    `part`."""

    item: Item
    code: Code
    part: Part | None = None
    first_row: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors in the log."""
        return self.item.nbytes + sum(map(len, self.outputs()))

    def outputs(self) -> list[bytes]:
        """Its rows of every output."""
        columns = self.part.columns if self.part is not None else []
        return [column.rows(self.first_row, self.item.rows) for column in columns]


@dataclass(frozen=True, slots=True)
class Answered:
    """When a batch started to run and was answered: on the event loop's scale, and in Unix microseconds."""

    started: float
    finished: float
    unix_us: int
    compute_us: int


class PredictionRecords:
    """Makes the records of one model version."""

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
        )

    def of_part(self, part: Part, times: Answered, policy: PayloadPolicy) -> Iterator[PredictionBatch]:
        """The records of a batch whose members were all answered OK: the joined tensors go in as they are."""
        nbytes = sum(map(len, part.inputs)) + sum(len(column.data) for column in part.columns)
        if not policy.enabled or nbytes <= min(policy.request_bytes, policy.record_bytes):
            record = self._columns(part.items, [_OK] * len(part.items), times)
            if policy.enabled:
                self._add_tensors(record, part, part.rows, part.inputs, [c.data for c in part.columns])
            yield record
            return
        yield from self.of_entries(list(entries_of(part)), times, policy)

    def of_entries(
        self, entries: Sequence[Entry], times: Answered, policy: PayloadPolicy
    ) -> Iterator[PredictionBatch]:
        """The records of a batch whose members fared differently, or that is too large for one record."""
        bare = [e for e in entries if not policy.enabled or e.part is None or e.nbytes > policy.request_bytes]
        if bare:
            yield self._columns([e.item for e in bare], [e.code for e in bare], times)
        without = set(map(id, bare))
        chunk: list[Entry] = []
        size = 0
        for entry in entries:
            if id(entry) in without:
                continue
            if chunk and (
                size + entry.nbytes > policy.record_bytes or not _alike(entry.part, chunk[-1].part)
            ):
                yield self._with_tensors(chunk, times)
                chunk, size = [], 0
            chunk.append(entry)
            size += entry.nbytes
        if chunk:
            yield self._with_tensors(chunk, times)

    def _with_tensors(self, entries: Sequence[Entry], times: Answered) -> PredictionBatch:
        record = self._columns([e.item for e in entries], [e.code for e in entries], times)
        inputs = [b"".join(data) for data in zip(*(e.item.data for e in entries), strict=True)]
        outputs = [b"".join(data) for data in zip(*(e.outputs() for e in entries), strict=True)]
        part = next(e.part for e in entries if e.part is not None)
        self._add_tensors(record, part, sum(e.item.rows for e in entries), inputs, outputs)
        return record

    def _add_tensors(
        self, record: PredictionBatch, part: Part, rows: int, inputs: list[bytes], outputs: list[bytes]
    ) -> None:
        record.inputs.extend(self._layout.tensors(part.key or part.items[0].key, inputs, rows))
        for column, data in zip(part.columns, outputs, strict=True):
            shape = (rows, *column.shape) if self._layout.batched else column.shape
            record.outputs.append(Tensor(name=column.name, datatype=column.datatype, shape=shape, data=data))

    def _columns(self, items: Sequence[Item], codes: Sequence[Code], times: Answered) -> PredictionBatch:
        requests = [item.request for item in items]
        record = PredictionBatch()
        record.CopyFrom(self._fixed)
        record.batch_id = new_id()
        record.answered_at_us = times.unix_us
        record.request_ids = b"".join(
            [r.request_id if len(r.request_id) == 16 else bytes(16) for r in requests]
        )
        record.unit_hashes.extend([r.unit_hash for r in requests])
        variants = [r.variant for r in requests]
        names = list(dict.fromkeys(variants))
        record.variant_names.extend(names)
        record.variants.extend([0] * len(items) if len(names) == 1 else map(names.index, variants))
        record.propensities.extend([r.propensity for r in requests])
        record.revisions.extend([r.revision for r in requests])
        record.codes.extend(codes)
        record.origins.extend([r.origin for r in requests])
        record.attempts.extend([r.attempt for r in requests])
        record.cached.extend([False] * len(items))
        record.latency_us.extend([_latency_us(item, times) for item in items])
        record.queue_us.extend([item.queue_us for item in items])
        record.compute_us.extend([times.compute_us] * len(items))
        record.rows.extend([item.rows for item in items])
        return record


def entries_of(part: Part, code: Callable[[Item], Code] | None = None) -> Iterator[Entry]:
    """The members of `part` with the rows that are theirs; without `code` all were answered OK. Only an OK
    member keeps its tensors."""
    first = 0
    for item in part.items:
        answered = _OK if code is None else code(item)
        yield Entry(item, answered, part if answered == _OK else None, first)
        first += item.rows


def _alike(one: Part | None, other: Part | None) -> bool:
    """Whether the tensors of both fit into one record."""
    if one is other or one is None or other is None:
        return one is other
    shapes = [[column.shape for column in part.columns] for part in (one, other)]
    return one.key == other.key and shapes[0] == shapes[1]


def _latency_us(item: Item, times: Answered) -> int:
    """From the gateway's receipt to the answer; from the arrival here where the caller did not say."""
    received = item.request.received_at_us
    elapsed = times.unix_us - received if received else int((times.finished - item.queued_at) * 1e6)
    return min(max(0, elapsed), _US_MAX)


def waiting_us(item: Item, started: float) -> int:
    """Microseconds from the arrival of `item` in the batcher to the start of its run."""
    return min(max(0, int((started - item.queued_at) * 1e6)), _US_MAX)
