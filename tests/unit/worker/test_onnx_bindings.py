"""Runs through buffers that are kept give what usual runs give, or leave it to them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort
from headrace.v1.tensor_pb2 import Signature

from services.worker.backends.onnx import load
from services.worker.backends.onnx_bindings import Bindings
from services.worker.backends.port import BackendOptions, KeptBuffers
from services.worker.execution import Runner
from services.worker.input_layout import InputLayout
from tests.fixtures.onnx_models import lookup, mlp


def session(model: bytes) -> ort.InferenceSession:
    return ort.InferenceSession(model, providers=["CPUExecutionProvider"])


def rows_of(count: int, features: int = 4) -> bytes:
    return np.random.default_rng(count).standard_normal((count, features)).astype(np.float32).tobytes()


def usual(model: bytes, data: bytes, features: int = 4) -> bytes:
    array = np.frombuffer(data, np.float32).reshape(-1, features)
    answers: Sequence[np.ndarray[tuple[int, ...], np.dtype[np.float32]]] = session(model).run(
        ["y"], {"x": array}
    )
    return answers[0].tobytes()


def test_what_comes_out_is_what_a_usual_run_gives_whatever_ran_before() -> None:
    model, signature = mlp(4)
    bindings = Bindings(session(model), signature)
    for count in (1, 3, 1, 3, 64):
        data = rows_of(count)
        assert bindings.run([data], count) == [(usual(model, data), (2,))]
    first, second = rows_of(2), rows_of(2)[16:] + rows_of(2)[:16]
    given = [bindings.run([data], 2) for data in (first, second, first)]
    assert given[0] == given[2] != given[1]


def test_threads_do_not_share_buffers() -> None:
    model, signature = mlp(4)
    bindings = Bindings(session(model), signature)
    inputs = [np.full((2, 4), number, np.float32).tobytes() for number in range(200)]
    with ThreadPoolExecutor(4) as pool:
        given = list(pool.map(lambda data: bindings.run([data], 2), inputs))
    for data, made in zip(inputs, given, strict=True):
        # Two threads may reach for the last free buffers at once: who gets none runs the usual way.
        assert made is None or made == [(usual(model, data), (2,))]
    assert any(given)


def test_what_fails_is_left_to_a_usual_run_and_what_follows_is_not_hurt() -> None:
    model, signature = lookup(10)
    bindings = Bindings(session(model), signature)

    def asked(index: int) -> list[tuple[bytes, tuple[int, ...]]] | None:
        return bindings.run([np.array([index], np.int64).tobytes()], 1)

    assert asked(99) is None
    assert asked(7) == [(np.array([700], np.float32).tobytes(), ())]
    assert bindings.run([b"too short"], 1) is None
    assert asked(3) == [(np.array([300], np.float32).tobytes(), ())]


def test_what_always_fails_is_not_tried_for_ever() -> None:
    model, signature = mlp(4)
    wrong = Signature()
    wrong.CopyFrom(signature)
    wrong.outputs[0].shape[1] = 3
    bindings = Bindings(session(model), wrong)
    for _ in range(20):
        assert bindings.run([rows_of(1)], 1) is None
    assert not bindings.offered


def test_what_is_large_or_of_no_fixed_size_goes_the_usual_way() -> None:
    model, signature = mlp(4)
    assert Bindings(session(model), signature).run([rows_of(65)], 65) is None
    open_length = Signature()
    open_length.CopyFrom(signature)
    open_length.inputs[0].shape[1] = -1
    assert not Bindings(session(model), open_length).offered
    wide, wide_signature = mlp(2000)
    assert not Bindings(session(wide), wide_signature).offered


def test_a_runner_answers_the_same_with_and_without(tmp_path: Path) -> None:
    model, signature = mlp(4)
    (tmp_path / "model.onnx").write_bytes(model)
    backend = load(tmp_path, signature, BackendOptions())
    assert isinstance(backend, KeptBuffers)
    layout = InputLayout(signature)
    runner = Runner(backend, signature, layout)
    key, data = layout.synthetic(2, 1)
    kept, _, _ = runner.run(key, data, 2, 64)
    named, _, _ = runner.run((("y",), key[1]), data, 2, 64)
    for one, other in zip(kept, named, strict=True):
        assert (one.name, one.datatype, one.shape, one.data, one.stride) == (
            other.name, other.datatype, other.shape, other.data, other.stride
        )  # fmt: skip
    backend.close()
    assert backend.run_kept(data, 2) is None
