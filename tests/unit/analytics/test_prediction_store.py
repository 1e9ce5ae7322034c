"""Records as columns, one row per request, comparisons: without servers."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import Code, DataType, Tensor

from services.analytics import arm_queries, joining, queries, segments
from services.analytics.columns import CORE, drop_payload, layout, parse, to_table
from services.analytics.comparison import compare_quantiles
from services.analytics.flushing import Sizes
from services.analytics.joining import encode_joined
from services.analytics.queries import CLASSES, OUTCOMES, Snapshot
from services.analytics.repository import Small
from services.analytics.schemas import unmapped_warnings
from services.analytics.segments import encode, object_name
from services.analytics.tables import SegmentRow
from services.common.errors import InvalidArgument
from services.common.tensors import encode_bytes
from tests.fixtures.counted import Counted
from tests.fixtures.prediction_log import START_US, prediction_batch, request_id


def core(*batches: PredictionBatch) -> pa.Table:
    return to_table(batches).select(CORE.names)


def said(*rows: tuple[int, float | None, str | None, int, int], metric: str = "label") -> pa.Table:
    """Outcomes (request, number, text, row, time), each with an event id of its own."""
    columns = {
        "event_id": [bytes([place]) for place, _ in enumerate(rows)],
        "request_id": [request_id(row[0]) for row in rows],
        "metric": [metric] * len(rows),
        "number": [row[1] for row in rows],
        "text": [row[2] for row in rows],
        "row": [row[3] for row in rows],
        "observed_at_us": [row[4] for row in rows],
    }
    return pa.table(columns, schema=OUTCOMES)


def test_a_record_becomes_one_row_a_request_with_its_own_tensor_rows() -> None:
    batch = prediction_batch([1, 2, 3], rows=[1, 2, 1], labels=[5, 6, 7, 8], latency_us=[10, 20, 30])
    table = to_table([parse(batch.SerializeToString())])
    assert table["request_id"].to_pylist() == [request_id(n) for n in (1, 2, 3)]
    assert table["latency_us"].to_pylist() == [10, 20, 30]
    assert table["predicted"].to_pylist() == [[5.0], [6.0, 7.0], [8.0]]
    assert table["input:x"].to_pylist() == [[0.0, 1.0], [2.0, 3.0, 4.0, 5.0], [6.0, 7.0]]
    assert table.schema.field("input:x").metadata == {b"datatype": b"11", b"row_shape": b"2"}


def test_failed_requests_have_no_payload_and_do_not_shift_the_others() -> None:
    codes = [Code.CODE_OK, Code.CODE_INTERNAL, Code.CODE_OK]
    table = to_table([prediction_batch([1, 2, 3], codes=codes, labels=[4, 9])])
    assert table["predicted"].to_pylist() == [[4.0], None, [9.0]]
    assert table["input:x"].to_pylist() == [[0.0, 1.0], None, [2.0, 3.0]]


def test_records_with_and_without_payload_share_a_table() -> None:
    table = to_table([prediction_batch([1, 2], payload=False), prediction_batch([3], labels=[1])])
    assert table["predicted"].to_pylist() == [None, None, [1.0]]
    assert table["input:x"].to_pylist() == [None, None, [0.0, 1.0]]
    assert table["position"].to_pylist() == [0, 1, 0]


def test_scores_become_the_best_class_and_texts_stay_texts() -> None:
    scores = prediction_batch([1, 2], payload=False)
    data = np.array([[0.1, 0.9], [0.8, 0.2]], "<f4").tobytes()
    scores.outputs.append(Tensor(name="p", datatype=DataType.DATA_TYPE_FP32, shape=[2, 2], data=data))
    assert to_table([scores])["predicted"].to_pylist() == [[1.0], [0.0]]
    words = prediction_batch([1, 2], payload=False)
    data = encode_bytes([b"cat", b"dog"])
    words.outputs.append(Tensor(name="w", datatype=DataType.DATA_TYPE_BYTES, shape=[2], data=data))
    assert to_table([words])["predicted_text"].to_pylist() == [["cat"], ["dog"]]
    assert to_table([words], "other")["predicted_text"].to_pylist() == [None, None]


def test_requests_name_the_experiment_that_assigned_them_or_none() -> None:
    """In one record, in records that name others in another order, and in none."""
    batches = [
        prediction_batch([1, 2, 3], experiment_ids=["exp_a", "exp_b"], experiments=[2, 0, 1]),
        prediction_batch([4]),
        prediction_batch([5, 6], experiment_ids=["exp_b"], experiments=[1, 1]),
    ]
    expected = ["exp_b", None, "exp_a", None, "exp_b", "exp_b"]
    values = [batch.SerializeToString() for batch in batches]
    for known in (None, values):
        table = to_table([parse(value) for value in values], "", known)
        assert table["experiment"].to_pylist() == expected
        assert to_table(batches[1:2], "", known and known[1:2])["experiment"].to_pylist() == [None]
    assert queries_experiments(core(*batches)) == {"exp_a": 1, "exp_b": 3, None: 2}


def queries_experiments(inbox: pa.Table, *files: str) -> dict[str | None, int]:
    with queries.open_snapshot(Snapshot(files=files, inbox=inbox)) as connection:
        rows = connection.execute("SELECT experiment, count(*) FROM online GROUP BY experiment").fetchall()
        assert connection.execute("SELECT count(*) FROM online WHERE experiment = 'exp_b'").fetchall() == [
            (dict(rows).get("exp_b", 0),)
        ]
        found = queries.summary(connection)
    assert sum(row["requests"] for row in found) == sum(dict(rows).values())
    return dict(rows)


def test_segments_from_before_there_were_experiments_are_read_and_joined(tmp_path: Path) -> None:
    """Alone, beside newer ones, and after joining with them."""
    old = to_table([prediction_batch([1, 2])]).drop_columns(["experiment"])
    new = to_table([prediction_batch([3], experiment_ids=["exp_b"], experiments=[1])])
    files = []
    for name, table in (("old", old), ("new", new)):
        segment, data = encode(table, "1", "", [name.encode()])
        file = tmp_path / f"{name}.parquet"
        file.write_bytes(data)
        files.append((segment, str(file)))
    waiting = core(prediction_batch([4]))
    assert queries_experiments(waiting, files[0][1]) == {None: 3}
    assert queries_experiments(waiting, files[0][1], files[1][1]) == {None: 3, "exp_b": 1}
    rows = [
        SegmentRow(object=one.object, version="1", layout="", first_id=one.first_id, last_id=one.last_id)
        for one, _ in files
    ]
    _, joined = encode_joined(rows, [file for _, file in files])
    (tmp_path / "joined.parquet").write_bytes(joined)
    assert queries_experiments(waiting, str(tmp_path / "joined.parquet")) == {None: 3, "exp_b": 1}


def test_what_an_experiment_assigned_is_no_part_of_the_comparison_of_versions() -> None:
    batches = [
        prediction_batch([1, 2]),
        prediction_batch([3, 4], version="2"),
        prediction_batch([5, 6, 7], version="2", experiment_ids=["exp_b"], experiments=[1, 1, 1]),
    ]
    with queries.open_snapshot(Snapshot(inbox=core(*batches))) as connection:
        found = arm_queries.arms(connection, "error_rate", "1", "2")
    assert (len(found.a.units), len(found.b.units), found.b.counts.sum()) == (2, 2, 2)
    assert found.experiments == [("exp_b", 3)]


def test_half_precision_is_widened() -> None:
    batch = prediction_batch([1], payload=False)
    data = (np.array([1.5, -2.0], "<f4").view("<u4") >> 16).astype("<u2").tobytes()
    batch.outputs.append(Tensor(name="h", datatype=DataType.DATA_TYPE_BF16, shape=[1, 2], data=data))
    data = np.array([0.5, 2.0], "<f2").tobytes()
    batch.inputs.append(Tensor(name="h", datatype=DataType.DATA_TYPE_FP16, shape=[1, 2], data=data))
    table = to_table([batch])
    assert table["output:h"].to_pylist() == [[1.5, -2.0]]
    assert table["input:h"].to_pylist() == [[0.5, 2.0]]


def test_a_tensor_that_does_not_fit_is_left_out_and_its_requests_stay() -> None:
    batch = prediction_batch([1, 2])
    batch.outputs[0].data = batch.outputs[0].data[:-3]
    table = to_table([batch])
    assert table.num_rows == 2
    assert "output:label" not in table.column_names
    assert table["predicted"].to_pylist() == [None, None]


@pytest.mark.parametrize(
    "broken",
    [
        b"\xff\xff\xff",
        b"",
        PredictionBatch(batch_id=bytes(16), model="m", request_ids=b"short").SerializeToString(),
        PredictionBatch(batch_id=b"x", model="m", request_ids=bytes(16)).SerializeToString(),
        PredictionBatch(batch_id=bytes(16), model="m", request_ids=bytes(32), rows=[1]).SerializeToString(),
        PredictionBatch(
            batch_id=bytes(16), model="m", request_ids=bytes(16), variants=[3]
        ).SerializeToString(),
        PredictionBatch(
            batch_id=bytes(16), model="m", request_ids=bytes(16), experiments=[2], experiment_ids=["a"]
        ).SerializeToString(),
        PredictionBatch(
            batch_id=bytes(16), model="m", request_ids=bytes(32), experiments=[1], experiment_ids=["a"]
        ).SerializeToString(),
    ],
)
def test_records_that_do_not_fit_together_are_refused(broken: bytes) -> None:
    with pytest.raises(InvalidArgument):
        parse(broken)


def retried() -> list[PredictionBatch]:
    """Request 1 answered by worker-1, lost on its way; failed at worker-2; answered by version 2. Request 2
    computed, but the router had given up. Request 3 plain."""
    return [
        prediction_batch([1, 2, 3], source="worker-1"),
        prediction_batch([1], source="worker-2", attempts=1, codes=Code.CODE_INTERNAL),
        prediction_batch([1], source="worker-3", attempts=2, version="2", latency_us=9_000),
        prediction_batch(
            [2], source="router", writer=PredictionBatch.WRITER_ROUTER, codes=Code.CODE_DEADLINE_EXCEEDED
        ),
    ]


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_a_retried_request_counts_once_as_what_its_caller_got(order: tuple[int, ...], tmp_path: Path) -> None:
    batches = [retried()[place] for place in order]
    segment, data = encode(core(*batches[:2]), "1", "", [batch.batch_id for batch in batches[:2]])
    file = tmp_path / "part.parquet"
    file.write_bytes(data)
    with queries.open_snapshot(Snapshot(files=[str(file)], inbox=core(*batches[2:]))) as connection:
        found = {row["version"]: row for row in queries.summary(connection)}
    assert segment.rows == core(*batches[:2]).num_rows
    assert {version: row["requests"] for version, row in found.items()} == {"1": 2, "2": 1}
    assert found["1"]["codes"] == {Code.CODE_DEADLINE_EXCEEDED: 1}
    assert found["2"]["errors"] == 0
    assert found["2"]["latency_mean"] == 9.0


class Found:
    """What a connection found: each row twice, as it stands and with a code."""

    def __init__(self, count: int) -> None:
        self._rows = [(Counted(f"v{number}"), "a", None) for number in range(count)]
        self.description = [("version",), ("variant",), ("experiment",)]

    def execute(self, sql: str, _values: object = None) -> Any:
        rows = [(*row, code, 1) for row in self._rows for code in (4, 14)] if ", code" in sql else self._rows
        return SimpleNamespace(description=self.description, fetchall=lambda: rows)


def test_the_codes_of_thousands_of_versions_are_told_apart_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counted, "compared", 0)
    rows = queries.summary(Found(100))  # type: ignore[arg-type]  # stands for a connection
    assert Counted.compared < 1000
    assert [(row["version"], row["codes"]) for row in rows] == [(f"v{n}", {4: 1, 14: 1}) for n in range(100)]


def test_shadow_and_batch_requests_are_counted_apart() -> None:
    shadow = prediction_batch([1, 2], origins=2, version="2")
    with queries.open_snapshot(Snapshot(inbox=core(prediction_batch([1, 2, 3]), shadow))) as connection:
        assert [(row["version"], row["requests"]) for row in queries.summary(connection)] == [("1", 3)]
        assert queries.other_origins(connection) == {"shadow": 2}


def test_requests_without_an_id_are_requests_of_their_own() -> None:
    nameless = prediction_batch([1, 2], ids=[bytes(16), bytes(16)])
    with queries.open_snapshot(Snapshot(inbox=core(nameless))) as connection:
        assert queries.summary(connection)[0]["requests"] == 2


def test_the_latest_outcome_counts_and_each_joins_once() -> None:
    outcomes = said((1, 1.0, None, 0, 10), (1, 0.0, None, 0, 20), (1, 1.0, None, 0, 15), (9, 1.0, None, 0, 1))
    with queries.open_snapshot(Snapshot(inbox=core(*retried()), outcomes=outcomes)) as connection:
        assert queries.outcome_means(connection) == [
            {
                "version": "2",
                "variant": "2",
                "experiment": None,
                "metric": "label",
                "n": 1,
                "mean": 0.0,
                "sd": None,
            }
        ]
        assert [(row["n"], row["correct"]) for row in queries.accuracies(connection)] == [(1, 0.0)]


def test_accuracy_is_per_row_and_leaves_out_rows_that_were_not_answered() -> None:
    batch = prediction_batch([1, 2], rows=[2, 1], labels=[1, 0, 1])
    outcomes = said(
        (1, 1.0, None, 0, 1), (1, 1.0, None, 1, 2), (1, 1.0, None, 2, 3), (2, None, "unknown", 0, 4)
    )
    with queries.open_snapshot(Snapshot(inbox=core(batch), outcomes=outcomes)) as connection:
        assert [(row["n"], row["correct"]) for row in queries.accuracies(connection)] == [(2, 1.0)]
        assert queries.accuracies(connection)[0]["unmapped"] == 1


def classes(**versions: list[str]) -> pa.Table:
    rows = [
        {"version": version.removeprefix("v"), "name": name, "number": float(number)}
        for version, names in versions.items()
        for number, name in enumerate(names)
    ]
    return pa.Table.from_pylist(rows, CLASSES)


def test_class_names_mean_the_number_that_each_version_uses() -> None:
    """The same classes in another order: both versions are right about every label."""
    batches = [
        prediction_batch([1, 2], labels=[0, 1]),
        prediction_batch([3, 4], labels=[1, 0], version="2"),
        prediction_batch([5], version="3"),
    ]
    given = [(n, None, "benign" if n % 2 else "malignant", 0, 1) for n in range(1, 6)]
    named = classes(v1=["benign", "malignant"], v2=["malignant", "benign"])
    with queries.open_snapshot(
        Snapshot(inbox=core(*batches), outcomes=said(*given), classes=named)
    ) as connection:
        found = {row["version"]: row for row in queries.accuracies(connection)}
    assert [(row["n"], row["correct"]) for row in found.values()] == [(2, 2.0), (2, 2.0), (0, None)]
    assert [row["unmapped"] for row in found.values()] == [0, 0, 1]
    (warning,) = unmapped_warnings(list(found.values()))
    assert "version 3" in warning


@pytest.mark.parametrize(
    ("label", "correct"),
    [
        ((None, "dog"), 1.0),
        ((None, "cat"), 0.0),
        ((None, "Dog"), None),
        ((1.0, None), 1.0),
        ((0.0, None), 0.0),
    ],
)
def test_answers_that_are_texts_are_held_against_names_and_numbers(
    label: tuple[float | None, str | None], correct: float | None
) -> None:
    words = prediction_batch([1], payload=False)
    words.outputs.append(
        Tensor(name="w", datatype=DataType.DATA_TYPE_BYTES, shape=[1], data=encode_bytes([b"dog"]))
    )
    snapshot = Snapshot(
        inbox=core(words), outcomes=said((1, *label, 0, 1)), classes=classes(v1=["cat", "dog"])
    )
    with queries.open_snapshot(snapshot) as connection:
        assert queries.accuracies(connection)[0]["correct"] == correct


def test_statistics_are_the_same_without_the_tensors_that_they_do_not_need() -> None:
    batch = prediction_batch([1, 2], codes=[Code.CODE_OK, Code.CODE_INTERNAL], labels=[1])
    batch.outputs.append(Tensor(name="p", datatype=DataType.DATA_TYPE_FP32, shape=[1, 2], data=bytes(8)))
    for answer in ("label", "", None):
        slim = drop_payload(PredictionBatch.FromString(batch.SerializeToString()), answer)
        assert [tensor.name for tensor in slim.outputs] == ([] if answer is None else ["label"])
        assert not slim.inputs
        assert to_table([slim], answer).select(CORE.names) == to_table([batch], answer).select(CORE.names)


def test_no_answer_is_taken_from_a_version_whose_outputs_are_not_known() -> None:
    table = to_table([prediction_batch([1, 2])], None)
    assert table["predicted"].to_pylist() == [None, None]
    assert "output:label" in table.column_names


def test_time_bounds_are_half_open() -> None:
    batches = [prediction_batch([n], answered_at_us=START_US + n) for n in range(5)]
    snapshot = Snapshot(inbox=core(*batches), since_us=START_US + 1, until_us=START_US + 3)
    with queries.open_snapshot(snapshot) as connection:
        assert queries.summary(connection)[0]["requests"] == 2
        assert [row["request_id"] for row in queries.recent(connection, 1)] == [request_id(2)]


def test_units_that_met_both_versions_count_for_the_first() -> None:
    batches = [
        prediction_batch([1, 2], unit_hashes=[7, 8], answered_at_us=START_US),
        prediction_batch(
            [3, 4], unit_hashes=[7, 9], version="2", answered_at_us=START_US + 5, codes=Code.CODE_INTERNAL
        ),
        prediction_batch([5], unit_hashes=[8], answered_at_us=START_US + 9),
    ]
    with queries.open_snapshot(Snapshot(inbox=core(*batches))) as connection:
        found = arm_queries.arms(connection, "error_rate", "1", "2")
    assert found.crossed == 1
    assert (found.a.units.tolist(), found.a.counts.tolist()) == ([7, 8], [1.0, 2.0])
    assert (found.b.units.tolist(), found.b.totals.tolist()) == ([9], [1.0])
    assert found.a.binary
    assert found.b.binary


def test_requests_that_named_their_version_are_in_no_arm() -> None:
    """Users 1 to 4 are split 50/50; 3 also pins version 1; 9 asks for version 2 by name, again and again."""
    batches = [
        prediction_batch([1, 2], unit_hashes=[1, 2]),
        prediction_batch([3, 4], unit_hashes=[3, 4], version="2"),
        prediction_batch([5], unit_hashes=[3], propensities=1.0, answered_at_us=START_US - 5),
        prediction_batch([6, 7, 8], unit_hashes=9, version="2", propensities=1.0, codes=Code.CODE_INTERNAL),
    ]
    revenue = said((2, 5.0, None, 0, 1), (6, 9.0, None, 0, 1), metric="revenue")
    with queries.open_snapshot(Snapshot(inbox=core(*batches), outcomes=revenue)) as connection:
        found = arm_queries.arms(connection, "revenue", "1", "2")
    assert (found.a.units.tolist(), found.b.units.tolist()) == ([1, 2], [3, 4])
    assert (found.a.totals.tolist(), found.a.counts.tolist()) == ([0.0, 5.0], [0.0, 1.0])
    assert found.b.counts.tolist() == [0.0, 0.0]
    assert (found.randomised, found.left_out, found.crossed) == (True, 4, 0)
    with queries.open_snapshot(Snapshot(inbox=core(*batches[:1], *batches[3:]))) as connection:
        found = arm_queries.arms(connection, "error_rate", "1", "2")
    assert (found.randomised, found.left_out) == (False, 0)
    assert found.b.units.tolist() == [9]


@pytest.mark.parametrize("code", [Code.CODE_CANCELLED, Code.CODE_INTERNAL])
def test_a_hedge_that_loses_does_not_hide_the_answer(code: Code, tmp_path: Path) -> None:
    won = prediction_batch([1], source="worker-1", labels=[7])
    hedge = prediction_batch([1], source="worker-2", attempts=1, codes=code)
    with queries.open_snapshot(Snapshot(inbox=core(won, hedge))) as connection:
        (row,) = queries.summary(connection)
    assert (row["requests"], row["errors"], row["cancelled"], row["codes"]) == (1, 0, 0, {})
    _, data = encode(to_table([hedge]), "1", layout(hedge), [hedge.batch_id])
    file = tmp_path / "part.parquet"
    file.write_bytes(data)
    rows = queries.rows_of_request([str(file)], [to_table([won])], request_id(1))
    assert [(row["code"], row["attempt"]) for row in rows] == [(Code.CODE_OK, 0), (code, 1)]


def test_a_request_is_found_with_its_payload_in_objects_and_inbox(tmp_path: Path) -> None:
    first, second = prediction_batch([1, 2]), prediction_batch([2], attempts=1, labels=[7])
    _, data = encode(to_table([first]), "1", layout(first), [first.batch_id])
    file = tmp_path / "part.parquet"
    file.write_bytes(data)
    rows = queries.rows_of_request([str(file)], [to_table([second])], request_id(2))
    assert [row["attempt"] for row in rows] == [1, 0]
    assert rows[0]["output:label"] == ([7], DataType.DATA_TYPE_INT64, [])
    assert rows[1]["input:x"] == ([2.0, 3.0], DataType.DATA_TYPE_FP32, [2])
    assert queries.rows_of_request([str(file)], [], request_id(3)) == []


def test_objects_have_bounds_and_are_named_by_their_members(tmp_path: Path) -> None:
    batches = [prediction_batch([5, 1]), prediction_batch([3])]
    segment, data = encode(core(*batches), "1", "", [batch.batch_id for batch in batches])
    again, _ = encode(core(*reversed(batches)), "1", "", [batch.batch_id for batch in reversed(batches)])
    assert (segment.first_id, segment.last_id) == (request_id(1), request_id(5))
    assert segment.object.rpartition("-")[0] == again.object.rpartition("-")[0]
    assert segment.object.startswith("predictions/cancer/1/2025-06-15/")
    assert object_name("m", "1", START_US, [b"a"]) != object_name("m", "1", START_US, [b"b"])
    file = tmp_path / "part.parquet"
    file.write_bytes(data)
    assert sorted(pq.read_table(file)["request_id"].to_pylist()) == [request_id(n) for n in (1, 3, 5)]


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 3, 1, 2], [0, 1, 3, 2], [3, 1 << 70, 1, 2]])
@pytest.mark.parametrize("groups", [1, 2])
def test_objects_of_several_groups_are_sorted(
    order: list[int], groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a part of a table, whose buffers begin before it, and ids that differ in one half only. Within
    one group rows stay as they came: only its bounds are looked at."""
    monkeypatch.setattr(segments, "ROWS_A_GROUP", len(order) // groups)
    given = b"".join(number.to_bytes(16, "big") for number in order)
    batch = prediction_batch(range(len(order)))
    batch.request_ids = given
    for table in (to_table([batch]), to_table([batch]).slice(1)):
        segment, data = encode(table, "1", layout(batch), [batch.batch_id])
        ids = pq.read_table(pa.BufferReader(data), columns=["request_id"])["request_id"].to_pylist()
        came = table["request_id"].to_pylist()
        assert ids == (came if groups == 1 else sorted(came))
        assert (segment.first_id, segment.last_id) == (min(came), max(came))


def test_latency_quantiles_come_with_intervals_that_know_who_sent_the_requests() -> None:
    """Of 400 users each has a latency of its own: 20 requests of one are hardly more than one."""
    rng = np.random.default_rng(11)
    batches = []
    for arm, slower in (("1", 1.0), ("2", 1.3)):
        for user in range(400):
            own = 1_000 * slower * rng.lognormal(0, 0.5)
            latencies = (own * rng.lognormal(0, 0.05, 20)).astype(int)
            numbers = (
                range(user * 20, user * 20 + 20)
                if arm == "1"
                else range(8_000 + user * 20, 8_020 + user * 20)
            )
            batches.append(
                prediction_batch(
                    list(numbers),
                    version=arm,
                    latency_us=latencies.tolist(),
                    unit_hashes=user + 1_000 * int(arm),
                )
            )
    with queries.open_snapshot(Snapshot(inbox=core(*batches))) as connection:
        arm_queries.arms(connection, "latency_ms", "1", "2")
        a, b = (arm_queries.arm_quantiles(connection, arm, (0.5, 0.95)) for arm in ("a", "b"))
        assert arm_queries.arm_quantiles(connection, "nobody", (0.5,)) == []
    median, _ = compare_quantiles(a, b)
    assert median.a.low < 1.0 < median.a.high
    assert median.b.low < 1.3 < median.b.high
    # As if the 8,000 requests were independent, the interval would be about 0.028 wide.
    assert 0.08 < median.a.high - median.a.low < 0.2
    low, high = median.difference.ci
    assert 0 < low < 0.3 < high
    assert median.difference.p_value < 0.01
    assert compare_quantiles(a, []) == []


def test_objects_are_joined_within_their_tier_until_they_last() -> None:
    sizes = Sizes(segment_rows=1_600, join_bytes=16_000)
    lower, upper = sizes.tiers()
    assert (lower.below, lower.least) == (Small(100, 1_000), None)
    assert (upper.below, upper.least) == (Small(800, 8_000), Small(100, 1_000))
    assert [sizes.lasts(799, 7_999), sizes.lasts(800, 0), sizes.lasts(0, 8_000)] == [False, True, True]


@pytest.mark.parametrize(("lasting", "packed"), [(True, "ZSTD"), (False, "LZ4")])
def test_what_will_be_joined_is_packed_in_less_time(lasting: bool, packed: str) -> None:
    table = to_table([prediction_batch([1, 2])])
    _, data = encode(table, "1", "", [b"one"], lasting=lasting)
    group = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0)
    assert {group.column(place).compression for place in range(group.num_columns)} == {packed}
    assert pq.read_table(pa.BufferReader(data)).sort_by("request_id") == table.sort_by("request_id")


