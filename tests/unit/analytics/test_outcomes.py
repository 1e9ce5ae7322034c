"""Outcomes on their way from the database into a question."""

import csv
import io

import pytest
from headrace.v1.events_pb2 import Outcome

from services.analytics.consumers import _outcomes
from services.analytics.reading import outcomes_table
from services.common.bus.port import Malformed, Record
from tests.fixtures.prediction_log import outcome, outcome_batch, request_id


def written(*rows: tuple[str, float | None, str | None]) -> bytes:
    """(metric, number, text) as PostgreSQL writes CSV: nothing for NULL, quotes for an empty string."""
    lines = []
    for place, (metric, number, text) in enumerate(rows):
        quoted = io.StringIO()
        csv.writer(quoted, quoting=csv.QUOTE_ALL, lineterminator="").writerow([text or ""])
        shown = "" if text is None else quoted.getvalue()
        value = "" if number is None else repr(number)
        lines.append(f"{place:032x},{request_id(place).hex()},{metric},{value},{shown},0,{1_000 + place}\n")
    return "".join(lines).encode()


def test_outcomes_come_as_they_were_written() -> None:
    table = outcomes_table(
        written(
            ("label", None, "malignant"),
            ("label", None, "1"),
            ("label", 0.0, None),
            ("label", None, 'a, "b"\nc'),
            ("comment", None, "malignant"),
            ("label", None, ""),
        ),
    )
    assert table["number"].to_pylist() == [None, None, 0.0, None, None, None]
    assert table["text"].to_pylist() == ["malignant", "1", None, 'a, "b"\nc', "malignant", ""]
    assert table["request_id"].to_pylist() == [request_id(place) for place in range(6)]
    assert table["event_id"][1].as_py() == bytes(15) + b"\x01"
    assert table["observed_at_us"].to_pylist() == list(range(1_000, 1_006))


def test_columns_without_any_value_keep_their_types() -> None:
    assert outcomes_table(b"").num_rows == 0
    assert outcomes_table(written(("revenue", 2.5, None)))["number"].to_pylist() == [2.5]


@pytest.mark.parametrize(
    "broken",
    [
        outcome(1, 1.0, model="m" * 5000),
        outcome(1, 1.0, model="Not a name"),
        outcome(1, 1.0, model="m\0"),
        outcome(1, 1.0, metric="x" * 129),
        outcome(1, 1.0, metric="x\0"),
        outcome(1, "a\0b"),
        outcome(1, "x" * 5000),
        outcome(1, float("inf")),
        Outcome(event_id=bytes(16), request_id=bytes(16), metric="m"),
    ],
)
def test_outcomes_that_cannot_be_kept_are_malformed(broken: Outcome) -> None:
    record = Record("t", None, outcome_batch(outcome(2, 1.0), broken).SerializeToString())
    with pytest.raises(Malformed):
        _outcomes(0, record)
    assert len(_outcomes(0, Record("t", None, outcome_batch(outcome(2, 1.0)).SerializeToString()))) == 1
