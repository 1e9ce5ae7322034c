"""OpenAI batch files: lines to rows, and results back to lines."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from headrace.v1.tensor_pb2 import Signature, Task, TensorSpec
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import HeadraceError, Internal, InvalidArgument
from services.gateway.jobs.openai_answers import (
    Rendering,
    RowReader,
    array_of_column,
    shown_of,
    signature_of,
    write_answers,
)
from services.gateway.jobs.openai_lines import MAX_FINDINGS, LineReader, model_of_endpoint
from services.gateway.jobs.openai_rows import LinePlan, Refused, compile_lines, plans
from services.gateway.signature import ModelSignature, compile_signature
from tests.fixtures.gateway import cancer_signature

CANCER = compile_signature(cancer_signature())
EMBEDDER = compile_signature(
    Signature(
        inputs=[TensorSpec(name="text", datatype="DATA_TYPE_BYTES", shape=[-1])],
        outputs=[TensorSpec(name="embedding", datatype="DATA_TYPE_FP32", shape=[-1, 2])],
        batched=True,
        task=Task.TASK_EMBEDDING,
    )
)


HEAD = b'{"custom_id":"b","method":"POST","url":"/v1/predict"'


def line(custom_id: Any = "a", url: str = "/v1/predict", method: str = "POST", **body: Any) -> bytes:
    body = {"model": "cancer", "inputs": [[1, 2, 3]]} | body
    return json.dumps({"custom_id": custom_id, "method": method, "url": url, "body": body}).encode() + b"\n"


def found(lines: Sequence[bytes], endpoint: str = "/v1/predict") -> list[tuple[int | None, str, str | None]]:
    reader = LineReader(endpoint)
    list(reader.read(lines))
    return [(finding.line, finding.code, finding.param) for finding in reader.findings]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], (None, "empty_file", None)),
        ([b"\n", b"  \r\n"], (None, "empty_file", None)),
        ([line(), b"{\n"], (2, "invalid_json_line", None)),
        ([line(), b"[1]\n"], (2, "invalid_json_line", None)),
        ([line(), b"\xff\xfe\n"], (2, "invalid_json_line", None)),
        ([line(), HEAD + b"}"], (2, "missing_required_parameter", "body")),
        ([line(), HEAD + b',"body":[]}'], (2, "invalid_json_line", None)),
        ([line(), line(7)], (2, "missing_required_parameter", "custom_id")),
        ([line(), line("")], (2, "missing_required_parameter", "custom_id")),
        ([line(), b"\n", line()], (3, "duplicate_custom_id", "custom_id")),
        ([line(), line("b", method="GET")], (2, "invalid_method", "method")),
        ([line(), line("b", url="/v1/embeddings")], (2, "invalid_url", "url")),
        ([line(), line("b", model="other")], (2, "mismatched_model", "body.model")),
        ([line(), line("b", version=2)], (2, "mismatched_model", "body.model")),
        ([line(), line("b", model="")], (2, "missing_required_parameter", "body.model")),
    ],
)  # fmt: skip
def test_a_line_that_is_no_request_is_named(lines: list[bytes], expected: tuple[Any, ...]) -> None:
    assert found(lines) == [expected]


def test_the_path_may_name_the_model() -> None:
    endpoint = "/v1/models/cancer/predict"
    bare = json.dumps({"custom_id": "a", "method": "POST", "url": endpoint, "body": {"inputs": [[1, 2, 3]]}})
    assert found([bare.encode()], endpoint) == []
    assert found([line(url=endpoint, model="other")], endpoint) == [(1, "mismatched_model", "body.model")]
    assert model_of_endpoint("/v1/chat/completions") is None


def test_findings_and_lines_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(found([b"{\n"] * 200)) == MAX_FINDINGS
    monkeypatch.setattr("services.gateway.jobs.openai_lines.MAX_LINES", 3)
    assert found([line(str(number)) for number in range(3)]) == []
    assert found([line(str(number)) for number in range(4)]) == [(None, "too_many_tasks", None)]


def compiled(
    folder: Path, lines: Sequence[bytes], signature: ModelSignature, endpoint: str = "/v1/predict"
) -> tuple[pa.Table, list[LinePlan]]:
    source = folder / "source"
    source.write_bytes(b"".join(lines))
    made = compile_lines(source, endpoint, signature, folder / "rows", folder / "plans")
    with pa.ipc.open_file(str(folder / "rows")) as rows:
        table = rows.read_all()
    kept = [plans.decode(text) for text in (folder / "plans").read_bytes().splitlines()]
    assert made.lines == len(kept)
    assert made.rows == table.num_rows == sum(plan.rows for plan in kept)
    return table, kept


def test_lines_of_any_form_become_rows_of_one_table(tmp_path: Path) -> None:
    columns = {"mean radius": [4], "mean texture": [5], "area": [6]}
    lines = [
        line("rows", inputs=[[1, 2, 3], [1.5, 2, 3]]),
        line("columns", inputs=columns),
        line("single", inputs=None).replace(b'"inputs": null', b'"input": [7, 8, 9]'),
        line("bad", inputs=[[1, 2]]),
        line("outputs", outputs=["label"]),
    ]  # fmt: skip
    table, kept = compiled(tmp_path, lines, CANCER)
    assert table.column("x").to_pylist() == [[1, 2, 3], [1.5, 2, 3], [4, 5, 6], [7, 8, 9], [1, 2, 3]]
    assert [plan.rows for plan in kept] == [2, 1, 1, 0, 1]
    assert [plan.single for plan in kept] == [False, False, True, False, False]
    assert kept[4].outputs == ["label"]
    assert kept[3].status == 400
    assert kept[3].error is not None
    assert kept[3].error["param"] == "inputs[0]"


@pytest.mark.parametrize(
    ("shape", "first", "second"),
    [
        ([-1, -1], [[1, 2], [3, 4]], [[5]]),
        ([-1, -1, 2], [[[1, 2], [3, 4]]], [[[5, 6]], [[7, 8]]]),
        ([-1, 2, -1], [[[1], [2]]], [[[3, 4, 5], [6, 7, 8]]]),
        ([-1, -1, -1], [[[1, 2]], [[3, 4]]], [[[5], [6], [7]]]),
        ([-1, 1, -1, -1], [[[[1, 2], [3, 4]]]], [[[[5, 6, 7]]]]),
    ],
)
@pytest.mark.parametrize("datatype", ["DATA_TYPE_FP32", "DATA_TYPE_INT16", "DATA_TYPE_BYTES"])
def test_rows_of_any_shape_become_lists_in_lists(
    tmp_path: Path, datatype: str, shape: list[int], first: list[Any], second: list[Any]
) -> None:
    outputs = [TensorSpec(name="y", datatype="DATA_TYPE_FP32", shape=[-1])]
    signature = compile_signature(
        Signature(
            inputs=[TensorSpec(name="x", datatype=datatype, shape=shape)],
            outputs=outputs,
            batched=True,
        )
    )
    if datatype == "DATA_TYPE_BYTES":
        first, second = (json.loads(re.sub(r"(\d)", r'"\1"', json.dumps(rows))) for rows in (first, second))
    table, _kept = compiled(tmp_path, [line("a", inputs=first), line("b", inputs=second)], signature)
    assert table.column("x").to_pylist() == first + second


def test_texts_of_embeddings_become_rows(tmp_path: Path) -> None:
    def texts(custom_id: str, given: Any, **more: Any) -> bytes:
        body = {"model": "m", "input": given} | more
        asked = {"custom_id": custom_id, "method": "POST", "url": "/v1/embeddings", "body": body}
        return json.dumps(asked).encode() + b"\n"

    lines = [texts("a", "one"), texts("b", ["two", "three é"], encoding_format="base64"), texts("c", [1])]
    table, kept = compiled(tmp_path, lines, EMBEDDER, "/v1/embeddings")
    assert table.column("text").to_pylist() == ["one", "two", "three é"]
    assert [(plan.rows, plan.base64) for plan in kept] == [(1, False), (2, True), (0, False)]


def test_a_model_that_embeds_nothing_is_refused_as_by_the_route(tmp_path: Path) -> None:
    body = {"model": "cancer", "input": [[1, 2, 3]]}
    asked = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": body}
    _table, [plan] = compiled(tmp_path, [json.dumps(asked).encode()], CANCER, "/v1/embeddings")
    assert (plan.rows, plan.status, plan.error) == (
        0,
        400,
        {
            "message": "cancer does not embed texts.",
            "type": "invalid_request_error",
            "param": "model",
            "code": None,
        },
    )


def test_a_file_with_a_wrong_line_makes_no_rows(tmp_path: Path) -> None:
    with pytest.raises(Refused) as refused:
        compiled(tmp_path, [line("a"), b"{", line("a")], CANCER)
    assert [finding.line for finding in refused.value.findings] == [2]


def test_a_model_whose_inputs_json_cannot_hold_is_refused_before_any_line(tmp_path: Path) -> None:
    """Not tried again until the platform seems to have failed."""
    spec = TensorSpec(name="x", datatype="DATA_TYPE_BF16", shape=[-1, 2])
    signature = compile_signature(Signature(inputs=[spec], outputs=[spec], batched=True))
    with pytest.raises(Refused, match="x has a type") as refused:
        compiled(tmp_path, [line("a")], signature)
    assert [finding.param for finding in refused.value.findings] == ["body.model"]


def results(rows: Sequence[int], cut: int = 2) -> Iterator[pa.RecordBatch]:
    """Row i was answered [label i % 2, probabilities [i / 8, 1 - i / 8]]."""
    for first in range(0, len(rows), cut):
        some = np.array(rows[first : first + cut])
        probabilities = np.stack([some / 8, 1 - some / 8], axis=1).astype(np.float32)
        yield pa.record_batch(
            {
                "row": pa.array(some.astype(np.uint64)),
                "label": pa.array(some % 2),
                "probabilities": pa.FixedSizeListArray.from_arrays(pa.array(probabilities.reshape(-1)), 2),
            }
        )


def answers(
    kept: Sequence[LinePlan],
    rows: Sequence[int],
    errors: Sequence[tuple[int, HeadraceError]] = (),
    ended: str = "completed",
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rendering = Rendering("batch_1", "cancer", "1", signature_of(shown_of(CANCER)), False, ended)
    good, bad = io.BytesIO(), io.BytesIO()
    counts = write_answers(rendering, kept, results(rows), iter(errors), good, bad)
    read = [[json.loads(text) for text in file.getvalue().splitlines()] for file in (good, bad)]
    assert (counts.completed, counts.failed) == (len(read[0]), len(read[1]))
    return read[0], read[1]


def test_usage_is_told_where_the_backend_counted_tokens() -> None:
    rendering = Rendering("batch_1", "m", "1", signature_of(shown_of(EMBEDDER)), True, "completed")
    vectors = pa.FixedSizeListArray.from_arrays(pa.array([1.0, 2.0] * 3, pa.float32()), 2)
    columns = {"row": pa.array([0, 1, 2], pa.uint64()), "embedding": vectors}
    for more, usage in (
        ({"headrace.tokens": pa.array([3, 4, 5])}, {"prompt_tokens": 7, "total_tokens": 7}),
        ({}, None),
    ):
        good = io.BytesIO()
        kept = [LinePlan("a", 2), LinePlan("b", 1)]
        write_answers(rendering, kept, iter([pa.record_batch(columns | more)]), iter([]), good, io.BytesIO())
        assert json.loads(good.getvalue().splitlines()[0])["response"]["body"]["usage"] == usage


def test_results_come_back_to_their_lines() -> None:
    kept = [
        LinePlan("a", 3),
        LinePlan("b", 0, status=400, error={"message": "no", "type": "t", "param": None, "code": None}),
        LinePlan("c", 1, single=True),
        LinePlan("d", 2, outputs=["label"]),
        LinePlan("e", 1),
    ]
    good, bad = answers(kept, [0, 1, 2, 3, 4, 6], [(5, InvalidArgument("x is wrong.", field="inputs.x"))])
    assert [one["custom_id"] for one in good] == ["a", "c", "e"]
    assert [one["custom_id"] for one in bad] == ["b", "d"]
    body = good[0]["response"]["body"]
    assert body["prediction"] == ["malignant", "benign", "malignant"]
    assert body["outputs"] == {"label": [0, 1, 0], "probabilities": [[0, 1], [0.125, 0.875], [0.25, 0.75]]}
    assert body["confidence"] == [1, 0.875, 0.75]
    assert good[1]["response"]["body"]["prediction"] == "benign"
    assert good[0]["error"] is None
    assert good[0]["response"]["status_code"] == 200
    assert bad[0]["response"] == {
        "status_code": 400,
        "request_id": bad[0]["response"]["request_id"],
        "body": {"error": {"message": "no", "type": "t", "param": None, "code": None}},
    }
    refused = bad[1]["response"]
    assert refused["status_code"] == 400
    assert refused["body"]["error"]["param"] == "inputs.x"
    assert len({one["id"] for one in good + bad}) == 5


@pytest.mark.parametrize(("ended", "code"), [("expired", "batch_expired"), ("cancelled", "batch_cancelled")])
def test_what_was_done_survives_and_the_rest_says_why_not(ended: str, code: str) -> None:
    kept = [LinePlan("a", 1), LinePlan("b", 2), LinePlan("c", 1)]
    good, bad = answers(kept, [0, 1], ended=ended)
    assert [one["custom_id"] for one in good] == ["a"]
    assert [(one["custom_id"], one["response"], one["error"]["code"]) for one in bad] == [
        ("b", None, code),
        ("c", None, code),
    ]


def test_a_line_is_never_left_out_silently() -> None:
    _good, bad = answers([LinePlan("a", 1), LinePlan("b", 1)], [0], [])
    assert bad[0]["response"]["status_code"] == 500
    _good, bad = answers([LinePlan("a", 1)], [], [(0, Internal("failed"))])
    assert bad[0]["response"]["body"]["error"]["type"] == "server_error"


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(1, 7), st.sets(st.integers(0, 59)))
def test_any_cut_gives_each_line_its_own_rows(sizes: list[int], cut: int, missing: set[int]) -> None:
    total = sum(sizes)
    present = [row for row in range(total) if row not in missing]
    reader, first = RowReader(results(present, cut)), 0
    for size in sizes:
        wanted = range(first, first + size)
        taken = reader.take(first, first + size)
        first += size
        if missing.isdisjoint(wanted):
            assert taken is not None
            assert taken["label"].tolist() == [row % 2 for row in wanted]
            assert taken["probabilities"].shape == (size, 2)
        else:
            assert taken is None


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([1.5, 2.5], pa.float32()), [1.5, 2.5]),
        (pa.array([[[1, 2]], [[3, 4]]], pa.list_(pa.list_(pa.int64(), 2), 1)), [[[1, 2]], [[3, 4]]]),
        (pa.array([[1, 2], [3]], pa.list_(pa.int64())), [[1, 2], [3]]),
        (pa.array([[1, 2], [3, 4]], pa.list_(pa.int64())), [[1, 2], [3, 4]]),
        (pa.array(["a", "b"]), ["a", "b"]),
        (pa.array([b"a", b"\xff"]), ["a", "\ufffd"]),
        (pa.array([["a", "b"]], pa.list_(pa.string(), 2)), [["a", "b"]]),
        (pa.array([True, False]), [True, False]),
    ],
)
def test_every_kind_of_column_is_read(column: pa.Array, expected: list[Any]) -> None:
    assert array_of_column(column).tolist() == expected
    assert array_of_column(column.slice(1)).tolist() == expected[1:]
