"""Weights for the next traffic of a trial that learns while it runs. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from headrace.v1.trials_pb2 import Trial, TrialMetric
from numpy.typing import NDArray

from services.analytics.statistics.policies import top_two_weights
from services.analytics.statistics.stratified import Cells, stratified_effect
from services.analytics.trial_strata import BEFORE

_WHOLE = 10_000
_DRAWS = 4_000
_DEFAULT_UPDATE_S = 60


def recommended_weights(trial: Trial, cells: dict[str, Cells], until_us: int) -> list[int]:
    """Weights in 1/10,000 by top-two Thompson sampling (Russo, "Simple Bayesian algorithms for best-arm
    identification", 2020) on the first success metric's mean; empty where the trial has no bandit, no such
    metric, or an arm with fewer than 100 units or too few that differ: nothing is learned from equal values.

    Posteriors are normal with flat priors. Effects against the control are stratified by weights, so a world
    that changes while the weights do misleads no arm. The draws depend on the trial and the time of the
    update only: asked again, or by another process, the answer for the same data is the same.
    """
    wanted = [metric for metric in trial.metrics if metric.role == TrialMetric.ROLE_SUCCESS]
    if not trial.HasField("bandit") or not wanted or wanted[0].name not in cells:
        return []
    posterior = _posterior(cells[wanted[0].name], len(trial.arms))
    if posterior is None:
        return []
    means, errors = posterior
    sign = -1.0 if wanted[0].direction == TrialMetric.DIRECTION_DECREASE else 1.0
    update = until_us // (1_000_000 * (trial.bandit.update_every_s or _DEFAULT_UPDATE_S))
    seed = blake2b(f"{trial.trial_id}/{update}".encode(), digest_size=8).digest()
    rng = np.random.default_rng(int.from_bytes(seed, "little"))
    draws = rng.normal(sign * means, errors, (_DRAWS, means.size))
    return bounded_weights(
        top_two_weights(draws),
        [arm.weight for arm in trial.arms],
        trial.bandit.min_weight,
        trial.bandit.max_change or _WHOLE,
    )


def bounded_weights(
    wanted: Sequence[float], current: Sequence[int], floor: int, max_change: int
) -> list[int]:
    """The weights in 1/10,000 nearest to the shares `wanted` of which none is below `floor` and none moves by
    more than `max_change`, unless it has to in order to reach the floor; they add up to 10,000. A floor above
    an even share is an even share."""
    held = np.asarray(current, dtype=np.float64)
    low_bound = min(floor, _WHOLE // held.size)
    low = np.maximum(low_bound, held - max_change)
    high = np.maximum(low, np.minimum(_WHOLE, held + max_change))
    target = np.asarray(wanted, dtype=np.float64) * _WHOLE
    # Shift all by one amount, cut to the limits, such that the sum is right: the projection in least squares.
    least, most = -2.0 * _WHOLE, 2.0 * _WHOLE
    if low.sum() > _WHOLE or high.sum() < _WHOLE:
        low, high = np.full_like(held, low_bound), np.full_like(held, _WHOLE)
    for _ in range(60):
        middle = (least + most) / 2
        if np.clip(target + middle, low, high).sum() < _WHOLE:
            least = middle
        else:
            most = middle
    exact = np.clip(target + most, low, high)
    whole = np.floor(exact).astype(np.int64)
    rest = int(_WHOLE - whole.sum())
    for place in np.argsort(whole - exact)[: max(0, rest)]:
        whole[place] += 1
    return [int(weight) for weight in whole]


def _posterior(cells: Cells, arms: int) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Means relative to the control's and their standard errors. The control's own uncertainty is what its
    comparisons share: the mean over them of the part of the variance that is the control's."""
    divided = cells.where(cells.strata < BEFORE)
    means, variances, control = np.zeros(arms), np.zeros(arms), []
    for arm in range(1, arms):
        pair = divided.where((divided.arms == 0) | (divided.arms == arm))
        effect = stratified_effect(pair)
        if effect is None or not effect.normal:
            return None
        means[arm] = effect.estimate
        share = effect.units / (effect.units + effect.control_units)
        variances[arm] = effect.std_error**2 * (1 - share)
        control.append(effect.std_error**2 * share)
    variances[0] = float(np.mean(control))
    return means, np.sqrt(variances)
