"""Outputs side by side."""

from __future__ import annotations

import numpy as np
import pytest
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest
from headrace.v1.events_pb2 import OutputComparison, ShadowVerdict
from headrace.v1.tensor_pb2 import Code, DataType, SharedMemory, Tensor

from services.common.tensors import encode_bytes
from services.router.comparison import MAX_BYTES, Comparison, compare
from services.router.routing_table import Route
from services.router.shadow import Copy, Mirror, comparison_record
from tests.fixtures.router import config

OK = Code.CODE_OK
EQUAL = ShadowVerdict.SHADOW_VERDICT_EQUAL
DIFFERENT = ShadowVerdict.SHADOW_VERDICT_DIFFERENT
FAILED = ShadowVerdict.SHADOW_VERDICT_FAILED
INCOMPARABLE = ShadowVerdict.SHADOW_VERDICT_INCOMPARABLE


def floats(values: object, name: str = "p") -> Tensor:
    array = np.asarray(values, dtype="<f4")
    return Tensor(name=name, datatype=DataType.DATA_TYPE_FP32, shape=array.shape, data=array.tobytes())


def labels(values: list[int], name: str = "label") -> Tensor:
    data = np.asarray(values, dtype="<i8").tobytes()
    return Tensor(name=name, datatype=DataType.DATA_TYPE_INT64, shape=[len(values)], data=data)


def texts(*values: bytes, name: str = "text") -> Tensor:
    return Tensor(
        name=name, datatype=DataType.DATA_TYPE_BYTES, shape=[len(values)], data=encode_bytes(values)
    )


def between(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 0.01) -> Comparison:
    return compare(OK, ours, OK, theirs, tolerance)


def test_numbers_within_the_tolerance_are_the_same() -> None:
    made = between([floats([[0.1, 0.9], [0.6, 0.4]])], [floats([[0.105, 0.895], [0.4, 0.6]])])
    assert (made.verdict, made.rows, made.rows_equal) == (DIFFERENT, 2, 1)
    output = made.outputs["p"]
    assert output.kind == OutputComparison.KIND_NUMBER
    assert output.same_top == 1
    assert output.largest == pytest.approx(0.2)
    assert output.mean == pytest.approx((0.005 * 2 + 0.2 * 2) / 4, rel=1e-4)


def test_the_tolerance_grows_with_the_number() -> None:
    assert between([floats([1000.0])], [floats([1009.0])]).verdict == EQUAL
    assert between([floats([1000.0])], [floats([1011.0])]).verdict == DIFFERENT
    assert between([floats([0.001])], [floats([0.009])]).verdict == EQUAL


def test_nan_is_nan_and_nothing_else() -> None:
    made = between([floats([np.nan, np.inf, np.nan])], [floats([np.nan, np.inf, 1.0])])
    assert made.outputs["p"].same.tolist() == [True, True, False]
    assert (made.outputs["p"].largest, made.outputs["p"].mean) == (0.0, 0.0)


def test_the_first_five_of_a_ranking_are_compared_as_a_set() -> None:
    ours = [[9, 8, 7, 6, 5, 1, 0], [9, 8, 7, 6, 5, 1, 0], [5, 5, 5, 5, 5, 5, 5], [np.nan, 1, 2, 3, 4, 5, 6]]
    theirs = [[5, 6, 7, 8, 9, 1, 0], [9, 8, 7, 6, 1, 5, 0], [5, 5, 5, 5, 5, 5, 5], [np.nan, 1, 2, 3, 4, 5, 6]]
    output = between([floats(ours)], [floats(theirs)]).outputs["p"]
    assert (output.width, output.same_top, output.same_top_five) == (7, 3, 3)
    few = floats([[1, 2, 3, 4, 5]])
    assert between([few], [few]).outputs["p"].same_top_five == 0


def test_the_first_five_are_found_among_many() -> None:
    rng = np.random.default_rng(7)
    ours = rng.permuted(np.tile(np.arange(2000.0), (100, 1)), axis=1)
    theirs = ours + rng.normal(0, 1.2, ours.shape)
    same = [set(np.argsort(a)[-5:]) == set(np.argsort(b)[-5:]) for a, b in zip(ours, theirs, strict=True)]
    assert 20 < sum(same) < 80
    assert between([floats(ours)], [floats(theirs)]).outputs["p"].same_top_five == sum(same)


def test_what_is_just_within_the_tolerance_is_the_same_and_one_number_has_no_ranking() -> None:
    output = between([floats([1.0, 2.0])], [floats([1.5, 3.0])], tolerance=0.5).outputs["p"]
    assert (output.same.tolist(), output.width, output.same_top) == ([True, True], 1, 0)


def test_nonsense_from_a_shadow_is_incomparable() -> None:
    broken = floats([[0.1, 0.9]])
    broken.data = broken.data[:-1]
    assert between([floats([[0.1, 0.9]])], [broken]).verdict == INCOMPARABLE


