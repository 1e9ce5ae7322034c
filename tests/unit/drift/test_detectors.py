"""Detectors at the edges that the published cases leave open."""

import numpy as np
import pytest

from services.drift.detectors import binning, categorical, features, ks, multivariate, online, psi, sketches


def test_a_constant_reference_still_sees_the_value_move() -> None:
    assert psi.psi(np.zeros(200), np.zeros(100)).value == 0.0
    for moved in (np.ones(100), -np.ones(100)):
        assert psi.psi(np.zeros(200), moved).value > psi.CRITICAL


def test_values_outside_the_reference_are_counted() -> None:
    cuts = binning.quantile_cuts(np.arange(1000.0))
    counts = binning.count_bins([-np.inf, -5.0, 5000.0, np.inf, np.nan], cuts)
    assert counts.tolist() == [2, 0, 0, 0, 0, 0, 0, 0, 0, 2]


def test_psi_alarms_on_drift_and_not_on_the_noise_of_a_small_window() -> None:
    rng = np.random.default_rng(1)
    reference = rng.normal(0, 1, 5000)
    quiet = [psi.psi(reference, rng.normal(0, 1, 100)) for _ in range(200)]
    assert sum(result.value >= psi.WARNING for result in quiet) > 20
    assert sum(result.exceeds(psi.WARNING) for result in quiet) <= 8
    assert psi.psi(reference, rng.normal(0.8, 1, 100)).exceeds(psi.CRITICAL)


def test_psi_refuses_empty_sides_and_zero_shares() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        psi.psi_from_counts([1, 2], [0, 0])
    with pytest.raises(ValueError, match="above zero"):
        psi.index([0.5, 0.5], [1.0, 0.0])
    with pytest.raises(ValueError, match="no finite value"):
        binning.quantile_cuts([np.nan])


def test_ks_from_sketches_is_near_that_of_the_samples() -> None:
    rng = np.random.default_rng(2)
    reference, current = rng.normal(0, 1, 20_000), rng.normal(0.2, 1, 10_000)
    left, right = sketches.QuantileSketch.of(reference), sketches.QuantileSketch.of(current)
    points = np.concatenate([sketch.quantiles(np.linspace(0.005, 0.995, 200)) for sketch in (left, right)])
    approximate = ks.ks_from_cumulative(
        left.cumulative(points), right.cumulative(points), left.count, right.count
    )
    assert approximate.statistic == pytest.approx(ks.ks_two_sample(reference, current).statistic, abs=0.02)
    assert approximate.is_material()


def test_one_drifted_feature_among_many_is_named() -> None:
    rng = np.random.default_rng(3)
    reference, current = rng.normal(size=(1000, 20)), rng.normal(size=(1000, 20))
    current[:, 7] += 0.5
    for correction in ("fdr", "bonferroni"):
        found = features.ks_features(reference, current, correction=correction)
        assert np.flatnonzero(found.material()).tolist() == [7]


def test_a_category_never_seen_before() -> None:
    assert categorical.chi_square_fit([50, 50, 0], [10, 10, 1]).p_value == 0.0
    assert 0.0 < categorical.chi_square_two_sample([50, 50, 0], [10, 10, 1]).p_value < 1.0
    assert categorical.chi_square_two_sample([50, 0], [20, 0]).p_value == 1.0
    with pytest.raises(ValueError, match="two values"):
        categorical.fisher_exact([1, 2, 3], [1, 2, 3])


def test_lost_correlation_shows_only_in_the_reconstruction() -> None:
    rng = np.random.default_rng(4)
    shared = rng.normal(size=(4000, 1))
    reference = shared + 0.3 * rng.normal(size=(4000, 3))
    shuffled = np.column_stack([rng.permutation(reference[:, column]) for column in range(3)])
    assert not features.ks_features(reference, shuffled).is_drift
    fitted = multivariate.PcaReconstruction.fit(reference)
    assert fitted.error(shuffled) > 2 * fitted.error(reference)


def test_adwin_keeps_a_steady_stream_and_forgets_an_old_level() -> None:
    rng = np.random.default_rng(5)
    detector = online.Adwin()
    assert not any(detector.update(value) for value in rng.normal(0, 1, 3000))
    assert detector.width == 3000
    alarms = [detector.update(value) for value in rng.normal(2, 1, 1000)]
    assert any(alarms)
    assert detector.mean == pytest.approx(2.0, abs=0.3)


