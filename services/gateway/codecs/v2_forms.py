"""Bodies of the Open Inference Protocol that are like one before, but for what changes between requests.

A client writes the same JSON again and again: only numbers change, and perhaps its id, its user, and how many
rows there are. A JSON value may be exchanged for another without a say in how the rest is read; so a body of
the same bytes around those places asks for the same with other values, and only these are read. Where the
places are `v2_learning` finds out. Whatever fits no form, or has a value that a form does not read, takes the
ordinary way.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from math import prod
from typing import Final

import msgspec
from headrace.v1.dataplane_pb2 import PredictRequest

from services.common.errors import HeadraceError
from services.common.frames.detached import Buffer
from services.gateway.codecs.compiled import UNITS, tensor_head, varint
from services.gateway.codecs.numbers import LONG_BYTES, packed_numbers
from services.gateway.codecs.tensors import PARSE_ERRORS, tensor_from_json
from services.gateway.codecs.v2 import LARGE_BYTES, V2State
from services.gateway.signature import InputSpec

#: What changes: the id, the user, the rows of an input, how many of its bytes follow the JSON, its numbers.
ID, USER, ROWS, SIZE, NUMBERS = range(5)
#: Kind, number of the input, and the bytes behind the value.
Place = tuple[int, int, bytes]
#: A PredictRequest as bytes, what of it stands apart before it, and what the answer must know.
Read = tuple[bytes, tuple[Buffer, ...] | None, V2State]

#: Tags of PredictRequest: inputs (4), request_id (5, with its length), received_at_us (12).
_INPUTS, _REQUEST_ID, _RECEIVED_AT = b"\x22", b"\x2a\x10", b"\x61"
_TAIL = struct.Struct("<2s16scQ")
_ZERO = b"0"[0]
_MAX_DIGITS: Final = 9
#: Rows whose heads are kept.
_REMEMBERED_ROWS: Final = 256


class FormInput:
    """One input of a form. `shape` is that of the body that was learned, of which the rows may change."""

    __slots__ = ("binary", "elements", "nested", "row_bytes", "shape", "spec", "struct")

    def __init__(self, spec: InputSpec, shape: Sequence[int], *, binary: bool, nested: bool) -> None:
        self.spec = spec
        self.shape = tuple(shape)
        #: Its bytes follow the JSON.
        self.binary = binary
        #: Lists in lists stand in the JSON.
        self.nested = nested
        #: Of one row.
        self.elements = prod(self.shape[1:])
        self.row_bytes = self.elements * spec.datatype.itemsize
        self.struct = struct.Struct("")

    def packed(self, text: bytes, start: int, stop: int, rows: int) -> bytes | None:
        """What `text[start:stop]` says, as raw numbers; None where it is not `rows` rows of them."""
        size = rows * self.row_bytes
        if self.nested:
            return self._from_nested(text[start:stop], rows)
        if stop - start >= LONG_BYTES:
            data = packed_numbers(self.spec.datatype, text, start, stop)
            if data is not None:
                return data if len(data) == size else None
        try:
            flat = self.spec.flat_decoder.decode(text[start:stop])
            if len(flat) != rows * self.elements:
                return None
            if self.struct.size != size:
                self.struct = struct.Struct(f"<{len(flat)}{self.spec.datatype.code}")
            return self.struct.pack(*flat)
        except (struct.error, OverflowError, msgspec.ValidationError, *PARSE_ERRORS):
            return None

    def _from_nested(self, text: bytes, rows: int) -> bytes | None:
        try:
            tensor = tensor_from_json(self.spec, text, "")
        except HeadraceError:
            return None
        return tensor.data if tuple(tensor.shape) == (rows, *self.shape[1:]) else None

    def head(self, rows: int) -> bytes:
        """What stands before its numbers in a PredictRequest; `rows` is 0 where they are always as many."""
        shape = (rows or self.shape[0], *self.shape[1:])
        size = shape[0] * self.row_bytes
        head = tensor_head(self.spec.name, self.spec.datatype.number, shape, size)
        return _INPUTS + varint(len(head) + size) + head


class RequestForm:
    """Bodies whose JSON is `first`, then a value and what stands behind it, for each of `places`."""

    __slots__ = (
        "_binary",
        "_constant",
        "_first",
        "_heads",
        "_id",
        "_inputs",
        "_numbers",
        "_order",
        "_places",
        "_rows",
        "_sizes",
        "_state",
        "_user",
        "priority",
        "recent",
        "timeout_s",
        "used",
    )

    def __init__(
        self,
        first: bytes,
        places: Sequence[Place],
        inputs: Sequence[FormInput],
        order: Sequence[int],
        request: PredictRequest,
        state: V2State,
        timeout_s: float,
    ) -> None:
        """`request` is what one of the bodies asks for, its input number i the one that stands in place
        `order[i]`; `state` is what its answer must know."""
        self._first = first
        self._places = tuple(places)
        self._inputs = tuple(inputs)
        self._order = tuple(order)
        # By the positions of places; -1: it is the same in every body, or stands behind the JSON.
        kinds = [kind for kind, _input, _behind in places]
        self._id = kinds.index(ID) if ID in kinds else -1
        self._user = kinds.index(USER) if USER in kinds else -1
        self._rows = tuple(at for at, kind in enumerate(kinds) if kind == ROWS)
        self._sizes = tuple((at, one) for at, (kind, one, _behind) in enumerate(places) if kind == SIZE)
        numbers = {one: at for at, (kind, one, _behind) in enumerate(places) if kind == NUMBERS}
        self._numbers = tuple(numbers.get(index, -1) for index in range(len(inputs)))
        self._binary = state.binary
        self._state = state if self._id < 0 else V2State("", state.binary)
        self.priority: int = request.priority
        self.timeout_s = timeout_s
        #: Whether any body fitted, ever and lately; for who keeps forms.
        self.used = self.recent = False
        constant = PredictRequest()
        constant.CopyFrom(request)
        for name in ("inputs", "request_id", "received_at_us"):
            constant.ClearField(name)
        if self._user >= 0:
            constant.ClearField("unit")
        self._constant = constant.SerializeToString()
        self._heads: dict[int, tuple[bytes, ...]] = {}

    def request(self, body: bytes, end: int, request_id: bytes, received_at_us: int) -> Read | None:
        """What `body` asks for, whose JSON ends at `end`; None where it is of another form."""
        spans = self._spans(body, end)
        if spans is None:
            return None
        rows = self._said_rows(body, spans)
        asked_id, user = _text(body, spans, self._id), _text(body, spans, self._user)
        if rows < 0 or asked_id is None or user is None or len(user) >= len(UNITS):
            return None
        datas = self._datas(body, end, spans, rows)
        if datas is None:
            return None
        heads = self._heads.get(rows)
        if heads is None:
            heads = self._heads_of(rows)
        tail = _TAIL.pack(_REQUEST_ID, request_id, _RECEIVED_AT, received_at_us)
        if user:
            tail += UNITS[len(user)] + user
        state = V2State(asked_id.decode(), self._binary) if asked_id else self._state
        parts: list[Buffer] = [self._constant]
        apart: list[Buffer] = []
        for place in self._order:
            data = datas[place]
            if len(data) < LARGE_BYTES:
                parts.append(heads[place])
                parts.append(data)
            else:
                apart.append(heads[place])
                apart.append(data)
        parts.append(tail)
        return b"".join(parts), tuple(apart) if apart else None, state

    def _spans(self, body: bytes, end: int) -> list[tuple[int, int]] | None:
        """Where the value of each place begins and ends."""
        first = self._first
        if not body.startswith(first):
            return None
        at = len(first)
        spans: list[tuple[int, int]] = []
        left = len(self._places)
        for _kind, _input, behind in self._places:
            left -= 1
            if left:
                stop = body.find(behind, at, end)
            else:
                stop = end - len(behind)
                if stop >= at and not body.startswith(behind, stop):
                    return None
            if stop < at:
                return None
            spans.append((at, stop))
            at = stop + len(behind)
        return spans if at == end else None

    def _said_rows(self, body: bytes, spans: list[tuple[int, int]]) -> int:
        """How many rows there are; 0 where they are always as many, -1 where it is not said twice alike."""
        rows = 0
        for place in self._rows:
            start, stop = spans[place]
            said = _number(body[start:stop])
            if not said or rows not in (0, said):
                return -1
            rows = said
        for place, index in self._sizes:
            start, stop = spans[place]
            if body[start:stop] != b"%d" % (rows * self._inputs[index].row_bytes):
                return -1
        return rows

    def _datas(self, body: bytes, end: int, spans: list[tuple[int, int]], rows: int) -> list[Buffer] | None:
        """The numbers of each input, large ones behind the JSON as views."""
        datas: list[Buffer] = []
        size = len(body)
        at = end
        for one, place in zip(self._inputs, self._numbers, strict=True):
            count = rows or one.shape[0]
            if place < 0:
                stop = at + count * one.row_bytes
                if stop > size:
                    return None
                datas.append(body[at:stop] if stop - at < LARGE_BYTES else memoryview(body)[at:stop])
                at = stop
            else:
                start, stop = spans[place]
                packed = one.packed(body, start, stop, count)
                if packed is None:
                    return None
                datas.append(packed)
        return datas if at == size else None

    def _heads_of(self, rows: int) -> tuple[bytes, ...]:
        """What stands before the numbers of each input."""
        if len(self._heads) >= _REMEMBERED_ROWS:
            self._heads.clear()
        made = self._heads[rows] = tuple([one.head(rows) for one in self._inputs])
        return made


def plain(text: bytes) -> bool:
    """Whether `text` between quotes stands for itself."""
    return text.isascii() and text.decode().isprintable() and b'"' not in text and b"\\" not in text


def _text(body: bytes, spans: list[tuple[int, int]], place: int) -> bytes | None:
    """The text at `place`, nothing where there is none; None where it does not stand for itself."""
    if place < 0:
        return b""
    start, stop = spans[place]
    text = body[start:stop]
    return text if plain(text) else None


def _number(text: bytes) -> int:
    """The whole number above 0 that `text` says in digits; 0 where it says none."""
    if not text.isdigit() or len(text) > _MAX_DIGITS or text[0] == _ZERO:
        return 0
    return int(text)
