"""Columns by their packed bytes are those that protobuf says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from headrace.v1.events_pb2 import PredictionBatch

from services.analytics.columns import to_table
from services.analytics.packed import Packed
from tests.fixtures.prediction_log import prediction_batch

EDGES = [0, 1, 127, 128, 129, 16_383, 16_384, (1 << 32) - 1]


@pytest.mark.parametrize(
    ("field", "entries"),
    [
        ("unit_hashes", [0, 1, (1 << 64) - 1]),
        ("propensities", [0.0, 0.25, 1.0]),
        ("revisions", [*EDGES, 1 << 35, (1 << 64) - 1]),
        ("codes", [0, 1, 14]),
        ("cached", [True, False, True]),
        ("latency_us", EDGES),
        ("rows", [1, 1, 1]),
        ("answered_before_us", []),
    ],
)
def test_every_kind_of_column(field: str, entries: list[float]) -> None:
    parts: tuple[list[float], ...] = (entries, [], entries[:1], entries[::-1])
    others: dict[str, Any] = {
        "batch_id": bytes(16),
        "model": "m" * 200,
        "answered_at_us": 7,
        "writer": 2,
        "rows": [3],
    }
    others.pop(field, None)
    fields: list[dict[str, Any]] = [{**others, field: part} for part in parts]
    values = [PredictionBatch(**given).SerializeToString() for given in fields]
    expected = [*entries, *entries[:1], *entries[::-1]]
    found = Packed(values).numbers(field, len(expected))
    assert found is not None
    assert found.tolist() == expected
    assert Packed(values).numbers(field, len(expected) + 1) is None


def test_long_columns() -> None:
    rng = np.random.default_rng(1)
    numbers = (rng.integers(0, 1 << 32, 5_000) >> rng.integers(0, 32, 5_000)).tolist()
    found = Packed([PredictionBatch(queue_us=numbers).SerializeToString()]).numbers("queue_us", 5_000)
    assert found is not None
    assert found.tolist() == numbers


def test_fields_that_are_not_packed_are_not_mistaken() -> None:
    # Field 18 (latency_us) as a varint of its own, twice.
    value = b"\x90\x01\x05\x90\x01\x06"
    assert PredictionBatch.FromString(value).latency_us[:] == [5, 6]
    assert Packed([value]).numbers("latency_us", 2) is None


@pytest.mark.parametrize("large", [False, True])
def test_a_table_is_the_same_with_and_without_the_bytes_of_its_records(large: bool) -> None:
    """Records of much payload are walked one by one, small ones all together."""
    count = 2_000 if large else 3
    batches = [
        prediction_batch(range(first, first + count), latency_us=range(100, 100 + count))
        for first in range(1, 4 * count, count)
    ]
    batches[1].ClearField("attempts")
    values = [batch.SerializeToString() for batch in batches]
    assert (min(map(len, values)) > 64 << 10) == large
    assert to_table(batches, "", values).equals(to_table(batches, ""))
