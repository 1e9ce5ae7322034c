"""What a policy would have earned, from what another one logged; and weights for the next traffic."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True, slots=True)
class OffPolicyEstimate:
    """Mean reward of the evaluated policy by four estimators; NaN where their reward model was not given.

    `effective_n` is (sum w)^2 / sum w^2: how many rows the weights are worth. Far below n, trust nothing.
    """

    ips: float
    snips: float
    dm: float
    dr: float
    ips_std_error: float
    effective_n: float
    n: int


def off_policy(
    actions: ArrayLike,
    rewards: ArrayLike,
    propensities: ArrayLike,
    policy: ArrayLike,
    reward_model: ArrayLike | None = None,
    *,
    clip: float | None = None,
) -> OffPolicyEstimate:
    """Inverse propensity score (Horvitz & Thompson 1952), self-normalised (Swaminathan & Joachims 2015),
    direct method and doubly robust (Dudik, Langford & Li 2011).

    `actions`, `rewards` and `propensities` are as logged, shape (n,). `policy` (n, arms) holds the evaluated
    policy's probabilities, `reward_model` (n, arms) the predicted rewards. `clip` caps the weights, trading
    bias for variance.
    """
    action = np.asarray(actions).astype(np.int64)
    reward, logged = np.asarray(rewards, dtype=np.float64), np.asarray(propensities, dtype=np.float64)
    if np.any(logged <= 0):
        raise ValueError("every logged propensity must be above zero")
    chosen = np.asarray(policy, dtype=np.float64)
    rows = np.arange(action.size)
    weights = chosen[rows, action] / logged
    if clip is not None:
        weights = np.minimum(weights, clip)
    direct = robust = float("nan")
    if reward_model is not None:
        model = np.asarray(reward_model, dtype=np.float64)
        base = np.sum(chosen * model, axis=1)
        direct = float(base.mean())
        robust = float(np.mean(base + weights * (reward - model[rows, action])))
    weighted = weights * reward
    total = float(weights.sum())
    return OffPolicyEstimate(
        ips=float(weighted.mean()),
        snips=float(weighted.sum() / total) if total > 0 else float("nan"),
        dm=direct,
        dr=robust,
        ips_std_error=float(weighted.std(ddof=1) / np.sqrt(action.size)) if action.size > 1 else float("nan"),
        effective_n=total**2 / float(np.sum(weights**2)) if total > 0 else 0.0,
        n=int(action.size),
    )


def top_two_weights(draws: ArrayLike) -> list[float]:
    """Traffic shares of top-two Thompson sampling (Russo 2020) from posterior draws (draws, arms): how often
    each arm is best or second best, halved. They add up to 1; two arms or fewer share equally.
    """
    sample = np.asarray(draws, dtype=np.float64)
    arms = sample.shape[1]
    if arms <= 2:
        return [1 / arms] * arms
    best_two = np.argpartition(-sample, 1, axis=1)[:, :2]
    counts = np.bincount(best_two.ravel(), minlength=arms)
    return [float(count) / (2 * sample.shape[0]) for count in counts]


def best_arm_chances(draws: ArrayLike) -> list[float]:
    """How often each arm is best in posterior draws (draws, arms)."""
    sample = np.asarray(draws, dtype=np.float64)
    counts = np.bincount(np.argmax(sample, axis=1), minlength=sample.shape[1])
    return [float(count) / sample.shape[0] for count in counts]
