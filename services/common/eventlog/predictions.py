"""Joining records of inference.predictions.v1 before they are published.

A worker writes a record per executed batch, which under light load holds one request. What a record costs on
its way (client, broker, every reader, which claims its id) hardly depends on its contents, so
those of one version that are published together travel as one.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Final

from google.protobuf.message import DecodeError
from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import Tensor

from services.common.eventlog.forms import (
    COLUMNS,
    CUT_COLUMNS,
    SAME_COLUMNS,
    VARINT_COLUMNS,
    Cut,
    Form,
    Layout,
    delimited,
    fields,
    learn,
    place,
)
from services.common.eventlog.framing import Event, Steps

#: A joined record is not added to once it holds so many requests.
_MANY: Final = 2000
# Joining copies the payload; records of so many bytes are large enough by themselves.
_LARGE: Final = 256 << 10
_US_MAX: Final = (1 << 32) - 1
#: Events that are looked at, and records that are put together, in one step.
_CUT_AT_ONCE, _JOINED_AT_ONCE = 8, 64
_MOST_LAYOUTS: Final = 1024
#: Forms that records of one key and number of requests may have.
_MOST_ALIKE: Final = 4
# What learning a form costs, in records that are parsed: where few come again, few are learned.
_LEARNING: Final = 8
_MOST_CREDIT: Final = 64 * _LEARNING
_CONTINUED: Final = bytes(range(128, 256))

_INPUTS: Final = PredictionBatch.INPUTS_FIELD_NUMBER
_OUTPUTS: Final = PredictionBatch.OUTPUTS_FIELD_NUMBER

_Joined = Generator[None, None, Event | None]


class _Group:
    """Events that become one. `cuts` and `forms` are those of all of them, or no longer kept."""

    __slots__ = ("cuts", "events", "forms", "layout", "requests")

    def __init__(self, event: Event, layout: Layout | None, requests: int) -> None:
        self.events = [event]
        self.layout = layout
        self.requests = requests
        self.cuts: list[Cut] = []
        self.forms: list[Form] = []


class PredictionJoin:
    """The same requests in fewer records: those of one version and layout become one, with the id of the
    first and in its place. The same events always give the same records, whatever was joined before.

    Passed on as it is: what is large, what has headers (a trace leads from one record to its cause), what
    resembles no other or was answered more than an hour apart, and what is no record of predictions at all.

    Records in a form that came before are joined as bytes, all others as messages; what comes of it is the
    same. About `most_forms` are known; 0: none.
    """

    def __init__(self, most_forms: int = 1024) -> None:
        self._most_forms = most_forms
        self._forms: dict[tuple[bytes, bytes], list[Form]] = {}
        self._places: dict[bytes, int] = {}
        self._layouts: dict[Layout, Layout] = {}
        self._known = 0
        self._credit = _MOST_CREDIT

    def steps(self, events: Sequence[Event]) -> Steps:
        """See Join."""
        if self._known > self._most_forms or len(self._layouts) > _MOST_LAYOUTS:
            # Between two joins only: within one, a layout must stay the same object.
            self._forms.clear()
            self._places.clear()
            self._layouts.clear()
            self._known = 0
        groups: list[_Group] = []
        open_: dict[int, _Group] = {}
        for number, event in enumerate(events):
            key, value = event.key, event.value
            cut: Cut | None = None
            form: Form | None = None
            layout: Layout | None = None
            requests = 0
            if not event.headers and len(value) < _LARGE:
                at = self._places.get(key, 0)
                for known in self._forms.get((key, value[at : at + 4]), ()):
                    cut = known.cut(value)
                    if cut is not None:
                        form, layout, requests = known, known.layout, known.requests
                        break
                else:
                    layout, requests, form = self._read(event)
                    cut = form.cut(value) if form is not None else None
            if layout is None:
                groups.append(_Group(event, None, 0))
                continue
            group = open_.get(id(layout))
            if group is None or group.requests >= _MANY:
                group = _Group(event, layout, requests)
                groups.append(group)
                open_[id(layout)] = group
            else:
                group.events.append(event)
                group.requests += requests
            if cut is not None and form is not None:
                group.cuts.append(cut)
                group.forms.append(form)
            if cut is None or number % _CUT_AT_ONCE == 0:
                yield
        joined: list[Event] = []
        for group in groups:
            whole = (yield from _joined(group)) if len(group.events) > 1 else None
            joined += group.events if whole is None else [whole]
        return joined

    def _read(self, event: Event) -> tuple[Layout | None, int, Form | None]:
        """Of a record in no form that is known: its layout, its number of requests, and its form where that
        was learned."""
        try:
            record = PredictionBatch.FromString(event.value)
        except DecodeError:
            return None, 0, None  # its readers say what is wrong with it
        layout = _layout(event.key, record)
        if layout is None:
            return None, 0, None
        layout = self._layouts.setdefault(layout, layout)
        form = None
        self._credit += 1
        if self._most_forms and self._credit >= _LEARNING:
            self._credit = min(self._credit, _MOST_CREDIT) - _LEARNING
            form = learn(event.value, record, layout)
        if form is not None:
            at = self._places.setdefault(event.key, place(event.value))
            alike = self._forms.setdefault((event.key, event.value[at : at + 4]), [])
            alike.insert(0, form)
            del alike[_MOST_ALIKE:]
            self._known += 1
        return layout, len(record.request_ids) // 16, form


def join_predictions(events: Sequence[Event]) -> list[Event]:
    """What `PredictionJoin().steps(events)` comes to."""
    steps = PredictionJoin().steps(events)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            joined: list[Event] = end.value
            return joined


def _layout(key: bytes, record: PredictionBatch) -> Layout | None:
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


def _joined(group: _Group) -> _Joined:
    """One event for all; None where they were answered more than an hour apart, which has no room there (the
    broker was away, or a clock was set), or where the columns do not fit the requests, which no writer of
    ours does."""
    whole = None
    if len(group.cuts) == len(group.events):
        whole = yield from _joined_bytes(group)
    if whole is None:
        whole = yield from _joined_messages(group)
    return whole


def _joined_bytes(group: _Group) -> _Joined:
    forms, cuts, requests = group.forms, group.cuts, group.requests
    first, tensors = forms[0].example, (*forms[0].example.inputs, *forms[0].example.outputs)
    same: list[list[bytes]] = [[] for _ in SAME_COLUMNS]
    answered: list[int] = []
    differing: list[list[bytes]] = [[] for _ in cuts[0][2:]]
    for start in range(0, len(cuts), _JOINED_AT_ONCE):
        of = forms[start : start + _JOINED_AT_ONCE]
        _, at, *columns = zip(*cuts[start : start + _JOINED_AT_ONCE], strict=True)
        answered += at
        for pieces, column in zip(differing, columns, strict=True):
            pieces.append(b"".join(column))
        if of.count(of[0]) == len(of):
            contents = [content * len(of) for content in of[0].columns]
        else:
            contents = [b"".join(column) for column in zip(*[form.columns for form in of], strict=True)]
        for pieces, content in zip(same, contents, strict=True):
            pieces.append(content)
        yield
    last = max(answered)
    if last - min(answered) > _US_MAX:
        return None
    few = PredictionBatch(
        batch_id=cuts[0][0], source=first.source, writer=first.writer, model=first.model,
        version=first.version, artifact_digest=first.artifact_digest, answered_at_us=last,
        variant_names=first.variant_names, experiment_ids=first.experiment_ids,
        exclude_from_drift=first.exclude_from_drift,
        exclude_from_experiments=first.exclude_from_experiments,
        answered_before_us=_before(last, answered, [form.requests for form in forms]),
    ).SerializeToString()  # fmt: skip
    # In the order in which protobuf writes them, so that the bytes are the same either way.
    parts: dict[int, bytes] = {}
    for number, tag, _, end in fields(few):
        parts[number] = parts.get(number, b"") + few[tag:end]
    yield
    for number, pieces in zip(SAME_COLUMNS, same, strict=True):
        parts[number] = delimited(number, b"".join(pieces))
    for number, pieces in zip(CUT_COLUMNS, differing, strict=False):
        content = b"".join(pieces)
        if number in VARINT_COLUMNS and len(content.translate(None, _CONTINUED)) != requests:
            return None
        parts[number] = delimited(number, content)
    yield
    rows = sum([form.rows for form in forms])
    for place_, (tensor, pieces) in enumerate(zip(tensors, differing[len(CUT_COLUMNS) :], strict=True)):
        number = _INPUTS if place_ < len(first.inputs) else _OUTPUTS
        head = Tensor(name=tensor.name, datatype=tensor.datatype, shape=[rows, *tensor.shape[1:]])
        data = delimited(Tensor.DATA_FIELD_NUMBER, b"".join(pieces))
        parts[number] = parts.get(number, b"") + delimited(number, head.SerializeToString() + data)
        yield
    value = b"".join([parts[number] for number in sorted(parts)])
    return group.events[0]._replace(value=value, size=0)


def _joined_messages(group: _Group) -> _Joined:
    # In protobuf, messages laid end to end are one message whose repeated fields are those of all.
    whole = PredictionBatch()
    records: list[PredictionBatch] = []
    for event in group.events:
        records.append(PredictionBatch.FromString(event.value))
        whole.MergeFromString(event.value)
        yield
    first = records[0]
    if any(len(getattr(whole, name)) != group.requests for name in COLUMNS) or whole.answered_before_us:
        return None
    if len(whole.experiments) != (group.requests if first.experiment_ids else 0):
        return None
    answered = [record.answered_at_us for record in records]
    last = max(answered)
    if last - min(answered) > _US_MAX:
        return None
    whole.batch_id = first.batch_id
    whole.answered_at_us = last
    requests = [len(record.request_ids) // 16 for record in records]
    whole.answered_before_us.extend(_before(last, answered, requests))
    whole.request_ids = b"".join([record.request_ids for record in records])
    del whole.variant_names[:]
    whole.variant_names.extend(first.variant_names)
    del whole.experiment_ids[:]
    whole.experiment_ids.extend(first.experiment_ids)
    yield
    for joined, of_first, of_each in (
        (whole.inputs, first.inputs, [record.inputs for record in records]),
        (whole.outputs, first.outputs, [record.outputs for record in records]),
    ):
        del joined[len(of_first) :]
        for tensor, parts in zip(joined, zip(*of_each, strict=True), strict=True):
            tensor.shape[0] = sum([part.shape[0] for part in parts])
            tensor.data = b"".join([part.data for part in parts])
            yield
    return group.events[0]._replace(value=whole.SerializeToString(), size=0)


def _before(last: int, answered: Sequence[int], requests: Sequence[int]) -> list[int]:
    """How long before `last` each request was answered, of records with so many each."""
    return [before for at, count in zip(answered, requests, strict=True) for before in [last - at] * count]
