"""The prediction log of a chunk: records of inference.predictions.v1 written as columns, since a message with
an entry per row would cost as much as running the model.

Ids follow from the job and the row, so that a chunk done again is counted once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b

import numpy as np
from headrace.v1.batch_pb2 import BatchChunk
from headrace.v1.dataplane_pb2 import Origin
from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import DataType, Signature, Tensor
from numpy.typing import NDArray

from services.common.errors import HeadraceError
from services.worker.batch.results import Answers
from services.worker.tensors import Array, encode_bytes
from services.worker.wire import tag, varint

#: Rows of one record: at 30 columns about a megabyte with payload.
RECORD_ROWS = 8192
_RECORD_BYTES = 8 << 20

_CODES = PredictionBatch.DESCRIPTOR.fields_by_name["codes"].number
_ORIGINS = PredictionBatch.DESCRIPTOR.fields_by_name["origins"].number
_ROWS = PredictionBatch.DESCRIPTOR.fields_by_name["rows"].number
_REQUEST_IDS = PredictionBatch.DESCRIPTOR.fields_by_name["request_ids"].number


def request_ids(job_id: str, rows: NDArray[np.int64]) -> bytes:
    """16 bytes a row: 8 of the job, then the row's number, big-endian."""
    ids = np.empty((len(rows), 2), ">u8")
    ids[:, 0] = int.from_bytes(blake2b(job_id.encode(), digest_size=8).digest(), "big")
    ids[:, 1] = rows
    return ids.tobytes()


class ChunkRecords:
    """Makes the records of one chunk, written by the worker `source`."""

    def __init__(self, chunk: BatchChunk, signature: Signature, source: str) -> None:
        self.key = f"{chunk.model}/{chunk.version}".encode()
        self._chunk = chunk
        self._batched = signature.batched
        self._inputs = {spec.name: spec.datatype for spec in signature.inputs}
        self._outputs = {spec.name: spec.datatype for spec in signature.outputs}
        self._fixed = PredictionBatch(
            source=source,
            writer=PredictionBatch.WRITER_WORKER,
            model=chunk.model,
            version=chunk.version,
            artifact_digest=chunk.artifact_digest,
            exclude_from_drift=chunk.exclude_from_drift,
            exclude_from_experiments=chunk.exclude_from_experiments,
        )

    def answered(
        self, answers: Answers, inputs: Mapping[str, Array], unix_us: int, payload_rows: int
    ) -> Iterator[bytes]:
        """The records of rows that ran. `inputs` and outputs have the same rows; those of the first
        `payload_rows` places of the chunk travel along, as far as they are not too large."""
        # No record has rows of both kinds: among the first ones some may have failed.
        first_ones = int(np.searchsorted(answers.places, payload_rows))
        for part in (*_parts(0, first_ones), *_parts(first_ones, len(answers.places))):
            places = answers.places[part]
            tensors: list[list[Tensor]] = [[], []]
            if part.stop <= first_ones and self._batched:
                given = [
                    (inputs, self._inputs, tensors[0]),
                    (answers.outputs, self._outputs, tensors[1]),
                ]
                size = sum(
                    _size(datatypes[name], array[part])
                    for arrays, datatypes, _ in given
                    for name, array in arrays.items()
                    if name in datatypes
                )
                for arrays, datatypes, into in given if size <= _RECORD_BYTES else []:
                    into += [
                        _tensor(name, datatypes[name], array[part])
                        for name, array in arrays.items()
                        if name in datatypes
                    ]
            yield self._record(places, bytes(len(places)), unix_us, tensors[0], tensors[1])

    def failed(self, failures: Mapping[int, HeadraceError], unix_us: int) -> Iterator[bytes]:
        """The records of rows that ran and failed."""
        places = sorted(failures)
        for first in range(0, len(places), RECORD_ROWS):
            part = places[first : first + RECORD_ROWS]
            codes = bytes(int(failures[place].code) for place in part)
            yield self._record(np.array(part, np.int64), codes, unix_us, [], [])

    def _record(
        self,
        places: NDArray[np.int64],
        codes: bytes,
        unix_us: int,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> bytes:
        record = PredictionBatch()
        record.CopyFrom(self._fixed)
        count = len(places)
        # The same rows, done again, make the same id; fewer or more rows do not.
        named = f"{self._chunk.job_id}/{self._chunk.first_row + int(places[0])}/{count}/{codes[0]}"
        record.batch_id = blake2b(named.encode(), digest_size=16).digest()
        record.answered_at_us = unix_us
        record.inputs.extend(inputs)
        record.outputs.extend(outputs)
        # Messages are joined by joining their bytes, and numbers below 128 are one byte each.
        return b"".join(
            [
                record.SerializeToString(),
                *_packed(_REQUEST_IDS, request_ids(self._chunk.job_id, places + self._chunk.first_row)),
                *_packed(_CODES, codes),
                *_packed(_ORIGINS, bytes([Origin.ORIGIN_BATCH]) * count),
                *_packed(_ROWS, b"\1" * count),
            ]
        )


def _parts(first: int, end: int) -> list[slice]:
    """The rows from `first` to before `end`, as many to a record as it takes."""
    return [slice(at, min(at + RECORD_ROWS, end)) for at in range(first, end, RECORD_ROWS)]


def without_payload(value: bytes) -> bytes:
    """The same record without its tensors."""
    record = PredictionBatch.FromString(value)
    del record.inputs[:], record.outputs[:]
    return record.SerializeToString()


def _size(datatype: DataType, array: Array) -> int:
    """Bytes of `array` as a tensor: where it holds texts, not of what points at them."""
    if datatype != DataType.DATA_TYPE_BYTES:
        return array.nbytes
    return sum(4 + len(value if isinstance(value, bytes) else str(value).encode()) for value in array.flat)


def _tensor(name: str, datatype: DataType, array: Array) -> Tensor:
    if datatype == DataType.DATA_TYPE_BYTES:
        data = encode_bytes(
            value if isinstance(value, bytes) else str(value).encode() for value in array.flat
        )
    else:
        data = array.tobytes()
    return Tensor(name=name, datatype=datatype, shape=array.shape, data=data)


def _packed(field: int, data: bytes) -> tuple[bytes, bytes]:
    """A length-delimited field in two parts, since `data` may be long."""
    return tag(field, 2) + varint(len(data)), data
