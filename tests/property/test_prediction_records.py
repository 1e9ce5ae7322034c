"""No record of the prediction log, however broken, can stop the ones behind it."""

from pathlib import Path

import pytest
from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import DataType, Tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from services.analytics import arm_queries, queries, schemas
from services.analytics.columns import CORE, layout, parse, to_table
from services.analytics.queries import Snapshot
from services.analytics.reading import Found
from services.analytics.segments import encode
from services.common.errors import InvalidArgument
from tests.fixtures.prediction_log import prediction_batch

GOOD = prediction_batch([1, 2, 3], rows=[1, 2, 1], labels=[0, 1, 1, 0]).SerializeToString()

tensors = st.builds(
    Tensor,
    name=st.sampled_from(["x", "X", "label", "", "a:b"]),
    datatype=st.sampled_from(DataType.values()),
    shape=st.lists(st.integers(-1, 4), max_size=3),
    data=st.binary(max_size=24),
)
columns = st.lists(st.sampled_from([0, 0, 0, 1, 2, 3, 255]), min_size=2, max_size=2)
batches = st.builds(
    PredictionBatch,
    batch_id=st.just(bytes(16)),
    model=st.sampled_from(["m"] * 9 + ["../m", "m\0", "M"]),
    version=st.sampled_from(["1", "2", ""] * 3 + ["..", "a/b"]),
    writer=st.sampled_from([0, 1, 2, 255]),
    answered_at_us=st.sampled_from([0, 1_750_000_000_000_000, 253_402_300_799_000_000] * 3 + [(1 << 64) - 1]),
    request_ids=st.sampled_from([bytes(32), bytes(range(32))]),
    codes=columns,
    origins=columns,
    attempts=columns,
    rows=st.lists(st.integers(0, 3), min_size=2, max_size=2) | st.just([]),
    propensities=st.lists(st.floats(width=32), min_size=2, max_size=2),
    variants=st.lists(st.integers(0, 1), min_size=2, max_size=2),
    variant_names=st.lists(st.text(max_size=3), min_size=1, max_size=2),
    inputs=st.lists(tensors, max_size=2),
    outputs=st.lists(tensors, max_size=2),
)
mutations = st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4)


def keep_and_ask(value: bytes, folder: Path) -> None:
    """What the service does with a record, from its parsing to a question about it."""
    try:
        batch = parse(value)
    except InvalidArgument:
        return
    table = to_table([batch])
    assert table.num_rows == len(batch.request_ids) // 16
    segment, data = encode(table, batch.version, layout(batch), [batch.batch_id])
    assert ".." not in segment.object.split("/")
    file = folder / "one.parquet"
    file.write_bytes(data)
    with queries.open_snapshot(Snapshot(files=[str(file)], inbox=table.select(CORE.names))) as connection:
        rows = queries.summary(connection)
        arm_queries.arms(connection, "error_rate", "1", "2")
    assert sum(row["requests"] for row in rows) <= 2 * table.num_rows
    found = queries.rows_of_request([str(file)], [table], batch.request_ids[:16])
    schemas.prediction_json(Found(found, []))


@settings(max_examples=150, deadline=None)
@given(batches)
def test_a_record_is_refused_or_kept_and_can_be_asked_about(
    tmp_path_factory: pytest.TempPathFactory, batch: PredictionBatch
) -> None:
    keep_and_ask(batch.SerializeToString(), tmp_path_factory.mktemp("record"))


@settings(max_examples=100, deadline=None)
@given(mutations)
def test_flipped_bytes_are_refused_or_kept(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    broken = bytearray(GOOD)
    for place, value in changes:
        broken[place] = value
    keep_and_ask(bytes(broken), tmp_path_factory.mktemp("record"))
