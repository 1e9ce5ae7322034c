"""Totals of shadow comparisons merge, and the report says what the data say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import pytest
from headrace.v1.events_pb2 import OutputComparison, ShadowComparison, ShadowVerdict
from headrace.v1.tensor_pb2 import Code

from services.analytics import shadow_units
from services.analytics.shadow_report import report
from services.analytics.shadow_totals import MOST_SLICES, Histogram, ShadowTotals
from services.analytics.shadow_units import MOST_UNITS, UnitSample
from services.analytics.statistics import bets

EQUAL, DIFFERENT = ShadowVerdict.SHADOW_VERDICT_EQUAL, ShadowVerdict.SHADOW_VERDICT_DIFFERENT
FAILED = ShadowVerdict.SHADOW_VERDICT_FAILED
OK, INTERNAL = Code.CODE_OK, Code.CODE_INTERNAL


def comparison(
    rng: np.random.Generator, n: int, *, match: float = 0.9, slower_us: int = 300
) -> ShadowComparison:
    """One record: a share of the requests agrees, the shadow is slower, 2% of its answers are errors."""
    failed = rng.random(n) < 0.02
    equal = rng.random(n) < match
    gaps = np.where(equal, 0.0, rng.exponential(0.1, n))
    latency = rng.integers(500, 1500, n)
    rows = np.where(failed, 0, 1)
    verdicts = np.where(failed, FAILED, np.where(equal, EQUAL, DIFFERENT))
    return ShadowComparison(
        batch_id=rng.bytes(16),
        model="cancer",
        version="1",
        shadow_version="2",
        compared_at_us=1_750_000_000_000_000,
        request_ids=rng.bytes(16 * n),
        codes=[OK] * n,
        shadow_codes=np.where(failed, INTERNAL, OK).tolist(),
        latency_us=latency.tolist(),
        shadow_latency_us=(latency + slower_us + rng.integers(-50, 50, n)).tolist(),
        verdicts=verdicts.tolist(),
        rows=rows.tolist(),
        rows_equal=(equal & ~failed).astype(int).tolist(),
        outputs=[
            OutputComparison(
                name="p",
                kind=OutputComparison.KIND_NUMBER,
                rows_equal=(equal & ~failed).astype(int).tolist(),
                largest_difference=np.where(failed, 0, gaps).tolist(),
                mean_difference=np.where(failed, 0, gaps / 2).tolist(),
                rows_same_top=rows.tolist(),
            )
        ],
    )


def total(records: Sequence[ShadowComparison]) -> ShadowTotals:
    whole = ShadowTotals()
    for record in records:
        whole.merge(ShadowTotals.of(record))
    return whole


def test_totals_are_the_same_in_any_order_and_after_storage() -> None:
    rng = np.random.default_rng(1)
    records = [comparison(rng, n) for n in (1, 40, 7, 300)]
    stored = ShadowTotals()
    for record in reversed(records):
        stored.merge(ShadowTotals.from_json(json.loads(json.dumps(ShadowTotals.of(record).to_json()))))
    one, other = total(records).to_json(), stored.to_json()
    for side in (one, other):
        side["outputs"]["p"]["sum_of_means"] = round(side["outputs"]["p"]["sum_of_means"], 9)
    assert one == other


def test_differences_beyond_all_numbers_can_be_stored() -> None:
    """PostgreSQL's JSON has no infinity: a record that came to one would come again for ever."""
    record = comparison(np.random.default_rng(2), 10)
    record.outputs[0].mean_difference[:] = record.outputs[0].largest_difference[:] = [1.7e308] * 10
    whole = total([record, record])
    json.dumps(whole.to_json(), allow_nan=False)
    assert whole.outputs["p"].sum_of_means == np.finfo(np.float64).max


def test_the_report_covers_what_is_true() -> None:
    rng = np.random.default_rng(2)
    said = report("cancer", "1", "2", total([comparison(rng, 100) for _ in range(50)]), 0.05)
    low, high = said["match"]["interval"]
    assert low < 0.9 < high
    assert said["verdicts"]["failed"] == round(said["errors"]["shadow_version"]["rate"] * 5000)
    low, high = said["errors"]["interval"]
    assert 0 < low < 0.02 < high
    low, high = said["latency_ms"]["interval"]
    assert low < 0.2995 < high
    assert said["latency_ms"]["shadow_version"]["p50"] == pytest.approx(1.3, rel=0.03)
    output = said["outputs"]["p"]
    assert output["largest_difference"]["p50"] == 0
    # One in ten differs, by an exponential amount: the 95th percentile of all is the median of those.
    assert output["largest_difference"]["p95"] == pytest.approx(0.1 * np.log(2), rel=0.2)
    assert output["same_top"]["rate"] == 1
    assert "90" in said["summary"]


