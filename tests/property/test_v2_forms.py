"""Bodies of the Open Inference Protocol read by a form ask for what the ordinary way reads, or are left to
it; answers by a form are byte for byte those of the ordinary way."""

from __future__ import annotations

import json
import random
import struct
from dataclasses import dataclass
from typing import Any

import pytest
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest, SealedReply
from headrace.v1.tensor_pb2 import DataType, Signature, Tensor, TensorSpec
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import HeadraceError
from services.common.frames.detached import Buffer
from services.gateway.catalogue import Catalogue, ServedModel
from services.gateway.codecs import v2
from services.gateway.codecs.v2 import V2State
from services.gateway.datatypes import BY_NUMBER
from services.gateway.signature import compile_signature
from services.gateway.v2_plans import V2Plan
from tests.fixtures.gateway import configs

FP32, FP64, FP16 = DataType.DATA_TYPE_FP32, DataType.DATA_TYPE_FP64, DataType.DATA_TYPE_FP16
INT16, BOOL, BYTES = DataType.DATA_TYPE_INT16, DataType.DATA_TYPE_BOOL, DataType.DATA_TYPE_BYTES
OUTPUTS = [
    TensorSpec(name="y", datatype=FP32, shape=[-1, 2]),
    TensorSpec(name="z", datatype=FP32, shape=[-1]),
]
SIGNATURES = [
    Signature(batched=True, outputs=OUTPUTS, inputs=[TensorSpec(name=name, datatype=kind, shape=shape)
                                                     for name, kind, shape in inputs])
    for inputs in (
        [("x", FP32, [-1, 3])],
        [("x", FP64, [-1, 2]), ("n", INT16, [-1, 1])],
        [("b", BOOL, [-1, 2]), ("h", FP16, [-1, 2, 2]), ("x", FP32, [-1, 1])],
        [("x", FP32, [2, 2]), ("n", INT16, [-1, 1])],
    )
] + [
    Signature(batched=False, outputs=OUTPUTS, inputs=[TensorSpec(name="x", datatype=FP32, shape=[-1, 2]),
                                                      TensorSpec(name="w", datatype=FP32, shape=[3])]),
]  # fmt: skip
ID, NOW_US = bytes(range(16)), 1_700_000_000_000_000
CATALOGUE = Catalogue()
for _config in configs():
    CATALOGUE.apply(_config.model.encode(), _config.SerializeToString())
MODEL: ServedModel = CATALOGUE.model("cancer")

Asks = tuple[PredictRequest, V2State, float, int]


@dataclass
class Way:
    """Both ways for one model."""

    signature: Signature

    def __post_init__(self) -> None:
        self.compiled = compile_signature(self.signature)
        self.plan = V2Plan(MODEL)

    def ordinary(self, body: bytes, length: int | None, *, learn: bool = False) -> Asks | None:
        request = PredictRequest(request_id=ID, received_at_us=NOW_US, key_id="k", model="m")
        apart: list[Buffer] = []
        try:
            asked, binary = v2.decode_request(body, None if length is None else b"%d" % length)
            timeout_s = v2.timeout_of(asked.parameters)
            state = v2.fill_request(request, self.compiled, asked, binary, apart)
        except HeadraceError:
            return None
        if learn:
            end = len(body) - len(binary)
            self.plan.learn(body, end, asked, request, self.compiled, state, timeout_s)
        whole = PredictRequest.FromString(b"".join((*apart, request.SerializeToString())))
        return whole, state, timeout_s, whole.priority

    def quick(self, body: bytes, length: int | None) -> Asks | None:
        end = v2.json_end(body, None if length is None else b"%d" % length)
        found = self.plan.request(body, end, ID, NOW_US)
        if found is None:
            return None
        (made, tensors, state), form = found
        whole = PredictRequest.FromString(b"".join((*(tensors or ()), made)))
        return whole, state, form.timeout_s, form.priority

    def agree(self, body: bytes, length: int | None) -> bool:
        """Whether the body was read by a form; then both ways must say the same."""
        quick = self.quick(body, length)
        if quick is None:
            return False
        ordinary = self.ordinary(body, length)
        assert ordinary is not None
        assert _in_order(quick[0]) == _in_order(ordinary[0])
        assert quick[1:] == ordinary[1:]
        return True