def test_objects_of_many_groups_are_joined_a_group_at_a_time(tmp_path: Path) -> None:
    """Row for row, in the order of their first ids, columns that one lacks null."""
    tables = [to_table([prediction_batch(range(start, start + 4), payload=start > 0)]) for start in (0, 4, 8)]
    rows, files = [], []
    for name, table in zip("abc", tables, strict=True):
        segment, data = encode(table, "1", "", [name.encode()], lasting=False)
        (tmp_path / name).write_bytes(data)
        files.append(str(tmp_path / name))
        first, last = segment.first_id, segment.last_id
        rows.append(SegmentRow(object=name, version="1", layout="", first_id=first, last_id=last))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(joining, "ROWS_A_GROUP", 5)
        segment, data = encode_joined(rows[::-1], files[::-1])
    joined = pq.ParquetFile(pa.BufferReader(data))
    assert [joined.metadata.row_group(n).num_rows for n in range(joined.num_row_groups)] == [8, 4]
    whole = pa.concat_tables([table.sort_by("request_id") for table in tables], promote_options="default")
    assert joined.read().to_pylist() == whole.select(joined.schema_arrow.names).to_pylist()
    assert (segment.rows, segment.first_id, segment.last_id) == (12, request_id(0), request_id(11))
    times = whole["answered_at_us"].to_pylist()
    assert (segment.first_at_us, segment.last_at_us) == (min(times), max(times))
