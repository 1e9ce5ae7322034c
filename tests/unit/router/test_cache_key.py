"""Which requests share an answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from headrace.v1.control_pb2 import ServedVersion
from headrace.v1.dataplane_pb2 import PredictRequest
from headrace.v1.tensor_pb2 import DataType, Tensor

from services.router.cache_key import cache_key
from services.router.routing_table import Target


def target(version: str = "1", digest: str = "sha256:1") -> Target:
    return Target("cancer", ServedVersion(version=version, artifact_digest=digest), 1.0)


def asked() -> PredictRequest:
    made = PredictRequest(
        model="cancer",
        inputs=[
            Tensor(name="a", datatype=DataType.DATA_TYPE_FP32, shape=[1, 2], data=b"12345678"),
            Tensor(name="b", datatype=DataType.DATA_TYPE_BYTES, shape=[1], data=b"\1\0\0\0x"),
        ],
        outputs=["y", "z"],
    )
    made.parameters["depth"].int64_value = 3
    made.parameters["mode"].string_value = "fast"
    return made


def key_of(change: Callable[[PredictRequest], object]) -> bytes:
    made = asked()
    change(made)
    return cache_key(target(), made)


def test_who_asks_and_in_what_order_inputs_stand_changes_nothing() -> None:
    same = asked()
    same.inputs.reverse()
    same.unit, same.request_id, same.key_id, same.id = "somebody", bytes(16), "key", 7
    same.parameters.clear()
    same.parameters["mode"].string_value = "fast"
    same.parameters["depth"].int64_value = 3
    assert cache_key(target(), same) == cache_key(target(), asked())


@pytest.mark.parametrize(
    "change",
    [
        lambda r: setattr(r.inputs[0], "data", b"12345679"),
        lambda r: setattr(r.inputs[0], "name", "c"),
        lambda r: setattr(r.inputs[0], "datatype", DataType.DATA_TYPE_INT32),
        lambda r: r.inputs[0].shape.__setitem__(slice(None), [2, 1]),
        lambda r: r.inputs.pop(),
        lambda r: r.outputs.reverse(),
        lambda r: r.outputs.__setitem__(slice(None), ["yz"]),
        lambda r: r.outputs.pop(),
        lambda r: setattr(r.parameters["depth"], "int64_value", 4),
        lambda r: setattr(r.parameters["depth"], "double_value", 3.0),
        lambda r: r.parameters.pop("mode"),
    ],
)
def test_what_the_answer_depends_on_changes_the_key(change: Callable[[PredictRequest], object]) -> None:
    assert key_of(change) != cache_key(target(), asked())


def test_another_version_or_artifact_has_keys_of_its_own() -> None:
    keys = {cache_key(t, asked()) for t in (target(), target("2"), target(digest="sha256:2"))}
    assert len(keys) == 3


def test_parts_do_not_run_into_each_other() -> None:
    def two(first: bytes, second: bytes) -> PredictRequest:
        return PredictRequest(inputs=[Tensor(name="a", data=first), Tensor(name="b", data=second)])

    assert cache_key(target(), two(b"xy", b"")) != cache_key(target(), two(b"x", b"y"))