def _in_order(request: PredictRequest) -> PredictRequest:
    """Large inputs of the ordinary way come first."""
    tensors = sorted(request.inputs, key=lambda tensor: tensor.name)
    request.ClearField("inputs")
    request.inputs.extend(tensors)
    return request


@dataclass
class Style:
    """How a client writes its bodies, whatever is in them."""

    shuffled: int
    spaced: tuple[str, str]
    indent: int | None
    binary: tuple[bool, ...]
    nested: bool
    named: bool
    user: bool
    extra: dict[str, Any]
    parameters: dict[str, Any]
    outputs: list[dict[str, Any]] | None
    twice: str

    def body(self, way: Way, rows: int, seed: int, asked_id: str, user: str) -> tuple[bytes, int | None]:
        numbers = random.Random(seed)
        order = random.Random(self.shuffled)
        blobs, inputs = [], []
        specs = list(way.compiled.inputs)
        order.shuffle(specs)
        for spec, binary in zip(specs, self.binary, strict=False):
            rest = [abs(size) for size in spec.shape[1:]]
            shape = [spec.shape[0] if spec.shape[0] > 0 else rows, *rest]
            count = 1
            for size in shape:
                count *= size
            flat = [_value(spec.datatype.code, numbers) for _ in range(count)]
            one: dict[str, Any] = {"name": spec.name, "shape": shape, "datatype": spec.datatype.name}
            if binary:
                blobs.append(struct.pack(f"<{count}{spec.datatype.code}", *flat))
                one["parameters"] = {"binary_data_size": len(blobs[-1])}
            else:
                one["data"] = _nested(flat, shape) if self.nested else flat
            inputs.append(_shuffled(one, order))
        said: dict[str, Any] = {"inputs": inputs, **self.extra}
        if self.named:
            said["id"] = asked_id
        parameters = dict(self.parameters)
        if self.user:
            parameters["user_id"] = user
        if parameters:
            said["parameters"] = _shuffled(parameters, order)
        if self.outputs is not None:
            said["outputs"] = self.outputs
        text = json.dumps(_shuffled(said, order), separators=self.spaced, indent=self.indent)
        if self.twice:
            text = text.replace("{", "{" + self.twice, 1)
        head = text.encode()
        return head + b"".join(blobs), len(head) if blobs else None


def _value(code: str, numbers: random.Random) -> Any:
    if code == "?":
        return numbers.random() < 0.5
    if code == "h":
        return numbers.randrange(-1000, 1000)
    return round(numbers.uniform(-100, 100), 2)


def _nested(flat: list[Any], shape: list[int]) -> Any:
    if len(shape) == 1:
        return flat
    size = len(flat) // shape[0]
    return [_nested(flat[at : at + size], shape[1:]) for at in range(0, len(flat), size)]


def _shuffled(members: dict[str, Any], order: random.Random) -> dict[str, Any]:
    pairs = list(members.items())
    order.shuffle(pairs)
    return dict(pairs)


ids = st.sampled_from(
    ["", "r-1", "a" * 200, "~", 'q"uote', "back\\slash", "ümlaut", "tab\t", "1", "inputs", "\x7f"]
)
users = st.sampled_from(["u1", "", "x" * 127, "y" * 128, "z" * 600, 'a"b', "é", "~", "7", "user_id"])
styles = st.builds(
    Style,
    shuffled=st.integers(0, 1 << 16),
    spaced=st.sampled_from([(",", ":"), (", ", ": "), (" ,", " :")]),
    indent=st.sampled_from([None, None, 1]),
    binary=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    nested=st.booleans(),
    named=st.booleans(),
    user=st.booleans(),
    extra=st.sampled_from(
        [{}, {}, {"note": [1, 2, 3]}, {"m": {"name": "x", "data": [1]}}, {"w\\u": "\\u00e9 \U0001f600"}]
    ),
    parameters=st.sampled_from(
        [
            {}, {}, {"priority": "low"}, {"timeout": 1_500_000}, {"binary_data_output": True},
            {"level": 1.5, "a": "b"}, {"session_id": "s"}, {"temperature": None, "n": 3},
        ]
    ),
    outputs=st.sampled_from(
        [
            None, None, [], [{"name": "y"}],
            [{"name": "z"}, {"name": "y", "parameters": {"binary_data": True}}],
            [{"name": "y", "parameters": {"binary_data": False}}],
        ]
    ),
    twice=st.sampled_from(["", "", '"id":"first",', '"inputs":[],', '"parameters":{"user_id":"u0"},']),
)  # fmt: skip


