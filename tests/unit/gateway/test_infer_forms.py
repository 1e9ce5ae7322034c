"""ModelInfer messages read by their form ask for what the ordinary way reads; answers by their form say the
same."""

from __future__ import annotations

import struct
import sys
import threading
from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest, SealedReply
from headrace.v1.tensor_pb2 import DataType, Signature, Tensor, TensorSpec
from open_inference.open_inference_pb2 import ModelInferRequest, ModelInferResponse

from services.gateway.catalogue import Catalogue, ServedModel
from services.gateway.codecs import oip
from services.gateway.codecs.infer_forms import RequestForm, answer_form, named, names_of, request_form
from services.gateway.infer_plans import InferPlan
from services.gateway.signature import ModelSignature, compile_signature
from tests.fixtures.gateway import configs

ID = bytes(range(16))
NOW_US = 1_700_000_000_000_000

ONE = Signature(
    inputs=[TensorSpec(name="x", datatype=DataType.DATA_TYPE_FP32, shape=[-1, 3])],
    outputs=[TensorSpec(name="y", datatype=DataType.DATA_TYPE_FP32, shape=[-1])],
    batched=True,
)
TWO = Signature(
    inputs=[
        TensorSpec(name="x", datatype=DataType.DATA_TYPE_FP64, shape=[-1, 2]),
        TensorSpec(name="n", datatype=DataType.DATA_TYPE_INT16, shape=[-1, 1]),
    ],
    outputs=[TensorSpec(name="y", datatype=DataType.DATA_TYPE_FP32, shape=[-1])],
    batched=True,
)


def served() -> ServedModel:
    catalogue = Catalogue()
    for config in configs():
        catalogue.apply(config.model.encode(), config.SerializeToString())
    return catalogue.model("cancer")


class Way:
    """Both ways for one model."""

    def __init__(self, signature: Signature) -> None:
        self.signature: ModelSignature = compile_signature(signature)
        self.plan = InferPlan(served())
        self.names = b""

    def ordinary(self, body: bytes) -> PredictRequest:
        asked = ModelInferRequest.FromString(body)
        request = PredictRequest(model=asked.model_name, version=asked.model_version, key_id="k")
        request.request_id, request.received_at_us = ID, NOW_US
        oip.fill_request(request, self.signature, asked)
        return request

    def learn(self, body: bytes) -> bool:
        asked, request = ModelInferRequest.FromString(body), self.ordinary(body)
        names = names_of(body, asked)
        if names is None:
            return False
        self.names = names
        form = request_form(body, names, asked, request, self.signature, oip.timeout_of(asked))
        if form is not None:
            self.plan.learn(form)
        return form is not None

    def quick(self, body: bytes) -> tuple[PredictRequest, bytes, float] | None:
        try:
            at = named(body)
            read = self.plan.request(body, at, ID, NOW_US) if body[:at] == self.names else None
        except IndexError:
            return None
        if read is None:
            return None
        made, tensors, asked_id, form = read
        request = PredictRequest.FromString(b"".join((*(tensors or ()), made)))
        assert form.priority == request.priority
        return request, asked_id, form.timeout_s


def raw(first: float = 1.0, rows: int = 1, **fields: Any) -> ModelInferRequest:
    asked = ModelInferRequest(model_name="cancer", **fields)
    asked.inputs.add(name="x", datatype="FP32", shape=[rows, 3])
    asked.raw_input_contents.append(struct.pack(f"<{rows * 3}f", *[first + n for n in range(rows * 3)]))
    return asked


def typed(first: float = 1.0) -> ModelInferRequest:
    asked = ModelInferRequest(model_name="cancer", id="r-1")
    one = asked.inputs.add(name="x", datatype="FP32", shape=[1, 3])
    one.contents.fp32_contents.extend([first, first + 1, first + 2])
    asked.outputs.add(name="y")
    return asked


def two(first: float = 1.0, *, swapped: bool = False) -> ModelInferRequest:
    asked = ModelInferRequest(model_name="cancer", model_version="2")
    given = [
        ("x", "FP64", [1, 2], struct.pack("<2d", first, 2)),
        ("n", "INT16", [1, 1], struct.pack("<h", 7)),
    ]
    for name, datatype, shape, data in reversed(given) if swapped else given:
        asked.inputs.add(name=name, datatype=datatype, shape=shape)
        asked.raw_input_contents.append(data)
    return asked


def with_parameters(first: float = 1.0) -> ModelInferRequest:
    asked = raw(first, id="p")
    asked.parameters["user_id"].string_param = "u9"
    asked.parameters["priority"].string_param = "low"
    asked.parameters["timeout"].int64_param = 1_500_000
    asked.parameters["level"].double_param = 0.5
    return asked


