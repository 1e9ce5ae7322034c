"""Finds the form of a body of the Open Inference Protocol that the ordinary way has read (`v2_forms`): where
what changes stands in it is tried out, by putting other values there and having the whole read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec
from headrace.v1.dataplane_pb2 import PredictRequest

from services.common.errors import HeadraceError
from services.gateway.codecs.v2 import V2Request, V2State, parse_request
from services.gateway.codecs.v2_forms import (
    ID,
    NUMBERS,
    ROWS,
    SIZE,
    USER,
    FormInput,
    Place,
    RequestForm,
    plain,
)
from services.gateway.signature import ModelSignature

#: Places that are tried for one value.
_TRIED: Final = 16
#: Stand for others while a form is found.
_PROBE_TEXT, _PROBE_NUMBERS = b"~", b"[]"
_QUOTED = frozenset((ID, USER))
#: Kind, input, where the value begins and ends in the text, and what stood there.
_Found = tuple[int, int, int, int, bytes]
_Members = tuple[str, dict[str, Any] | None, Any, list[dict[str, Any]]]


def request_form(
    body: bytes,
    end: int,
    asked: V2Request,
    request: PredictRequest,
    signature: ModelSignature,
    state: V2State,
    timeout_s: float,
) -> RequestForm | None:
    """The form of `body`, whose JSON ends at `end`, and which the ordinary way read as `asked` and made
    `request` and `state` of; None where it has none."""
    if not _has_form(asked, signature):
        return None
    search = _Search(body[:end], asked)
    inputs = []
    for index, one in enumerate(asked.inputs):
        spec = signature.by_name[one.name]
        text = bytes(one.data)
        if text and not search.find(NUMBERS, index, text, _PROBE_NUMBERS):
            return None
        nested = text.find(b"[", 1) >= 0
        inputs.append(FormInput(spec, one.shape, binary=not text, nested=nested))
    _find_what_varies(search, asked, inputs, signature)
    first, places = search.cut()
    names = [one.name for one in asked.inputs]
    order = [names.index(spec.name) for spec in signature.inputs]
    form = RequestForm(first, places, inputs, order, request, state, timeout_s)
    return form if _says(form, body, end, request, state) else None


def _has_form(asked: V2Request, signature: ModelSignature) -> bool:
    """Whether all that changes from request to request can be numbers, rows, id and user."""
    for one in asked.inputs:
        datatype = signature.by_name[one.name].datatype
        if not datatype.itemsize or not datatype.code or not one.shape:
            return False
        if one.parameters and one.parameters.keys() != {"binary_data_size"}:
            return False
    return not any((output.parameters or {}).keys() - {"binary_data"} for output in asked.outputs or ())


def _find_what_varies(
    search: _Search, asked: V2Request, inputs: Sequence[FormInput], signature: ModelSignature
) -> None:
    """Have `search` find rows, sizes, id and user. What is not found stays as it is in this body."""
    if signature.batched and all(spec.shape[0] == -1 for spec in signature.inputs):
        found = []
        for index, one in enumerate(inputs):
            rows, size = one.shape[0], one.shape[0] * one.row_bytes
            found.append(search.find(ROWS, index, b"%d" % rows, b"%d" % (rows + 1)))
            if one.binary:
                found.append(search.find(SIZE, index, b"%d" % size, b"%d" % (size + 1)))
        if not all(found):
            search.forget((ROWS, SIZE))  # they vary together or not at all
    if asked.id:
        search.find(ID, 0, asked.id.encode(), _PROBE_TEXT)
    user = (asked.parameters or {}).get("user_id")
    if user and isinstance(user, str):
        search.find(USER, 0, user.encode(), _PROBE_TEXT)


def _says(form: RequestForm, body: bytes, end: int, request: PredictRequest, state: V2State) -> bool:
    """Whether `form` makes of `body` what the ordinary way made of it."""
    read = form.request(body, end, request.request_id, request.received_at_us)
    if read is None:
        return False
    made, tensors, said = read
    again = PredictRequest.FromString(b"".join((*(tensors or ()), made)))
    numbers = {tensor.name: tensor for tensor in again.inputs}
    # Large ones of the ordinary way stand apart from its message.
    if any(numbers.get(tensor.name) != tensor for tensor in request.inputs):
        return False
    again.ClearField("inputs")
    rest = PredictRequest()
    rest.CopyFrom(request)
    rest.ClearField("inputs")
    return again == rest and said == state


class _Search:
    """Finds the places of values in a text of JSON: where another value makes the whole read as one with that
    value. Those found are replaced by what they were tried with, so that the rest gets shorter."""

    def __init__(self, text: bytes, asked: V2Request) -> None:
        self._text = text
        self._said = _members(asked)
        #: In the order of the text.
        self._found: list[_Found] = []

    def find(self, kind: int, index: int, value: bytes, probe: bytes) -> bool:
        """Whether `value` was found, as the value of `kind` and of input `index`."""
        quoted = kind in _QUOTED
        if quoted and (not plain(value) or value == probe):
            return False
        needle = b'"%b"' % value if quoted else value
        instead = b'"%b"' % probe if quoted else probe
        expected = _changed(self._said, kind, index, probe)
        at = -1
        for _attempt in range(_TRIED):
            at = self._text.find(needle, at + 1)
            if at < 0:
                return False
            stop = at + len(needle)
            if kind in (ROWS, SIZE) and self._text[stop : stop + 1] in (b".", b"e", b"E"):
                continue
            if any(begin < stop and at < end for _kind, _index, begin, end, _was in self._found):
                continue
            changed = self._text[:at] + instead + self._text[stop:]
            try:
                said = _members(parse_request(changed))
            except HeadraceError:
                continue
            if said == expected:
                self._take(kind, index, at, len(needle), instead, quoted=quoted)
                self._said = said
                return True
        return False

    def forget(self, kinds: tuple[int, ...]) -> None:
        """Have the values of `kinds` stay as they are."""
        for found in [one for one in self._found if one[0] in kinds]:
            _kind, _index, begin, end, was = found
            self._found.remove(found)
            self._replace(begin, end, was)
        self._said = _members(parse_request(self._text))

    def cut(self) -> tuple[bytes, list[Place]]:
        """The text before the first place, and each place with the text behind it."""
        if not self._found:
            return self._text, []
        ends = [*map(_begin, self._found[1:]), len(self._text)]
        return self._text[: _begin(self._found[0])], [
            (kind, index, self._text[end:until])
            for (kind, index, _begin, end, _was), until in zip(self._found, ends, strict=True)
        ]

    def _take(self, kind: int, index: int, at: int, size: int, instead: bytes, *, quoted: bool) -> None:
        was = self._text[at : at + size]
        self._replace(at, at + size, instead)
        margin = 1 if quoted else 0
        begin, end = at + margin, at + len(instead) - margin
        self._found.append((kind, index, begin, end, was[1:-1] if quoted else was))
        self._found.sort(key=_begin)

    def _replace(self, begin: int, end: int, instead: bytes) -> None:
        self._text = self._text[:begin] + instead + self._text[end:]
        longer = len(instead) - (end - begin)
        self._found = [
            (kind, index, start + longer, stop + longer, was)
            if start >= end
            else (kind, index, start, stop, was)
            for kind, index, start, stop, was in self._found
        ]


def _members(asked: V2Request) -> _Members:
    """What a body says, to be compared."""
    inputs: list[dict[str, Any]] = [
        {
            "name": one.name,
            "datatype": one.datatype,
            "shape": list(one.shape),
            "parameters": one.parameters,
            "data": bytes(one.data),
        }
        for one in asked.inputs
    ]
    return asked.id, asked.parameters, msgspec.to_builtins(asked.outputs), inputs


def _changed(said: _Members, kind: int, index: int, probe: bytes) -> _Members:
    """`said` with `probe` for one of its values."""
    asked_id, parameters, outputs, inputs = said
    if kind == ID:
        return probe.decode(), parameters, outputs, inputs
    if kind == USER:
        return asked_id, {**(parameters or {}), "user_id": probe.decode()}, outputs, inputs
    one = dict(inputs[index])
    if kind == ROWS:
        one["shape"] = [int(probe), *one["shape"][1:]]
    elif kind == SIZE:
        one["parameters"] = {"binary_data_size": int(probe)}
    else:
        one["data"] = probe
    return asked_id, parameters, outputs, [*inputs[:index], one, *inputs[index + 1 :]]


def _begin(found: _Found) -> int:
    return found[2]