@settings(max_examples=250, deadline=None)
@given(
    index=st.integers(0, len(SIGNATURES) - 1),
    style=styles,
    values=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 99), ids, users), min_size=2, max_size=5),
    cuts=st.randoms(use_true_random=False),
)
def test_forms_read_what_the_ordinary_way_reads(
    index: int, style: Style, values: list[tuple[int, int, str, str]], cuts: random.Random
) -> None:
    way = Way(SIGNATURES[index])
    bodies = [style.body(way, *one) for one in values]
    for body, length in bodies:
        if not way.agree(body, length):
            way.ordinary(body, length, learn=True)
        way.agree(body, length)
        for _mutation in range(6):
            changed = _mutated(body, cuts)
            way.agree(changed, length)
            way.agree(changed, None)


def _mutated(body: bytes, cuts: random.Random) -> bytes:
    at, size = cuts.randrange(len(body)), cuts.choice((0, 1, 1, 2, 5))
    put = cuts.choice(
        (b"", b"0", b"9", b"-", b".", b"e", b",", b'"', b"[", b"]", b"}", b" ", b"\\u0031", b"\xff")
    )
    return body[:at] + put + body[at + size :]


PLAIN = Style(0, (",", ":"), None, (False,) * 3, False, True, True, {}, {}, None, "")


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_other_rows_ids_and_users_are_of_one_form(index: int, *, binary: bool) -> None:
    way = Way(SIGNATURES[index])
    style = Style(**{**vars(PLAIN), "binary": (binary,) * 3})
    assert way.ordinary(*style.body(way, 3, 0, "first", "someone"), learn=True) is not None
    for rows, seed, asked_id, user in ((3, 1, "second", "other"), (1, 2, "", "u"), (700, 3, "x" * 300, "v")):
        assert way.agree(*style.body(way, rows, seed, asked_id, user))
    assert not way.agree(*style.body(way, 3, 4, 'quoted"', "u"))
    assert not way.agree(*style.body(way, 3, 4, "i", "u" * 128))


def test_rows_that_differ_between_inputs_are_left() -> None:
    way = Way(SIGNATURES[1])
    body, _length = PLAIN.body(way, 2, 0, "i", "u")
    assert way.ordinary(body, None, learn=True) is not None
    assert way.agree(body, None)
    assert not way.agree(body.replace(b"[2,2]", b"[1,2]"), None)
    assert not way.agree(body.replace(b"[2,", b"[02,"), None)


def test_large_inputs_stand_apart_from_the_request() -> None:
    way = Way(SIGNATURES[0])
    for binary in (True, False):
        style = Style(**{**vars(PLAIN), "binary": (binary,)})
        body, length = style.body(way, 4000, 0, "i", "u")
        way.ordinary(body, length, learn=True)
        found = way.plan.request(body, length or len(body), ID, NOW_US)
        assert found is not None
        tensors = found[0][1]
        assert tensors is not None
        assert [isinstance(part, memoryview) for part in tensors] == [False, binary]
        assert way.agree(body, length)


def test_clients_whose_bodies_all_differ_are_given_up_and_others_stay() -> None:
    way = Way(SIGNATURES[0])
    steady = PLAIN.body(way, 1, 0, "i", "u")
    way.ordinary(*steady, learn=True)
    for number in range(100):
        body, length = Style(**{**vars(PLAIN), "extra": {"note": number}}).body(way, 1, 0, "i", "u")
        assert not way.agree(body, length)
        way.ordinary(body, length, learn=True)
        assert way.agree(*steady)
    late = Style(**{**vars(PLAIN), "extra": {"note": "late"}}).body(way, 1, 0, "i", "u")
    for _attempt in range(70):
        way.ordinary(*late, learn=True)
    assert way.agree(*late)