def test_records_in_which_no_best_class_is_the_same_count_as_well() -> None:
    def one(same: int, same_five: int, elements: int) -> ShadowComparison:
        output = OutputComparison(
            name="p",
            kind=OutputComparison.KIND_NUMBER,
            rows_equal=[0],
            largest_difference=[0.5],
            mean_difference=[0.5],
            rows_same_top=[same],
            row_elements=[elements],
            rows_same_top_five=[same_five],
        )
        return ShadowComparison(
            batch_id=bytes(16), request_ids=bytes(16), codes=[OK], shadow_codes=[OK], latency_us=[1],
            shadow_latency_us=[1], verdicts=[DIFFERENT], rows=[1], rows_equal=[0], outputs=[output],
        )  # fmt: skip

    totals = total([one(1, 0, 10), one(0, 0, 10), one(0, 1, 10), one(0, 0, 3), one(0, 0, 1)])
    output = report("m", "1", "2", totals, 0.05)["outputs"]["p"]
    assert output["same_top"]["rate"] == 1 / 4
    assert output["same_top_five"]["rate"] == pytest.approx(1 / 3)


def test_no_disagreement_is_not_certainty() -> None:
    record = comparison(np.random.default_rng(3), 50, match=1.0)
    del record.shadow_codes[:]
    del record.verdicts[:]
    record.verdicts.extend([EQUAL] * 50)
    said = report("cancer", "1", "2", ShadowTotals.of(record), 0.05)
    low, high = said["errors"]["interval"]
    assert low < 0 < high
    assert said["match"]["interval"][0] < 1
    assert any("rough" in warning for warning in said["warnings"])


def test_a_shadow_that_only_failed_has_no_latency_and_no_match() -> None:
    record = ShadowComparison(
        request_ids=bytes(32), codes=[OK] * 2, shadow_codes=[INTERNAL] * 2, verdicts=[FAILED] * 2
    )
    said = report("cancer", "1", "2", ShadowTotals.of(record), 0.05)
    assert said["match"] == {"n": 0, "rate": None, "interval": None}
    assert said["latency_ms"]["interval"] is None
    assert said["errors"]["difference"] == 1.0
    assert "no answer" in said["summary"]


def sliced(rng: np.random.Generator, n: int, names: Sequence[str]) -> ShadowComparison:
    record = comparison(rng, n)
    record.slice_by = "country"
    record.slice_names.extend(names)
    record.slices.extend(rng.integers(0, len(names), n).tolist())
    return record


def test_slices_add_up_to_the_whole_in_any_order_and_after_storage() -> None:
    rng = np.random.default_rng(7)
    whole = ShadowTotals()
    for names in (["DE", "FR"], ["FR", "", "D\0E"], ["DE"]):
        record = sliced(rng, 200, names)
        whole.merge(ShadowTotals.from_json(json.loads(json.dumps(ShadowTotals.of(record).to_json()))))
    assert set(whole.slices) == {"country=DE", "country=FR", "country=", "country=D\ufffdE"}
    for name in ("requests", "equal", "rows_equal", "only_shadow_errors", "latency_gaps"):
        assert sum(getattr(part, name) for part in whole.slices.values()) == getattr(whole, name)
    assert (
        sum(part.outputs["p"].rows_equal for part in whole.slices.values()) == whole.outputs["p"].rows_equal
    )
    said = report("cancer", "1", "2", whole, 0.05)
    assert said["slices"]["country=DE"]["match"]["n"] + said["slices"]["country=FR"]["match"]["n"] > 100
    assert said["slices"]["country=DE"]["requests"] == whole.slices["country=DE"].requests


def test_slices_are_bounded() -> None:
    rng = np.random.default_rng(8)
    whole = ShadowTotals()
    for first in range(0, 100, 10):
        whole.merge(ShadowTotals.of(sliced(rng, 50, [f"c{first + number}" for number in range(10)])))
    assert len(whole.slices) == MOST_SLICES + 1
    assert sum(part.requests for part in whole.slices.values()) == 500


def test_slices_that_name_nothing_are_refused() -> None:
    record = sliced(np.random.default_rng(9), 5, ["DE"])
    record.slices[2] = 1
    with pytest.raises(ValueError, match="slices"):
        ShadowTotals.of(record)


@pytest.mark.parametrize("column", ["codes", "verdicts", "latency_us", "rows"])
def test_columns_of_another_length_are_refused(column: str) -> None:
    record = comparison(np.random.default_rng(4), 5)
    del getattr(record, column)[2:]
    with pytest.raises(ValueError, match=f"{column} has 2 entries for 5 requests"):
        ShadowTotals.of(record)


