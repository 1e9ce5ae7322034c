"""Rows of every format become tensors; what is wrong is named."""

from __future__ import annotations

import io
from collections.abc import Sequence
from zlib import crc32

import numpy as np
import pyarrow as pa
import pytest
from headrace.v1.tensor_pb2 import DataType, Signature, TensorSpec
from PIL import Image

from services.common.errors import HeadraceError, InvalidArgument, NotFound
from services.worker.batch import images
from services.worker.batch.columns import rows_of_table
from services.worker.batch.csv_rows import rows_of_csv
from services.worker.batch.images import rows_of_images
from services.worker.batch.json_rows import lines_of, rows_of_lines
from services.worker.batch.rows import Inputs, Rows

FP32, INT8, BYTES = DataType.DATA_TYPE_FP32, DataType.DATA_TYPE_INT8, DataType.DATA_TYPE_BYTES
BOOL, UINT8, INT64 = DataType.DATA_TYPE_BOOL, DataType.DATA_TYPE_UINT8, DataType.DATA_TYPE_INT64


def inputs(
    *specs: tuple[str, DataType, list[int]], columns: Sequence[str] = (), batched: bool = True
) -> Inputs:
    return Inputs.of(
        Signature(
            inputs=[
                TensorSpec(name=name, datatype=datatype, shape=shape, columns=columns)
                for name, datatype, shape in specs
            ],
            batched=batched,
        )
    )


TABULAR = inputs(("x", FP32, [-1, 3]), columns=["a", "b", "c"])
MIXED = inputs(("n", INT8, [-1]), ("text", BYTES, [-1, 1]), ("on", BOOL, [-1]))


def only(rows: Rows) -> dict[str, np.ndarray]:
    (group,) = rows.groups
    return {name: np.asarray(array) for name, array in group.arrays.items()}


def reasons(rows: Rows) -> dict[int, tuple[str | None, str]]:
    return {place: (error.field, error.message) for place, error in rows.failures.items()}


@pytest.mark.parametrize(
    "lines",
    [
        [b'{"a": 1, "b": 2.5, "c": 3}', b'{"c": 6, "b": 5, "a": 4}'],
        [b"[1, 2.5, 3]", b"[4, 5, 6]"],
        [b'{"x": [1, 2.5, 3]}', b'{"x": [4, 5, 6]}'],
        [b'{"a": 1, "b": 2.5, "c": 3}', b'{"x": [4, 5, 6]}'],
    ],
)
def test_a_json_row_is_named_columns_a_bare_value_or_a_named_input(lines: list[bytes]) -> None:
    rows = rows_of_lines(lines, TABULAR, 0)

    assert rows.failures == {}
    assert only(rows)["x"].dtype == np.float32
    assert only(rows)["x"].tolist() == [[1, 2.5, 3], [4, 5, 6]]


def test_blank_lines_are_no_rows_and_ids_pass_through() -> None:
    text = b'{"custom_id": "p", "a": 1, "b": 2, "c": 3}\n \n{"custom_id": 7, "x": [1, 2, 3]}\n[1,2,3]'
    rows = rows_of_lines(lines_of(text), TABULAR, 0)

    assert (rows.count, rows.custom_ids) == (3, ["p", "7", None])


