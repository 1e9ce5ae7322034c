"""From observations to alerts: samples, streams, evaluation, persistence."""

from __future__ import annotations

import numpy as np
from scipy import stats

from services.drift import evaluation
from services.drift.alerting import Change, Finding, Persistence, Signal, decide, findings, sentence
from services.drift.detectors.ks import limit_tail
from services.drift.endpoints import _quantiles
from services.drift.evaluation import FeatureReport, Profile, Severity, Thresholds
from services.drift.observations import Observations
from services.drift.sample import MAX_CATEGORIES, OTHER, Sample, merged
from services.drift.stream import Cadence, Stream
from tests.fixtures.drift_rows import given

THRESHOLDS = Thresholds()


def rows(rng: np.random.Generator, count: int, shift: float = 0.0) -> Observations:
    return Observations(
        count,
        {"a": rng.normal(size=count), "b": rng.normal(shift, 1.0, size=count)},
        {"prediction": rng.choice(["yes", "no"], count).tolist()},
    )


def sample(seen: Observations) -> Sample:
    made = Sample()
    made.add(seen, 1)
    return made


def evaluate(reference: Sample, window: Sample, thresholds: Thresholds) -> list[FeatureReport]:
    return evaluation.evaluate(Profile.of(reference, thresholds.bins), window, thresholds)


def test_a_sample_survives_storage_and_merging() -> None:
    rng = np.random.default_rng(1)
    parts = [rows(rng, 100) for _ in range(4)]
    whole = Sample()
    for at_us, part in enumerate(parts, start=10):
        whole.add(part, at_us)
    stored = merged([Sample.from_bytes(sample(part).to_bytes()) for part in parts])
    assert stored.rows == whole.rows == 400
    assert (whole.first_us, whole.last_us) == (10, 13)
    assert stored.categorical == whole.categorical
    points = np.linspace(-2, 2, 9)
    assert np.allclose(stored.numeric["a"].cumulative(points), whole.numeric["a"].cumulative(points))


def test_categories_are_bounded() -> None:
    made = Sample()
    made.add(Observations(500, {}, {"prediction": [str(i) for i in range(500)]}), 1)
    assert len(made.categorical["prediction"]) == MAX_CATEGORIES + 1
    assert made.categorical["prediction"][OTHER] == 500 - MAX_CATEGORIES


def test_a_shift_is_found_in_its_feature_and_no_other() -> None:
    rng = np.random.default_rng(2)
    reports = {
        r.feature: r for r in evaluate(sample(rows(rng, 500)), sample(rows(rng, 500, 1.0)), THRESHOLDS)
    }
    assert reports["b"].psi_severity is Severity.CRITICAL
    assert reports["b"].ks_severity is Severity.WARNING
    assert reports["a"].psi_severity is reports["prediction"].psi_severity is Severity.NONE
    assert reports["prediction"].ks is None


def test_windows_without_drift_stay_quiet() -> None:
    """The false discovery rate over 20 features is held at 1%: of 200 windows some 2 may be noisy, not 20."""
    rng = np.random.default_rng(3)
    noisy = 0
    for _ in range(200):
        reference, window = (
            sample(Observations(300, {f"f{i}": rng.normal(size=300) for i in range(20)})) for _ in range(2)
        )
        noisy += any(r.psi_severity or r.ks_severity for r in evaluate(reference, window, THRESHOLDS))
    assert noisy <= 6


def test_a_value_never_seen_before_counts_as_shift() -> None:
    before = sample(Observations(400, {"n": np.repeat([0.0, 1.0], 200)}, {"prediction": ["x"] * 400}))
    after = sample(Observations(400, {"n": np.repeat([0.0, -5.0], 200)}, {"prediction": ["y"] * 400}))
    reports = {r.feature: r for r in evaluate(before, after, THRESHOLDS)}
    assert reports["n"].psi_severity is Severity.CRITICAL
    assert reports["prediction"].psi_severity is Severity.CRITICAL


def test_numbers_above_all_that_few_valued_features_had_count_as_shift() -> None:
    for before, after in (([5.0], [7.0]), ([0.0, 1.0], [0.0, 2.0]), ([0.1], [0.2]), ([3e39], [-3e39])):
        sides = [
            sample(Observations(400, {"x": np.resize(np.array(values), 400)})) for values in (before, after)
        ]
        (report,) = evaluate(sides[0], sides[1], Thresholds())
        assert report.psi_severity is Severity.CRITICAL, (before, after)
        (same,) = evaluate(sides[0], sides[0], Thresholds())
        assert same.psi.value == 0


def test_a_reference_column_without_any_number_is_shown_as_such() -> None:
    empty = sample(Observations(3, {"x": np.full(3, np.nan)})).numeric["x"]
    assert set(_quantiles(empty).values()) == {None}


def test_the_first_rows_teach_then_panes_slide() -> None:
    rng = np.random.default_rng(4)
    stream = Stream()
    cadence = Cadence(reference_rows=200, pane_rows=100, window_panes=2)
    windows = stream.feed(given([(rows(rng, 50), at) for at in range(1, 17)]), cadence, THRESHOLDS)
    assert stream.reference is not None
    assert stream.reference.rows == 200
    assert [w.rows for w in windows] == [100, 200, 200, 200, 200, 200]
    assert (windows[1].start_us, windows[1].end_us) == (5, 8)
    assert (windows[-1].start_us, windows[-1].end_us) == (13, 16)