def test_quantiles_of_a_histogram_are_within_one_percent() -> None:
    rng = np.random.default_rng(5)
    values = np.concatenate((np.zeros(100), rng.lognormal(3, 2, 4900)))
    histogram = Histogram()
    for part in np.array_split(values, 7):
        other = Histogram()
        other.add(part)
        histogram.merge(other)
    assert histogram.count == 5000
    for share in (0.01, 0.5, 0.9, 0.99, 1.0):
        exact = np.quantile(values, share, method="inverted_cdf")
        assert histogram.quantile(share) == pytest.approx(exact, rel=0.0101)
    assert Histogram().quantile(0.5) is None


def test_ids_do_not_matter_to_totals() -> None:
    record = comparison(np.random.default_rng(6), 3)
    before = ShadowTotals.of(record).to_json()
    record.batch_id = hashlib.blake2b(b"other", digest_size=16).digest()
    assert ShadowTotals.of(record).to_json() == before


def sample_of(rng: np.random.Generator, users: np.ndarray, at_us: int) -> UnitSample:
    flags = rng.integers(0, 2, users.size)
    return UnitSample.of(users.tolist(), rng.bytes(16 * users.size), at_us, flags)


def test_samples_of_units_are_the_same_in_any_order_and_bounded() -> None:
    """Every unit that is kept has all its requests, and its first one by time."""
    rng = np.random.default_rng(5)
    population = rng.integers(1, 1 << 64, 3 * MOST_UNITS, dtype=np.uint64)
    parts = [sample_of(rng, rng.choice(population, 700), at) for at in range(60)]
    seen: dict[int, tuple[int, int]] = {}
    for at, part in enumerate(parts):
        for one in part.units:
            first, requests = seen.get(int(one["unit"]), (at, 0))
            seen[int(one["unit"])] = (first, requests + int(one["requests"]))
    forth, back = UnitSample(), UnitSample()
    for part in parts:
        forth.merge(part)
    for part in reversed(parts):
        back.merge(UnitSample.from_json(json.loads(json.dumps(part.to_json()))))
    assert forth.to_json() == back.to_json()
    assert MOST_UNITS / 4 < len(forth.units) <= MOST_UNITS
    bound = 1 << (64 - forth.level)
    assert {int(unit) for unit in forth.units["unit"]} == {unit for unit in seen if unit < bound}
    for one in forth.units:
        assert (int(one["at_us"]), int(one["requests"])) == seen[int(one["unit"])]


def test_the_parts_of_evidence_that_levels_have_add_up() -> None:
    weights = [UnitSample(level).weight for level in range(64)]
    assert 0.98 < sum(weights) <= 1


def test_an_equal_shadow_is_condemned_no_more_often_than_promised_while_the_sample_thins_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the bound, looked at after every 50 of 2,000 users, of whom each comes three times alike."""
    monkeypatch.setattr(shadow_units, "MOST_UNITS", 200)
    rng = np.random.default_rng(11)
    found = 0
    for _ in range(60):
        sample, condemned = UnitSample(), False
        for at in range(40):
            users = np.repeat(rng.integers(1, 1 << 64, 50, dtype=np.uint64), 3)
            flags = np.repeat((rng.random(50) < 0.05).astype(np.int64), 3)
            sample.merge(UnitSample.of(users.tolist(), rng.bytes(16 * users.size), at, flags))
            log_e = bets.share(sample.firsts(1), len(sample.units), 0.05, "above")
            condemned |= log_e + np.log(sample.weight) >= np.log(1 / 0.1)
        found += condemned
    assert sample.level > 0
    assert found <= 12  # 6 expected at most: 12 or more come by chance once in a hundred


def test_users_whose_requests_go_together_widen_the_interval() -> None:
    rng = np.random.default_rng(7)
    users = np.repeat(np.arange(1, 101), 20)
    alike = np.repeat(rng.random(100) < 0.3, 20)
    alone = rng.random(2000) < 0.3
    shown = {}
    for name, different in (("alike", alike), ("alone", alone)):
        record = ShadowComparison(
            request_ids=rng.bytes(16 * 2000),
            unit_hashes=users.tolist(),
            compared_at_us=1,
            verdicts=np.where(different, DIFFERENT, EQUAL).tolist(),
        )
        shown[name] = report("m", "1", "2", ShadowTotals.of(record), 0.05)
    assert shown["alike"]["units"]["design_effect"] == pytest.approx(20, rel=0.05)
    assert shown["alone"]["units"]["design_effect"] == pytest.approx(1, abs=0.4)
    spread = {name: np.diff(one["match"]["interval"])[0] for name, one in shown.items()}
    assert spread["alike"] > 3.5 * spread["alone"]
    before = ShadowTotals.from_json({**ShadowTotals(requests=9, equal=8).to_json(), "units": None})
    assert any("does not say whose" in one for one in report("m", "1", "2", before, 0.05)["assumptions"])