def test_sketches_refuse_what_they_cannot_hold() -> None:
    sketch = sketches.RelativeSketch()
    with pytest.raises(ValueError, match="negative"):
        sketch.update([-1.0])
    with pytest.raises(ValueError, match="empty"):
        sketch.quantiles([0.5])
    sketch.update([0.0, 0.0, 4.0])
    assert sketch.quantiles([0.0, 1.0]) == pytest.approx([0.0, 4.0], rel=0.01)
    with pytest.raises(ValueError, match="different accuracy"):
        sketch.merge(sketches.RelativeSketch(0.05))
    with pytest.raises(ValueError, match="empty"):
        sketches.QuantileSketch().quantiles([0.5])


def test_exact_ks_counts_with_ties_as_r_does() -> None:
    x, y = [1, 2, 2, 3, 4, 5, 5, 6], [2, 3, 3, 5, 7, 8, 8, 9, 9, 10]
    # ks.test(x, y, exact = TRUE) of R 4.2.2
    assert ks.ks_two_sample(x, y, method="exact").p_value == pytest.approx(0.03409662, rel=1e-6)
    one_sided = ks.ks_two_sample(x, y, method="exact", alternative="greater")
    assert one_sided.p_value == pytest.approx(0.01864802, rel=1e-6)


@pytest.mark.parametrize(
    ("reference", "current"),
    [([1, 2, 3], [6]), ([1, 2], [1, 2, 3]), ([], []), ([1, 2], [0, 0]), ([0, 0], [1, 2])],
)
def test_psi_needs_the_same_bins_and_something_in_them(reference: list[int], current: list[int]) -> None:
    with pytest.raises(ValueError, match="need"):
        psi.psi_from_counts(reference, current)


@pytest.mark.parametrize(
    ("reference", "current"),
    [([0.5, 0.5], [1.0]), ([], []), ([0.0, 1.0], [0.5, 0.5]), ([0.5, 0.5], [0.0, 1.0])],
)
def test_shares_that_have_no_index_are_refused(reference: list[float], current: list[float]) -> None:
    with pytest.raises(ValueError, match=r"need the same bins|above zero"):
        psi.index(reference, current)


@pytest.mark.parametrize(("reference", "current"), [([], [1.0]), ([1.0], []), ([np.nan], [1.0])])
def test_ks_needs_values_on_either_side(reference: list[float], current: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one value"):
        ks.ks_two_sample(reference, current)


@pytest.mark.parametrize(
    ("reference", "current", "counts"),
    [([0.5, 1.0], [1.0], (9, 9)), ([], [], (9, 9)), ([1.0], [1.0], (0, 9)), ([1.0], [1.0], (9, 0))],
)
def test_ks_of_shares_needs_the_same_points_and_values_behind_them(
    reference: list[float], current: list[float], counts: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match="at the same points"):
        ks.ks_from_cumulative(reference, current, *counts)


def test_adwin_looks_at_every_tick_of_its_clock_once_the_grace_is_over() -> None:
    def first_change(clock: int, grace_period: int = 10) -> int:
        detector = online.Adwin(clock=clock, grace_period=grace_period)
        values = [0.0] * 200 + [1.0] * 400
        return next(number for number, value in enumerate(values, 1) if detector.update(value))

    soonest = first_change(clock=1)
    assert 200 < soonest < 230
    assert first_change(clock=64) == 256
    assert first_change(clock=1, grace_period=300) == 301


def test_adwins_window_is_that_of_its_last_values_through_merges_and_cuts() -> None:
    rng = np.random.default_rng(3)
    values = np.concatenate([rng.normal(level, 1.0, 1500) for level in (0.0, 1.5, -1.0)])
    detector, widths = online.Adwin(), []
    for number, value in enumerate(values, 1):
        detector.update(float(value))
        window = values[number - detector.width : number]
        widths.append(detector.width)
        if number % 50 == 0:
            assert detector._window is not None
            assert detector.mean == pytest.approx(window.mean())
            assert detector._window.deviations == pytest.approx(((window - window.mean()) ** 2).sum())
    assert max(widths) > 1400
    assert widths[2200] < 900