def test_one_bad_pane_opens_no_alert() -> None:
    rng = np.random.default_rng(6)
    signals: dict[tuple[str, str], Signal] = {}
    stream, cadence = Stream(), Cadence()
    shifts = [0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0]
    seen = [(rows(rng, cadence.pane_rows, shift), at) for at, shift in enumerate(shifts, start=1)]
    loud = 0
    for window in stream.feed(given(seen), cadence, THRESHOLDS):
        for decision in decide(signals, findings(window, THRESHOLDS), Persistence()):
            signals[decision.finding.feature, decision.finding.detector] = decision.signal
            loud += decision.finding.severity > Severity.NONE
            assert decision.change is None
    assert loud >= 2  # it was seen, in both windows that hold the pane


def test_sentinels_beyond_single_precision_are_values_like_others() -> None:
    largest = float(np.finfo(np.float64).max)
    before = sample(Observations(300, {"n": np.full(300, largest)}))
    after = sample(Observations(300, {"n": np.repeat([largest, 1.0], 150)}))
    (report,) = evaluate(before, after, THRESHOLDS)
    assert report.psi_severity is Severity.CRITICAL


def test_more_categories_than_are_kept_is_no_drift_by_itself() -> None:
    rng = np.random.default_rng(7)
    draws = [rng.choice(1000, 2000).astype(str).tolist() for _ in range(2)]
    before, after = (sample(Observations(2000, {}, {"prediction": labels})) for labels in draws)
    (report,) = evaluate(before, after, THRESHOLDS)
    assert report.psi_severity is Severity.NONE


def test_under_load_panes_grow_instead_of_following_faster() -> None:
    rng = np.random.default_rng(8)
    stream = Stream(reference=sample(rows(rng, 200)))
    cadence = Cadence(reference_rows=200, pane_rows=100, window_panes=1, pane_s=1.0)
    seen = [(rows(rng, 100), round(tenth * 1e5)) for tenth in range(1, 31)]  # 1,000 rows a second, for 3 s
    windows = stream.feed(given(seen), cadence, THRESHOLDS)
    assert [window.rows for window in windows] == [1100, 1000]


def test_a_clock_that_was_ahead_ends_no_watch() -> None:
    rng = np.random.default_rng(9)
    stream = Stream(reference=sample(rows(rng, 200)))
    cadence = Cadence(reference_rows=200, pane_rows=100, window_panes=1, pane_s=1.0)
    a_day = 86_400_000_000
    tenths = range(1, 61)  # 1,000 rows a second, for 6 s; once from a worker whose clock is a day ahead
    seen = [(rows(rng, 100), round(tenth * 1e5) + (a_day if tenth == 15 else 0)) for tenth in tenths]
    windows = stream.feed(given(seen), cadence, THRESHOLDS)
    assert [window.rows for window in windows] == [1100, 400, 1100, 1000, 1000, 1000]


def finding(severity: Severity) -> Finding:
    return Finding("b", "psi", severity, 0.3, 0.2, 0.05, 0.0)


def run(severities: list[Severity]) -> list[Change | None]:
    signal, changes = Signal(), []
    for severity in severities:
        (decision,) = decide({("b", "psi"): signal}, iter([finding(severity)]), Persistence(2, 2))
        signal = decision.signal
        changes.append(decision.change)
    return changes


def test_an_alert_opens_when_a_finding_persists_and_ends_when_it_is_gone() -> None:
    none, warning, critical = Severity.NONE, Severity.WARNING, Severity.CRITICAL
    assert run([warning, none, warning]) == [None, None, None]
    assert run([warning, warning, warning, critical, critical]) == [None, "open", None, "escalate", None]
    assert run([critical, critical, none, critical, none, none, none]) == [
        None, "open", None, None, None, "resolve", None,
    ]  # fmt: skip


def test_an_alert_says_what_a_person_needs() -> None:
    rng = np.random.default_rng(5)
    stream = Stream(reference=sample(rows(rng, 300)))
    (window,) = stream.feed(given([(rows(rng, 300, 1.5), 1)]), Cadence(300, 300, 1), THRESHOLDS)
    found = next(f for f in findings(window, THRESHOLDS) if f.feature == "b" and f.detector == "psi")
    words = sentence(found, "cancer", "2", window)
    for part in ("b of cancer/2", "300 rows", "300 reference rows", "95% of windows", f"{found.value:.3f}"):
        assert part in words


def test_the_tail_of_ks_is_that_of_the_exact_law() -> None:
    for size in (25, 100, 5_000):
        distances = np.linspace(0.2, 2.5, 30) / np.sqrt(size)
        found = [limit_tail(float(distance), size) for distance in distances]
        assert np.allclose(found, stats.kstwo.sf(distances, size), atol=5e-4)
    assert limit_tail(0.0, 100) == 1.0


def test_a_new_reference_is_compared_with_from_the_next_window_on() -> None:
    rng = np.random.default_rng(9)
    stream, cadence = Stream(), Cadence(200, 200, 1)
    (calm,) = stream.feed(given([(rows(rng, 200), 1), (rows(rng, 200), 2)]), cadence, THRESHOLDS)
    stream.replace_reference(sample(rows(rng, 200, 3.0)))
    (shifted,) = stream.feed(given([(rows(rng, 200), 3)]), cadence, THRESHOLDS)
    loud = [[r.feature for r in window.reports if r.psi_severity] for window in (calm, shifted)]
    assert loud == [[], ["b"]]