@pytest.mark.parametrize("blank", [b"\f", b"\v", b" \x0c\t"])
def test_what_is_blank_to_python_alone_is_a_row_as_the_gateway_counts_it(blank: bytes) -> None:
    text = b"\n".join((b"[1,2,3]", blank, b" \t\r", b"[4,5,6]"))
    rows = rows_of_lines(lines_of(text), TABULAR, 0)

    assert rows.count == 3
    assert only(rows)["x"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert [error.field for error in rows.failures.values()] == ["inputs[1]"]


@pytest.mark.parametrize(
    ("line", "field", "reason"),
    [
        (b"{", "inputs[8]", "is not JSON"),
        (b'{"a": 1, "b": 2}', "inputs[8].c", "is missing"),
        (b'{"a": 1, "b": 2, "c": 3, "d": 4}', "inputs[8].d", "no input of this model, which takes a, b, c"),
        (b'{"a": 1, "b": "2", "c": 3}', "inputs[8].b", "must be a number, not a string"),
        (b'{"a": 1, "b": null, "c": 3}', "inputs[8].b", "must be a number, not null"),
        (b'{"a": 1, "b": true, "c": 3}', "inputs[8].b", "must be a number, not a boolean"),
        (b'{"a": 1, "b": 1e39, "c": 3}', "inputs[8].b", "outside the range of FP32"),
        (b"[1, 2]", "inputs[8]", "has 2 elements where 3 are expected"),
        (b'{"x": [1, [2], 3]}', "inputs[8].x[1]", "must be a number, not a list"),
        (b'"text"', "inputs[8]", "must be a list, not a string"),
        (b"1],[2", "inputs[8]", "is not JSON"),
    ],
)
def test_a_json_row_that_is_wrong_fails_alone(line: bytes, field: str, reason: str) -> None:
    good = b"[1, 2, 3]"
    rows = rows_of_lines([good, line, good], TABULAR, 7)

    assert list(rows.failures) == [1]
    assert rows.failures[1].field == field
    assert reason in rows.failures[1].message
    assert rows.groups[0].places.tolist() == [0, 2]


def test_every_type_is_checked_by_its_own_rules() -> None:
    rows = rows_of_lines(
        [
            b'{"n": -128, "text": "\xc3\xa4", "on": true}',
            b'{"n": 128, "text": "a", "on": true}',
            b'{"n": 1.0, "text": "a", "on": true}',
            b'{"n": 1, "text": 1, "on": true}',
            b'{"n": 1, "text": ["a"], "on": 1}',
        ],
        MIXED,
        0,
    )

    assert only(rows)["n"].tolist() == [-128]
    assert only(rows)["text"].tolist() == [["ä".encode()]]
    assert [message for _, message in reasons(rows).values()] == [
        "inputs[1].n is outside -128 … 127 of INT8.",
        "inputs[2].n must be a whole number for INT8.",
        "inputs[3].text[0] must be a string, not an integer.",
        "inputs[4].on must be true or false, not an integer.",
    ]


def test_rows_of_different_lengths_make_groups() -> None:
    model = inputs(("ids", INT64, [-1, -1]))
    rows = rows_of_lines([b"[1, 2]", b"[3]", b"[4, 5]"], model, 0)

    assert [(group.places.tolist(), group.arrays["ids"].tolist()) for group in rows.groups] == [
        ([0, 2], [[1, 2], [4, 5]]),
        ([1], [[3]]),
    ]


def test_a_model_without_rows_takes_a_request_per_line() -> None:
    rows = rows_of_lines([b"[[1, 2]]", b"[[3, 4]]"], inputs(("x", FP32, [1, 2]), batched=False), 0)

    assert [group.arrays["x"].tolist() for group in rows.groups] == [[[[1, 2]]], [[[3, 4]]]]


class TestTables:
    def test_columns_become_one_matrix_in_the_models_order(self) -> None:
        table = pa.table({"c": [3, 6], "a": pa.array([1.0, 4.0], pa.float32()), "b": [2.5, 5.0]})

        assert only(rows_of_table(table, TABULAR, 0))["x"].tolist() == [[1, 2.5, 3], [4, 5, 6]]

    def test_a_column_of_lists_is_the_input_itself(self) -> None:
        for kind in (pa.list_(pa.float64()), pa.list_(pa.float64(), 3), pa.large_list(pa.float64())):
            table = pa.table({"x": pa.array([[1, 2, 3], [4, 5, 6]], kind)})
            assert only(rows_of_table(table, TABULAR, 0))["x"].tolist() == [[1, 2, 3], [4, 5, 6]]

    def test_a_list_of_another_length_fails_its_row(self) -> None:
        table = pa.table({"x": pa.array([[1.0, 2, 3], [4.0], None, [7.0, 8, None], [1.0, 1, 1]])})
        rows = rows_of_table(table, TABULAR, 10)

        assert only(rows)["x"].tolist() == [[1, 2, 3], [1, 1, 1]]
        assert rows.groups[0].places.tolist() == [0, 4]
        assert {place: field for place, (field, _) in reasons(rows).items()} == {
            1: "inputs[11].x", 2: "inputs[12].x", 3: "inputs[13].x",
        }  # fmt: skip

    def test_unnamed_columns_count_by_their_order(self) -> None:
        table = pa.table({"f0": [1.0], "f1": [2.0], "custom_id": ["p"]})
        rows = rows_of_table(table, inputs(("x", FP32, [-1, 2])), 0)

        assert only(rows)["x"].tolist() == [[1, 2]]
        assert rows.custom_ids == ["p"]

    @pytest.mark.parametrize(
        ("columns", "field", "reason"),
        [
            ({"a": [1.0], "b": [1.0]}, "inputs.c", "is missing"),
            ({"a": [1.0], "b": [1.0], "c": [1.0], "d": [1.0]}, "inputs.d", "no input of this model"),
            ({"a": [1.0], "b": ["1"], "c": [1.0]}, "inputs.b", "holds string, the model takes FP32"),
        ],
    )
    def test_a_wrong_column_is_named(self, columns: dict[str, list[object]], field: str, reason: str) -> None:
        with pytest.raises(InvalidArgument, match=reason) as caught:
            rows_of_table(pa.table(columns), TABULAR, 0)
        assert caught.value.field == field

    def test_a_null_or_a_number_too_large_fails_its_row(self) -> None:
        table = pa.table({"a": [1.0, None, 3.0], "b": [1.0, 1.0, 1e39], "c": [1.0, 1.0, 1.0]})
        rows = rows_of_table(table, TABULAR, 0)

        assert only(rows)["x"].tolist() == [[1, 1, 1]]
        assert reasons(rows) == {
            1: ("inputs[1].a", "inputs[1].a must be a number, not null."),
            2: ("inputs[2].b", "inputs[2].b is outside the range of FP32."),
        }

    def test_integers_are_narrowed_where_they_fit(self) -> None:
        model = inputs(("n", INT8, [-1]))
        for kind in (pa.int64(), pa.uint64(), pa.int16(), pa.uint8()):
            rows = rows_of_table(pa.table({"n": pa.array([5, 200], kind)}), model, 0)
            assert only(rows)["n"].tolist() == [5]
            assert reasons(rows)[1][1] == "inputs[1].n is outside -128 … 127 of INT8."

    def test_dictionaries_decimals_and_chunks_are_read(self) -> None:
        texts = pa.chunked_array(
            [pa.array(["a", "b"]).dictionary_encode(), pa.array(["a"]).dictionary_encode()]
        )
        model = inputs(("t", BYTES, [-1]), ("d", FP32, [-1]))
        table = pa.table({"t": texts, "d": pa.array([1, 2, 3]).cast(pa.decimal128(24, 2))})

        assert only(rows_of_table(table, model, 0))["t"].tolist() == [b"a", b"b", b"a"]
        assert only(rows_of_table(table, model, 0))["d"].tolist() == [1, 2, 3]

    def test_strings_that_are_no_text_come_as_they_are(self) -> None:
        """Parquet does not check them: the model's own row fails, if it minds."""
        strings = pa.array([b"\xff", b"a"]).view(pa.string())
        rows = rows_of_table(pa.table({"t": strings}), inputs(("t", BYTES, [-1])), 0)
        assert only(rows)["t"].tolist() == [b"\xff", b"a"]
        with pytest.raises(InvalidArgument) as caught:
            rows_of_table(pa.table({"t": ["a", "b"], "custom_id": strings}), inputs(("t", BYTES, [-1])), 0)
        assert caught.value.field == "inputs.custom_id"
        assert "not UTF-8" in caught.value.message

    def test_nan_is_a_number(self) -> None:
        rows = rows_of_table(pa.table({"a": [float("nan")], "b": [float("inf")], "c": [1.0]}), TABULAR, 0)
        assert np.isnan(only(rows)["x"][0, 0])
        assert rows.failures == {}


class TestCsv:
    def test_lines_become_columns(self) -> None:
        text = b'4,5.5,"p, ""q""\nr",6\n7,,s,9\n'
        rows = rows_of_csv(text, ["a", "b", "custom_id", "c"], TABULAR, 0)

        assert only(rows)["x"].tolist() == [[4, 5.5, 6]]
        assert rows.custom_ids == ['p, "q"\nr', "s"]
        assert reasons(rows) == {1: ("inputs[1].b", "inputs[1].b must be a number, not null.")}

    def test_a_line_that_is_wrong_fails_alone(self) -> None:
        rows = rows_of_csv(b"1,2,3\n1,two,3\n\n1,2\n4,5,6\n", ["a", "b", "c"], TABULAR, 5)

        assert only(rows)["x"].tolist() == [[1, 2, 3], [4, 5, 6]]
        assert reasons(rows) == {
            1: ("inputs[6].b", "inputs[6].b must be a number, not a string."),
            2: ("inputs[7]", "inputs[7] has 2 values where 3 columns are named."),
        }

    def test_beside_a_line_that_is_wrong_nan_is_a_number_still(self) -> None:
        rows = rows_of_csv(b"1,nan,3\n1,two,3\n4,inf,6\n7,1e300,9\n", ["a", "b", "c"], TABULAR, 0)

        assert [str(value) for value in only(rows)["x"][:, 1]] == ["nan", "inf"]
        assert list(rows.failures) == [1, 3]

    @pytest.mark.parametrize("cell", ["1_000", "2024_01_02", "1_0.5"])
    def test_what_only_python_takes_for_a_number_is_none(self, cell: str) -> None:
        rows = rows_of_csv(f"1,2,3\n1,{cell},3\n".encode(), ["a", "b", "c"], TABULAR, 0)

        assert only(rows)["x"].tolist() == [[1, 2, 3]]
        assert reasons(rows) == {1: ("inputs[1].b", "inputs[1].b must be a number, not a string.")}

    def test_a_line_that_is_no_text_fails_and_is_not_changed_into_one(self) -> None:
        rows = rows_of_csv(
            b"1,fine,true\n2,caf\xe9,true\n3,\xc3\xa9t\xc3\xa9,0\n", ["n", "text", "on"], MIXED, 7
        )

        assert [text.decode() for text in only(rows)["text"].flat] == ["fine", "été"]
        assert reasons(rows) == {1: ("inputs[8]", "inputs[8] is not UTF-8.")}

    @pytest.mark.parametrize("beside", ["2", "two"])
    def test_a_hexadecimal_number_is_one_whatever_stands_beside_it(self, beside: str) -> None:
        rows = rows_of_csv(f"0x1F,a,0\n 0X7f,b,0\n{beside},c,0\n".encode(), ["n", "text", "on"], MIXED, 0)

        assert only(rows)["n"].tolist()[:2] == [31, 127]
        assert list(rows.failures) == ([] if beside == "2" else [2])

    @pytest.mark.parametrize("beside", ["2", "two"])
    @pytest.mark.parametrize(
        ("datatype", "read"),
        [(INT64, 0xDEADBEEFCAFEBABE - 2**64), (DataType.DATA_TYPE_UINT64, 0xDEADBEEFCAFEBABE)],
    )
    def test_sixteen_hexadecimal_digits_are_all_bits(
        self, datatype: DataType, read: int, beside: str
    ) -> None:
        text = f"0xdeadbeefcafebabe\n{beside}\n"
        rows = rows_of_csv(text.encode(), ["n"], inputs(("n", datatype, [-1])), 0)

        assert only(rows)["n"].tolist()[0] == read
        assert list(rows.failures) == ([] if beside == "2" else [1])

    @pytest.mark.parametrize("beside", ["2", "two"])
    def test_a_text_is_itself_whatever_stands_beside_it(self, beside: str) -> None:
        text = f'1,"[1]",0\n{beside},x,0\n3,"[""a""]",0\n4,[],1\n'
        rows = rows_of_csv(text.encode(), ["n", "text", "on"], MIXED, 0)

        answered = only(rows)
        assert dict(zip(answered["n"], answered["text"].ravel(), strict=True)).items() >= {
            (1, b"[1]"),
            (3, b'["a"]'),
            (4, b"[]"),
        }
        assert list(rows.failures) == ([] if beside == "2" else [1])

    def test_lists_are_written_as_json(self) -> None:
        rows = rows_of_csv(b'"[1, 2, 3]"\n"[4, 5]"\n', ["x"], TABULAR, 0)

        assert only(rows)["x"].tolist() == [[1, 2, 3]]
        assert list(rows.failures) == [1]

    def test_lists_that_are_too_deep_fail_their_row(self) -> None:
        rows = rows_of_csv(b'"[1, 2, 3]"\n' + b"[" * 100_000 + b"\n", ["x"], TABULAR, 0)

        assert only(rows)["x"].tolist() == [[1, 2, 3]]
        assert [error.field for error in rows.failures.values()] == ["inputs[1].x"]

    def test_types_are_the_models(self) -> None:
        rows = rows_of_csv(b"1,a,true\n2,b,0\n300,c,1\n", ["n", "text", "on"], MIXED, 0)

        assert only(rows)["n"].tolist() == [1, 2]
        assert only(rows)["on"].tolist() == [True, False]
        assert list(rows.failures) == [2]

    def test_a_wrong_header_fails_the_job(self) -> None:
        with pytest.raises(InvalidArgument) as caught:
            rows_of_csv(b"1,2,3\n", ["a", "b", "z"], TABULAR, 0)
        assert caught.value.field == "inputs.z"


def picture(kind: str, size: tuple[int, int] = (3, 2), mode: str = "RGB") -> bytes:
    sink = io.BytesIO()
    Image.new(mode, size, (255, 0, 51) if mode == "RGB" else 255).save(sink, kind)
    return sink.getvalue()


class TestImages:
    def test_pixels_come_as_the_model_takes_them(self) -> None:
        png = picture("PNG")
        for shape, datatype, found, first in (
            ([-1, 2, 3, 3], UINT8, (2, 3, 3), [255, 0, 51]),
            ([-1, 3, -1, -1], UINT8, (3, 2, 3), [255, 255, 255]),
            ([-1, -1, -1, 3], FP32, (2, 3, 3), [1.0, 0.0, np.float32(0.2)]),
            ([-1, 2, 3], UINT8, (2, 3), [82, 82, 82]),
        ):
            rows = rows_of_images(["i.png"], [png], inputs(("image", datatype, shape)), 0)
            (row,) = only(rows)["image"]
            assert row.shape == found
            assert row.reshape(-1)[:3].tolist() == first

    def test_a_model_of_bytes_gets_the_file(self) -> None:
        rows = rows_of_images(["a", "b"], [b"1", b"2"], inputs(("image", BYTES, [-1, 1])), 0)
        assert only(rows)["image"].tolist() == [[b"1"], [b"2"]]
        assert rows.custom_ids == ["a", "b"]

    def test_a_file_that_is_no_image_of_the_right_size_fails_alone(self) -> None:
        files: list[bytes | HeadraceError] = [
            picture("JPEG"),
            b"no image",
            NotFound("There is no such input."),
            picture("PNG", (9, 9)),
        ]
        rows = rows_of_images(["a", "b", "c", "d"], files, inputs(("image", UINT8, [-1, 2, 3, 3])), 4)

        assert rows.groups[0].places.tolist() == [0]
        assert reasons(rows) == {
            1: ("inputs[5]", "inputs[5] (b): it is no PNG or JPEG image."),
            2: ("inputs[6]", "inputs[6] (c): There is no such input."),
            3: (
                "inputs[7]",
                "inputs[7] (d): the image has shape [9, 9, 3] where [2, 3, 3] is expected.",
            ),
        }

    def test_a_file_that_the_decoder_stumbles_over_fails_alone(self) -> None:
        good = picture("PNG")
        end = good.rindex(b"\0\0\0\0IEND")
        profile = b"\0\0\0\0iCCP" + crc32(b"iCCP").to_bytes(4, "big")  # empty, and behind the pixels
        files = [good, good[:end] + profile + good[end:]]
        rows = rows_of_images(["a", "b"], files, inputs(("image", UINT8, [-1, 2, 3, 3])), 0)

        assert rows.groups[0].places.tolist() == [0]
        assert reasons(rows) == {1: ("inputs[1]", "inputs[1] (b): it is no PNG or JPEG image.")}

    def test_sizes_that_differ_make_groups(self) -> None:
        files = [picture("PNG"), picture("PNG", (1, 1)), picture("PNG")]
        rows = rows_of_images(["a", "b", "c"], files, inputs(("image", UINT8, [-1, -1, -1, 3])), 0)
        assert [group.places.tolist() for group in rows.groups] == [[0, 2], [1]]

    def test_images_that_do_not_fit_into_memory_fail(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(images, "MAX_BYTES", 100)
        files = [picture("PNG"), picture("PNG", (9, 9)), picture("PNG")]
        rows = rows_of_images(["a", "b", "c"], files, inputs(("image", FP32, [-1, -1, -1, 3])), 0)
        assert [group.places.tolist() for group in rows.groups] == [[0]]
        message = "the images of its chunk take more than 100 bytes."
        assert [rows.failures[place].message for place in (1, 2)] == [
            f"inputs[1] (b): {message}", f"inputs[2] (c): {message}",
        ]  # fmt: skip

    def test_a_model_that_takes_no_image_is_told_so(self) -> None:
        with pytest.raises(InvalidArgument, match="does not take images"):
            rows_of_images(["a"], [picture("PNG")], TABULAR, 0)