def test_parameters_of_inputs_are_for_the_ordinary_way() -> None:
    way = Way(SIGNATURES[0])
    body, _length = PLAIN.body(way, 1, 0, "i", "u")
    said = json.loads(body)
    said["inputs"][0]["parameters"] = {"other": 1}
    odd = json.dumps(said).encode()
    assert way.ordinary(odd, None, learn=True) is not None
    assert not way.agree(odd, None)


@dataclass
class _Asked:
    v2: V2State | None
    single: bool = False
    asked_id: bytes = b""


kinds = st.sampled_from(
    [FP32, FP64, FP16, INT16, BOOL, BYTES, DataType.DATA_TYPE_BF16, DataType.DATA_TYPE_UINT64]
)


@st.composite
def tensors(draw: st.DrawFn, name: str) -> Tensor:
    kind = draw(kinds)
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    count = 1
    for size in shape:
        count *= size
    if kind == BYTES:
        data = b"".join(struct.pack("<I", 2) + b"ab" for _ in range(count))
    elif kind == BOOL:
        data = draw(
            st.binary(min_size=count, max_size=count).map(lambda raw: bytes(byte & 1 for byte in raw))
        )
    else:
        size = count * BY_NUMBER[kind].itemsize
        data = draw(st.binary(min_size=size, max_size=size))
    return Tensor(name=name, datatype=kind, shape=shape, data=data)


@given(
    outputs=st.tuples(tensors("y"), tensors('z"é')),
    other=st.binary(min_size=8, max_size=8),
    asked_id=ids,
    binary=st.sampled_from(
        [None, frozenset(), frozenset({"y"}), frozenset({'z"é'}), frozenset({"y", 'z"é'})]
    ),
    variant=st.sampled_from(["", "1", "b%"]),
    experiment=st.sampled_from(["", "exp"]),
    special=st.sampled_from(["", "", "cached", "fallback", "parameters"]),
)
def test_answers_are_those_of_the_ordinary_way(
    outputs: tuple[Tensor, Tensor],
    other: bytes,
    asked_id: str,
    binary: frozenset[str] | None,
    variant: str,
    experiment: str,
    special: str,
) -> None:
    plan, state = V2Plan(MODEL), V2State(asked_id, binary)
    reply = PredictReply(version="1", variant=variant, experiment=experiment, outputs=outputs)
    if special == "parameters":
        reply.parameters["n"].int64_value = 3
    elif special:
        setattr(reply, special, True)
    plan.learn_answer(state, reply)
    if outputs[0].datatype not in (BYTES, BOOL):
        changed = (other * 27)[: len(outputs[0].data)]
        reply.outputs[0].data = changed
    said = plan.answer(SealedReply.FromString(reply.SerializeToString()), _Asked(state), b"0" * 32, 1.0)
    body, length = v2.encode_answer(MODEL.name, state, "0" * 32, reply)
    if special or BYTES in (outputs[0].datatype, outputs[1].datatype):
        assert said is None
    else:
        assert said == (v2.answer_head(length), body)


def test_answers_of_another_form_are_left() -> None:
    plan, state = V2Plan(MODEL), V2State("", frozenset())
    reply = PredictReply(version="1")
    reply.outputs.add(name="y", datatype=FP32, shape=[1, 2], data=bytes(8))
    plan.learn_answer(state, reply)

    def said(state: V2State | None = state) -> Any:
        return plan.answer(SealedReply.FromString(reply.SerializeToString()), _Asked(state), b"i", 1.0)

    assert said() is not None
    assert said(V2State("", None)) is None
    assert said(None) is None
    reply.outputs[0].shape[:] = [2, 1]
    assert said() is None
    reply.ClearField("outputs")
    assert said() is None
