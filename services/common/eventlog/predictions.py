"""Joining records of inference.predictions.v1 before they are published.

A worker writes a record per executed batch, which under light load holds one request. What a record costs on
its way (client, broker, every reader, which claims its id) hardly depends on its contents, so
those of one version that are published together travel as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from google.protobuf.message import DecodeError
from headrace.v1.events_pb2 import PredictionBatch

from services.common.eventlog.framing import Event

#: A joined record is not added to once it holds so many requests.
_MANY: Final = 2000
# Joining copies the payload; records of so many bytes are large enough by themselves.
_LARGE: Final = 256 << 10
#: Columns that every record has, with a number per request.
_COLUMNS: Final = (
    "unit_hashes", "variants", "propensities", "revisions", "codes", "origins", "attempts", "cached",
    "latency_us", "queue_us", "compute_us", "rows",
)  # fmt: skip
_US_MAX: Final = (1 << 32) - 1

_Layout = tuple[object, ...]


@dataclass(slots=True)
class _Group:
    events: list[Event]
    records: list[PredictionBatch]
    requests: int


def join_predictions(events: Sequence[Event]) -> list[Event]:
    """The same requests in fewer records: those of one version and layout become one, with the id of the
    first and in its place. The same events always give the same records.

    Passed on as it is: what is large, what has headers (a trace leads from one record to its cause), what
    resembles no other, and what is no record of predictions at all.
    """
    groups: list[_Group] = []
    open_: dict[_Layout, _Group] = {}
    for event in events:
        record = PredictionBatch()
        layout = None
        if not event.headers and len(event.value) < _LARGE:
            try:
                record.ParseFromString(event.value)
            except DecodeError:
                pass  # its readers say what is wrong with it
            else:
                layout = _layout(event.key, record)
        requests = len(record.request_ids) // 16
        group = open_.get(layout) if layout is not None else None
        if group is not None and group.requests < _MANY:
            group.events.append(event)
            group.records.append(record)
            group.requests += requests
            continue
        group = _Group([event], [record], requests)
        groups.append(group)
        if layout is not None:
            open_[layout] = group
    joined: list[Event] = []
    for group in groups:
        whole = _joined(group) if len(group.events) > 1 else None
        joined += group.events if whole is None else [whole]
    return joined


def _layout(key: bytes, record: PredictionBatch) -> _Layout | None:
    """Equal for records that can be joined; None for one that can be joined with none."""
    answered = sum([rows for rows, code in zip(record.rows, record.codes, strict=False) if not code])
    tensors: list[object] = []
    for group in (record.inputs, record.outputs):
        tensors.append(len(group))
        for tensor in group:
            shape = tuple(tensor.shape)
            if not shape or shape[0] != answered:  # its first dimension is not rows: nothing to join along
                return None
            tensors += (tensor.name, tensor.datatype, shape[1:])
    return (
        key, record.source, record.writer, record.model, record.version, record.artifact_digest,
        record.exclude_from_drift, record.exclude_from_experiments, tuple(record.variant_names),
        tuple(record.experiment_ids), *tensors,
    )  # fmt: skip


def _joined(group: _Group) -> Event | None:
    """One event for all; None where the columns do not fit the requests, which no writer of ours does."""
    records, first = group.records, group.records[0]
    # In protobuf, messages laid end to end are one message whose repeated fields are those of all.
    whole = PredictionBatch.FromString(b"".join([event.value for event in group.events]))
    if any(len(getattr(whole, name)) != group.requests for name in _COLUMNS) or whole.answered_before_us:
        return None
    if len(whole.experiments) != (group.requests if first.experiment_ids else 0):
        return None
    answered = [record.answered_at_us for record in records]
    last = max(answered)
    whole.batch_id = first.batch_id
    whole.answered_at_us = last
    whole.answered_before_us.extend(
        [
            before
            for at, record in zip(answered, records, strict=True)
            for before in [min(last - at, _US_MAX)] * (len(record.request_ids) // 16)
        ]
    )
    whole.request_ids = b"".join([record.request_ids for record in records])
    del whole.variant_names[:]
    whole.variant_names.extend(first.variant_names)
    del whole.experiment_ids[:]
    whole.experiment_ids.extend(first.experiment_ids)
    for joined, of_first, of_each in (
        (whole.inputs, first.inputs, [record.inputs for record in records]),
        (whole.outputs, first.outputs, [record.outputs for record in records]),
    ):
        del joined[len(of_first) :]
        for tensor, parts in zip(joined, zip(*of_each, strict=True), strict=True):
            tensor.shape[0] = sum([part.shape[0] for part in parts])
            tensor.data = b"".join([part.data for part in parts])
    return replace(group.events[0], value=whole.SerializeToString(), size=0)