MESSAGES: dict[str, tuple[Signature, Callable[..., ModelInferRequest]]] = {
    "raw": (ONE, raw),
    "many rows": (ONE, lambda first=1.0: raw(first, 40, model_version="1")),
    "typed": (ONE, typed),
    "several inputs": (TWO, two),
    "several inputs in another order": (TWO, lambda first=1.0: two(first, swapped=True)),
    "parameters": (ONE, with_parameters),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_form_reads_other_numbers_as_the_ordinary_way_does(name: str) -> None:
    signature, message = MESSAGES[name]
    way = Way(signature)
    assert way.learn(message().SerializeToString(deterministic=True))
    for first in (1.0, -7.25, float("inf"), 1e-30):
        body = message(first).SerializeToString(deterministic=True)
        read = way.quick(body)
        assert read is not None
        request, asked_id, timeout_s = read
        asked = ModelInferRequest.FromString(body)
        assert request == way.ordinary(body)
        assert asked_id.decode() == asked.id
        assert timeout_s == oip.timeout_of(asked)


def test_an_id_may_be_another_each_time() -> None:
    way = Way(ONE)
    assert way.learn(raw(id="first").SerializeToString())
    for asked_id in ("", "another", "x" * 127):
        read = way.quick(raw(5.0, id=asked_id).SerializeToString())
        assert read is not None
        assert read[1].decode() == asked_id
    for odd in ("x" * 128, "ß"):
        assert way.quick(raw(5.0, id=odd).SerializeToString()) is None


def test_a_user_may_be_another_each_time() -> None:
    way = Way(ONE)

    def of(user: str, **fields: Any) -> bytes:
        asked = raw(5.0, **fields)
        asked.parameters["user_id"].string_param = user
        return asked.SerializeToString(deterministic=True)

    assert way.learn(of("u1"))
    for body in (of("u2"), of("x" * 114, id="r"), raw(5.0).SerializeToString()):
        read = way.quick(body)
        assert read is not None
        assert read[0] == way.ordinary(body)
    for odd in (of("x" * 115), of("ß"), of("u1") + b"\x22\x0f\x0a\x07user_id\x12\x04\x1a\x02u3"):
        assert way.quick(odd) is None
    # A length of two bytes, of which the second is taken for what follows a length of one.
    long = of("x" * 115)
    at = long.index(b"user_id")
    assert way.quick(long[: at - 3] + long[at - 2 :]) is None
    number = raw(5.0)
    number.parameters["user_id"].int64_param = 5
    assert way.quick(number.SerializeToString()) is None
    twice = of("u1")
    at = twice.index(b"\x22")
    assert not way.learn(twice[:at] + twice[at:].replace(b"\x2a", twice[at : at + 17] + b"\x2a", 1))


def test_what_differs_in_more_than_numbers_is_not_of_the_form() -> None:
    way = Way(ONE)
    assert way.learn(raw().SerializeToString())
    other = raw()
    other.inputs[0].name = "z"
    assert way.quick(other.SerializeToString()) is None
    other = raw()
    other.inputs[0].shape[:] = [3, 1]
    assert way.quick(other.SerializeToString()) is None
    assert way.quick(raw(rows=2).SerializeToString()) is None
    assert way.quick(raw().SerializeToString() + b"\x1a\x01z") is None  # says its id once more
    for cut in range(len(raw().SerializeToString())):
        assert way.quick(raw().SerializeToString()[:cut]) is None


def test_what_has_no_form() -> None:
    way = Way(ONE)
    body = raw().SerializeToString()
    assert not way.learn(body[8:] + body[:8])  # the model's name comes last
    assert not way.learn(body + b"\x1a\x01z")  # an id behind the numbers
    assert not way.learn(body + b"\x0a\x06cancer")  # the model named twice
    packed = ModelInferRequest(model_name="cancer")
    one = packed.inputs.add(name="n", datatype="INT16", shape=[1, 1])
    one.contents.int_contents.append(5)
    x = packed.inputs.add(name="x", datatype="FP64", shape=[1, 2])
    x.contents.fp64_contents.extend([1, 2])
    assert not Way(TWO).learn(packed.SerializeToString())  # numbers of no fixed size


def test_numbers_that_look_like_those_of_another_input_are_told_apart() -> None:
    way = Way(TWO)
    asked = ModelInferRequest(model_name="cancer")
    inner = struct.pack("<h", 7)
    asked.inputs.add(name="x", datatype="FP64", shape=[1, 2])
    asked.inputs.add(name="n", datatype="INT16", shape=[1, 1])
    # The first tensor's bytes hold what the second one looks like.
    asked.raw_input_contents.extend([b"\x3a\x02" + inner + bytes(12), inner])
    body = asked.SerializeToString()
    assert way.learn(body)
    asked.raw_input_contents[1] = struct.pack("<h", 9)
    read = way.quick(asked.SerializeToString())
    assert read is not None
    assert read[0] == way.ordinary(asked.SerializeToString())


@pytest.mark.parametrize("name", MESSAGES)
def test_any_byte_changed_is_read_the_same_or_not_at_all(name: str) -> None:
    signature, message = MESSAGES[name]
    way, body = Way(signature), message(1.0).SerializeToString(deterministic=True)
    assert way.learn(body)
    readable = 0
    for at in range(len(body)):
        for byte in {0, 1, 0x1A, 0x7F, 0x80, 0xFF, body[at] ^ 1} - {body[at]}:
            changed = body[:at] + bytes([byte]) + body[at + 1 :]
            read = way.quick(changed)
            if read is not None:
                readable += 1
                asked = ModelInferRequest.FromString(changed)
                assert asked.id == read[1].decode()
                made, ordinary = read[0], way.ordinary(changed)
                # As bytes, for a number may be none, which is not equal to itself.
                assert made.SerializeToString(deterministic=True) == ordinary.SerializeToString(
                    deterministic=True
                )
    assert readable


def test_messages_that_always_differ_are_given_up() -> None:
    way = Way(ONE)
    assert not way.plan.wants(b"12345")  # the first of its size
    assert way.plan.wants(b"54321")
    for number in range(60):
        body = raw(rows=1, id="").SerializeToString()
        asked = ModelInferRequest.FromString(body)
        asked.parameters["level"].string_param = f"u{number:03}"
        way.learn(asked.SerializeToString())
    assert not way.plan.wants(b"54321")


def reply(rows: int = 2, **fields: Any) -> PredictReply:
    outputs = [
        Tensor(
            name="label",
            datatype=DataType.DATA_TYPE_INT64,
            shape=[rows],
            data=struct.pack(f"<{rows}q", *range(rows)),
        ),
        Tensor(
            name="p",
            datatype=DataType.DATA_TYPE_FP32,
            shape=[rows, 2],
            data=struct.pack(f"<{rows * 2}f", *range(rows * 2)),
        ),
    ]
    said = {"version": "2", "variant": "2"} | fields
    return PredictReply(id=9, outputs=outputs, queue_us=5, **said)


@pytest.mark.parametrize("asked_id", ["r", "x" * 300, "ß"])
@pytest.mark.parametrize("variant", ["2", "challenger"])
def test_answers_by_their_form(variant: str, asked_id: str) -> None:
    known = reply()
    known.variant = variant
    form = answer_form("cancer", known)
    assert form is not None
    other = reply()
    other.variant = variant
    other.outputs[1].data = struct.pack("<4f", 9, 8, 7, 6)
    sealed = SealedReply.FromString(other.SerializeToString())
    made = form.message(sealed.outputs[:], asked_id.encode())
    assert made is not None
    assert ModelInferResponse.FromString(made) == oip.to_response("cancer", asked_id, other)
    for odd in (reply(3), PredictReply(outputs=reply().outputs[:1])):
        assert form.message(SealedReply.FromString(odd.SerializeToString()).outputs[:], b"r") is None


def test_answers_that_say_something_of_one_request_take_the_ordinary_way() -> None:
    plan = InferPlan(served())
    asked = type("Asked", (), {"single": False, "asked_id": b""})()
    plan.learn_answer(reply())
    assert plan.answer(SealedReply.FromString(reply().SerializeToString()), asked, b"i", 1.0)
    for special in (reply(cached=True), reply(fallback=True), reply(experiment="e"), reply(version="3")):
        assert plan.answer(SealedReply.FromString(special.SerializeToString()), asked, b"i", 1.0) is None
    noted = reply()
    noted.parameters["tokens"].int64_value = 3
    assert plan.answer(SealedReply.FromString(noted.SerializeToString()), asked, b"i", 1.0) is None
    for special in (reply(cached=True), noted, reply(0)):
        assert answer_form("cancer", special) is None
    assert (
        answer_form("cancer", PredictReply(outputs=[Tensor(datatype=DataType.DATA_TYPE_BYTES, data=b"1")]))
        is None
    )


def test_sizes_are_looked_through_while_a_thread_learns_more() -> None:
    plan, ended = InferPlan(served()), threading.Event()
    asked = PredictRequest(inputs=[Tensor()])
    forms = [RequestForm([b"", bytes(size)], [0], asked, [0], 1.0) for size in range(500)]

    def learn() -> None:
        for form in cycle(forms):
            plan.learn(form)
            if ended.is_set():
                return

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    learning = threading.Thread(target=learn)
    learning.start()
    try:
        assert not any(plan.knows(-1) for _ in range(5000))
    finally:
        ended.set()
        learning.join()
        sys.setswitchinterval(interval)
