"""The uniform choice of rows that windows are judged by: which, how many, and that verdicts stay right."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import Code, DataType, Signature, Tensor, TensorSpec
from scipy import stats

from services.common.bus.port import Malformed
from services.common.tensors import encode_bytes
from services.drift.alerting import findings, sentence
from services.drift.draw import NO_LIMIT, Draw, drawn
from services.drift.evaluation import Profile, Thresholds, evaluate
from services.drift.observations import Observations
from services.drift.reading import Numbered, Run
from services.drift.sample import Sample
from services.drift.stream import Cadence, Stream, Window
from tests.fixtures.drift_rows import Given, given

SIGNATURE = Signature(
    inputs=[TensorSpec(name="x", datatype=DataType.DATA_TYPE_FP32, shape=[-1, 2], columns=["a", "b"])],
    batched=True,
)


def record(number: int, values: np.ndarray, texts: list[bytes] | None = None) -> PredictionBatch:
    """A record with ids as near each other as those of one moment are."""
    x = np.stack([values, -values], axis=1).astype("<f4")
    inputs = [Tensor(name="x", datatype=DataType.DATA_TYPE_FP32, shape=x.shape, data=x.tobytes())]
    if texts is not None:
        shape = [len(texts)]
        data = encode_bytes(texts)
        inputs.append(Tensor(name="t", datatype=DataType.DATA_TYPE_BYTES, shape=shape, data=data))
    rows = [len(values)]
    return PredictionBatch(
        batch_id=number.to_bytes(16, "big"), codes=[Code.CODE_OK], rows=rows, inputs=inputs, answered_at_us=9
    )


def numbered(count: int) -> Observations:
    return Observations(
        count, {"n": np.arange(count, dtype=float)}, {"prediction": ["x", "y"] * (count // 2)}
    )


def held(draw: Draw) -> list[float]:
    return sorted(n for _, seen in draw.held_below(NO_LIMIT).values() for n in seen.numeric["n"].tolist())


def test_the_same_rows_are_held_however_they_are_delivered() -> None:
    whole = Given(numbered(5_000), 3, 1)
    lowest = np.sort(np.argsort(whole.priorities())[:300]).tolist()
    for edges in ([0, 5_000], [0, 1, 2, 299, 301, 2_000, 5_000], [0, 4_999, 5_000]):
        draw = Draw()
        for first, end in pairwise(edges):
            draw.add(whole, first, end - first, 300)
        assert held(draw) == lowest
        assert (draw.rows, draw.looked_at, draw.first_us, draw.last_us) == (5_000, 300, 3, 3)


def test_all_rows_are_held_while_they_are_few() -> None:
    draw = Draw()
    draw.add(Given(numbered(200), 1, 1), 0, 200, 200)
    assert (draw.looked_at, draw.limit) == (200, NO_LIMIT)
    assert held(draw) == list(range(200))


def test_panes_of_different_crowds_join_without_favour() -> None:
    """A quiet second and a busy one: each row is as likely to be looked at as any other."""
    quiet_of_all = []
    for seed in range(20):
        quiet, busy = Draw(), Draw()
        quiet.add(Given(Observations(1_000, {"n": np.zeros(1_000)}), 1, 2 * seed), 0, 1_000, 500)
        busy.add(Given(Observations(9_000, {"n": np.ones(9_000)}), 2, 2 * seed + 1), 0, 9_000, 500)
        together = drawn([quiet, busy])
        assert 500 <= together.rows <= 1_000
        quiet_rows = round(together.numeric["n"].cumulative([0.5])[0] * together.rows)
        quiet_of_all.append((quiet_rows, together.rows))
    found, looked_at = map(sum, zip(*quiet_of_all, strict=True))
    assert stats.binomtest(found, looked_at, 0.1).pvalue > 0.001


def test_a_draw_survives_storage() -> None:
    draw = Draw()
    draw.add(Given(numbered(2_000), 5, 1), 0, 2_000, 100)
    odd = {"n": np.array([np.nan, np.inf, 1e300]), "m": np.ones(3)}
    draw.add(Given(Observations(3, odd), 7, 2), 0, 3, 4_000)
    again = Draw.from_bytes(draw.to_bytes())
    assert (again.rows, again.first_us, again.last_us, again.limit) == (2_003, 5, 7, draw.limit)
    before, after = drawn([draw]), drawn([again])
    assert before.rows == after.rows == draw.looked_at
    assert before.categorical == after.categorical
    assert np.array_equal(
        before.numeric["n"].quantiles([0.1, 0.5, 0.9]), after.numeric["n"].quantiles([0.1, 0.5, 0.9])
    )


def test_a_pane_in_which_every_row_was_looked_at_is_read() -> None:
    sample = Sample()
    sample.add(numbered(300), 4)
    pane = Draw.from_bytes(sample.to_bytes())
    assert (pane.rows, pane.looked_at, pane.last_us) == (300, 300, 4)
    assert drawn([pane]).categorical == sample.categorical


def test_priorities_are_uniform_over_rows_and_records() -> None:
    rng = np.random.default_rng(3)
    items = [Numbered(i, record(i, np.zeros(rng.integers(1, 60)))) for i in range(600)]
    run = Run(items, SIGNATURE)
    shares = run.priorities() / 2.0**64
    assert stats.kstest(shares, "uniform").pvalue > 0.001
    # Neighbours, within a record and across records, know nothing of each other.
    assert abs(np.corrcoef(shares[:-1], shares[1:])[0, 1]) < 0.04


def test_a_row_has_the_same_priority_in_every_delivery() -> None:
    items = [Numbered(i, record(i, np.zeros(5))) for i in range(4)]
    together = Run(items, SIGNATURE).priorities()
    alone = [Run([item], SIGNATURE).priorities() for item in items]
    assert np.array_equal(together, np.concatenate(alone))


def test_rows_are_taken_from_where_they_stand() -> None:
    texts = [b"a", b"bb", b"ccc"]
    items = [Numbered(0, record(1, np.array([0.0, 1.0, 2.0]), texts))]
    items.append(Numbered(1, record(2, np.array([3.0, 4.0, 5.0]), texts)))
    failed = items[0].batch
    failed.codes.insert(0, Code.CODE_INTERNAL)
    failed.rows.insert(0, 7)
    run = Run(items, SIGNATURE)
    assert run.rows == 6
    seen = run.take(np.array([1, 3, 4, 5]))
    assert seen.numeric["a"].tolist() == [1.0, 3.0, 4.0, 5.0]
    assert seen.numeric["b"].tolist() == [-1.0, -3.0, -4.0, -5.0]
    assert seen.numeric["t.length"].tolist() == [2.0, 1.0, 2.0, 3.0]


def test_the_record_that_cannot_be_read_is_named() -> None:
    def items() -> list[Numbered]:
        return [Numbered(index, record(index, np.zeros(4))) for index in (3, 5, 8)]

    short = items()
    short[1].batch.inputs[0].data = short[1].batch.inputs[0].data[:-1]
    run = Run(short, SIGNATURE)
    assert run.take(np.array([0, 9])).rows == 2
    for places in (np.array([0, 6]), np.arange(12)):
        with pytest.raises(Malformed) as found:
            run.take(places)
        assert found.value.index == 5
    other = items()
    other[2].batch.rows[0] = 3
    with pytest.raises(Malformed) as found:
        Run(other, SIGNATURE)
    assert found.value.index == 8


def windows(cadence: Cadence, rows: int) -> list[Window]:
    rng = np.random.default_rng(5)
    stream = Stream()
    seen = [(Observations(rows, {"n": rng.normal(size=rows)}), second * 1_000_000) for second in range(1, 6)]
    return stream.feed(given(seen), cadence, Thresholds())


def test_a_window_says_how_many_rows_there_were_and_how_many_were_looked_at() -> None:
    found = windows(Cadence(500, 250, 2, 1.0, sample_rows=400), 10_000)
    assert len(found) >= 3
    assert all(window.rows > 10_000 for window in found[1:])
    assert all(400 <= window.sampled_rows <= 800 for window in found[1:])
    for report in found[-1].reports:
        assert report.psi.n_current == found[-1].sampled_rows
    every = windows(Cadence(500, 250, 2, 1.0, sample_rows=0), 10_000)
    assert [window.rows for window in every] == [window.rows for window in found]
    assert all(window.sampled_rows == window.rows for window in every)


def test_never_fewer_rows_are_looked_at_than_a_pane_is_to_have() -> None:
    assert Cadence(pane_rows=1_000, sample_rows=10).looked_at == 1_000
    found = windows(Cadence(500, 1_000, 1, 1.0, sample_rows=10), 5_000)
    assert all(window.sampled_rows == 1_000 for window in found)


def test_an_alert_says_of_how_many_rows_it_knows() -> None:
    rng = np.random.default_rng(6)
    reference = Sample()
    reference.add(Observations(500, {"n": rng.normal(size=500)}), 1)
    seen = [(Observations(5_000, {"n": rng.normal(1.0, size=5_000)}), 2)]
    stream, cadence = Stream(reference), Cadence(500, 5_000, 1, sample_rows=1)
    (whole,) = stream.feed(given(seen), cadence, Thresholds())
    (finding, *_) = findings(whole, Thresholds())
    assert "over 5000 rows against 500" in sentence(finding, "m", "1", whole)
    cadence = Cadence(500, 250, 1, 1e-6, sample_rows=300)
    later = [(seen[0][0], 3), (seen[0][0], 4)]
    window = Stream(reference).feed(given([*seen, *later]), cadence, Thresholds())[0]
    (finding, *_) = findings(window, Thresholds())
    words = sentence(finding, "m", "1", window)
    assert f"over {window.sampled_rows} rows drawn from {window.rows} against 500" in words


def judged(shift: float, sample_rows: int, *, times: int = 40) -> float:
    """Share of windows of 5,000 rows, in records whose rows resemble each other, with any finding. Of 5
    features the last is shifted by `shift` standard deviations."""
    rng = np.random.default_rng(7)
    loud = 0
    for number in range(times):
        reference = Sample()
        reference.add(_users(rng, 500, 1, 0.0), 1)
        draw = Draw()
        draw.add(Given(_users(rng, 5_000, 10, shift), 2, number), 0, 5_000, sample_rows)
        window = drawn([draw])
        assert window.rows == (sample_rows or 5_000)
        reports = evaluate(Profile.of(reference), window, Thresholds())
        loud += any(report.psi_severity or report.ks_severity for report in reports)
    return loud / times


def _users(rng: np.random.Generator, rows: int, alike: int, shift: float) -> Observations:
    """Rows in groups of `alike`: half of the spread is between groups."""
    columns = {}
    for place in range(5):
        groups = np.repeat(rng.normal(size=rows // alike), alike)
        values = (groups + rng.normal(size=rows)) / np.sqrt(2)
        columns[f"f{place}"] = values + shift * (place == 4)
    return Observations(rows, columns)


def test_sampling_costs_neither_quiet_nor_power() -> None:
    """Without drift neither way is loud, with drift that matters both are."""
    assert judged(0.0, 0) <= 0.05
    assert judged(0.0, 1_000) <= 0.05
    assert judged(0.5, 0) == judged(0.5, 1_000) == 1.0