def test_labels_and_texts_are_equal_or_not() -> None:
    made = between([labels([1, 2, 3]), texts(b"a", b"b", b"")], [texts(b"a", b"x", b""), labels([1, 2, 4])])
    assert (made.verdict, made.rows_equal) == (DIFFERENT, 1)
    assert made.outputs["label"].same.tolist() == [True, True, False]
    assert made.outputs["text"].kind == OutputComparison.KIND_TEXT
    assert between([texts(b"a")], [texts(b"a")]).verdict == EQUAL


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ([floats([1.0])], [floats([1.0], "q")]),
        ([floats([1.0])], [floats([1.0]), labels([1])]),
        ([floats([1.0])], [floats([1.0, 2.0])]),
        ([labels([1], "p")], [floats([1.0])]),
        ([Tensor(name="p", datatype=DataType.DATA_TYPE_FP32, shape=[2], data=b"123")] * 2,) * 2,
        ([floats([1.0]), labels([1, 2])],) * 2,
        ([], []),
        ([floats(np.zeros(MAX_BYTES // 4 + 1))],) * 2,
    ],
)
def test_what_cannot_be_compared(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert between(ours, theirs).verdict == INCOMPARABLE


def test_no_rows_are_no_difference() -> None:
    assert between([floats(np.zeros((0, 3)))], [floats(np.zeros((0, 3)))]).verdict == EQUAL


def test_a_scalar_is_one_row() -> None:
    made = between([floats(1.0)], [floats(1.0)])
    assert (made.verdict, made.rows) == (EQUAL, 1)


def test_failures() -> None:
    internal, late = Code.CODE_INTERNAL, Code.CODE_DEADLINE_EXCEEDED
    assert compare(OK, [floats([1.0])], internal, [], 0.1).verdict == FAILED
    assert compare(internal, [], OK, [floats([1.0])], 0.1).verdict == FAILED
    assert compare(internal, [], late, [], 0.1).verdict == FAILED
    assert compare(internal, [], internal, [], 0.1).verdict == EQUAL


def test_a_record_has_one_entry_per_request_in_every_column() -> None:
    made = config()
    made.shadow.version, made.shadow.share, made.shadow.tolerance = "2", 10_000, 0.5
    route = Route(made, 30)
    assert route.shadow is not None
    target = route.named("1")

    def copy(n: int, ours: list[Tensor], theirs: PredictReply) -> Copy:
        request = PredictRequest(request_id=n.to_bytes(16, "big"), unit_hash=n, revision=1)
        assert route.shadow is not None
        answered = PredictReply(outputs=ours)
        return Copy(request, route, target, route.shadow, answered, 0.002, 0.0, theirs, 0.003)

    record = comparison_record(
        [
            copy(1, [labels([1, 2])], PredictReply(outputs=[labels([1, 2])])),
            copy(2, [labels([1])], PredictReply(code=Code.CODE_INTERNAL)),
            copy(3, [floats([[1.0, 2.0]])], PredictReply(outputs=[floats([[1.25, 2.0]])])),
        ],
        "router-0",
        7,
    )
    assert (record.model, record.version, record.shadow_version) == ("cancer", "1", "2")
    assert (record.artifact_digest, record.shadow_artifact_digest) == ("sha256:1", "sha256:2")
    assert record.request_ids == b"".join(n.to_bytes(16, "big") for n in (1, 2, 3))
    assert list(record.verdicts) == [EQUAL, FAILED, EQUAL]
    assert list(record.shadow_codes) == [OK, Code.CODE_INTERNAL, OK]
    assert (list(record.rows), list(record.rows_equal)) == ([2, 0, 1], [2, 0, 1])
    assert (list(record.latency_us), list(record.shadow_latency_us)) == ([2000] * 3, [3000] * 3)
    by_name = {output.name: output for output in record.outputs}
    assert list(by_name["label"].rows_equal) == [2, 0, 0]
    assert list(by_name["p"].largest_difference) == [0, 0, 0.25]
    assert list(by_name["p"].rows_same_top) == [0, 0, 1]


def test_comparisons_are_told_apart_by_an_attribute_and_few_of_its_values() -> None:
    made = config()
    made.shadow.version, made.shadow.share, made.shadow.slice_by = "2", 10_000, "country"
    route = Route(made, 30)
    shadow = route.shadow
    assert shadow is not None
    reply = PredictReply(outputs=[labels([1])])

    def record(values: list[str]) -> list[str]:
        copies = [
            Copy(PredictRequest(), route, route.named("1"), shadow, reply, 0.0, reply=reply, slice=value)
            for value in values
        ]
        made = comparison_record(copies, "router-0", 7)
        assert made.slice_by == "country"
        assert len(set(made.slice_names)) == len(made.slice_names)
        return [made.slice_names[place] for place in made.slices]

    assert record(["DE", "", "FR", "DE"]) == ["DE", "", "FR", "DE"]
    many = [str(n) for n in range(30)]
    assert record([*many, "3"]) == [*many[:20], *["other"] * 10, "3"]


def test_the_share_goes_by_the_request_id() -> None:
    made = config()
    made.shadow.version, made.shadow.share = "2", 2500
    shadow = Route(made, 30).shadow
    assert shadow is not None
    chosen = [Mirror.chosen(shadow, PredictRequest(request_id=n.to_bytes(16, "big"))) for n in range(20_000)]
    assert sum(chosen) == 5000
    place = SharedMemory(key="region", byte_size=4)
    elsewhere = PredictRequest(request_id=bytes(16), inputs=[Tensor(name="x", shared_memory=place)])
    assert not Mirror.chosen(shadow, elsewhere)
