"""What another policy would have earned, from what was logged with its propensities, before it gets any
traffic.

A policy says with which probability a request gets each variant: the same for everybody (`weights`), or unit
by unit (`assignments`). Estimates: inverse propensity (IPS), self-normalised (SNIPS) and doubly robust (DR)
with the variants' means as reward model, left out by unit in two halves so that no reward explains itself.
The unit is what varies independently: standard errors sum each estimate's influence over a unit's requests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray
from scipy import stats

from services.analytics.trial_words import is_share
from services.common.errors import InvalidArgument, NotFound

Json = dict[str, Any]
Floats = NDArray[np.float64]

_VALUES = {
    "error_rate": "SELECT *, failed::DOUBLE AS value FROM chosen WHERE code <> 1",
    "latency_ms": "SELECT *, latency_us / 1000.0 AS value FROM chosen WHERE code = 0 AND NOT cached",
    "accuracy": "SELECT chosen.*, labelled.value FROM chosen JOIN labelled USING (request_id)",
}
_OUTCOME_VALUES = """
SELECT chosen.*, number AS value FROM chosen JOIN outcomes USING (request_id)
WHERE metric = $metric AND number IS NOT NULL
"""
_CHOSEN = """
CREATE TEMP VIEW chosen AS SELECT * FROM online
WHERE propensity > 0 AND propensity < 1 AND coalesce(experiment, '') = getvariable('experiment')
"""
_LOGGED = """
SELECT request_id, unit_hash, variant, propensity::DOUBLE AS propensity, value FROM ({values})
WHERE value IS NOT NULL ORDER BY request_id
"""
_TINY_PROPENSITY = 0.01
_FEW_EFFECTIVE = 100.0
_LARGE_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Log:
    """Requests that chance assigned, one entry each: the unit, the variant as an index into `variants`, its
    propensity and the reward."""

    variants: tuple[str, ...]
    request_ids: Sequence[bytes]
    units: NDArray[np.uint64]
    actions: NDArray[np.int64]
    propensities: Floats
    rewards: Floats

    def where(self, chosen: NDArray[np.bool_]) -> Log:
        """Some of them."""
        kept = [one for one, keep in zip(self.request_ids, chosen.tolist(), strict=True) if keep]
        return Log(
            self.variants,
            kept,
            self.units[chosen],
            self.actions[chosen],
            self.propensities[chosen],
            self.rewards[chosen],
        )


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean reward with its interval."""

    value: float
    std_error: float
    interval: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Estimates:
    """Of one policy. `difference` is DR minus what was logged. `effective_n` is (sum w)^2 / sum w^2 over
    requests."""

    ips: Estimate
    snips: Estimate
    dr: Estimate
    logged: Estimate
    difference: Estimate
    effective_n: float
    n: int
    units: int
    mean_weight: Estimate
    largest_share: float
    smallest_propensity: float


def logged_requests(connection: duckdb.DuckDBPyConnection, metric: str, experiment: str) -> Log:
    """From an open snapshot: the requests of an experiment, or (empty) of the deployment's own split."""
    connection.execute("SET VARIABLE experiment = $value", {"value": experiment})
    connection.execute(_CHOSEN)
    values = _VALUES.get(metric, _OUTCOME_VALUES)
    given = {} if metric in _VALUES else {"metric": metric}
    rows = connection.execute(_LOGGED.format(values=values), given).fetchnumpy()
    names, actions = np.unique(np.asarray(rows["variant"], dtype=str), return_inverse=True)
    return Log(
        variants=tuple(names.tolist()),
        request_ids=[bytes(one) for one in rows["request_id"]],
        units=np.asarray(rows["unit_hash"], dtype=np.uint64),
        actions=actions.astype(np.int64),
        propensities=np.asarray(rows["propensity"], dtype=np.float64),
        rewards=np.asarray(rows["value"], dtype=np.float64),
    )


def same_for_all(log: Log, weights: Mapping[str, float]) -> Floats:
    """Probabilities (requests, variants) of a policy that gives every request the same chances. Raises
    InvalidArgument for a variant that was never answered: nothing logged can say what it would earn."""
    for name, share in weights.items():
        if share > 0 and name not in log.variants:
            raise InvalidArgument(
                f"No request of variant {name} with this metric was assigned by chance, so what it would "
                f"earn is not known. There are: {', '.join(log.variants) or 'none'}.",
                field=f"policy.weights.{name}",
            )
    row = np.array([weights.get(name, 0.0) for name in log.variants])
    return np.tile(row, (log.units.size, 1))


def by_unit(
    log: Log, units: Mapping[int, Mapping[str, float]], requests: Mapping[bytes, Mapping[str, float]]
) -> tuple[Log, Floats, int]:
    """Probabilities of a policy that says them unit by unit (by hash) or request by request: the log's
    entries that it covers, their probabilities (entries, variants), and how many it does not cover."""
    places = {name: place for place, name in enumerate(log.variants)}
    found: list[Mapping[str, float] | None] = [
        requests.get(request_id) or units.get(unit)
        for request_id, unit in zip(log.request_ids, log.units.tolist(), strict=True)
    ]
    covered = np.array([one is not None for one in found], dtype=bool)
    kept = [one for one in found if one is not None]
    policy = np.zeros((len(kept), len(log.variants)))
    for row, chances in enumerate(kept):
        for name, chance in chances.items():
            if name in places:
                policy[row, places[name]] = chance
    return log.where(covered), policy, int((~covered).sum())


def evaluate(log: Log, policy: Floats, *, alpha: float = 0.05) -> Estimates:
    """Value of `policy` (requests, variants), which need not add up to 1 where it would choose a variant that
    was never logged. Raises NotFound for an empty log."""
    n = log.units.size
    if n == 0:
        raise NotFound("No request with this metric was assigned by chance in this time.", field="metric")
    rows = np.arange(n)
    weights = policy[rows, log.actions] / log.propensities
    rewards = log.rewards
    _, owners = np.unique(log.units, return_inverse=True)
    groups = int(owners.max()) + 1

    def estimate(value: float, influence: Floats) -> Estimate:
        sums = np.bincount(owners, influence, groups)
        correction = groups / max(1, groups - 1)
        error = math.sqrt(float(sums @ sums) * correction) / n if groups > 1 else math.inf
        reach = float(stats.t.isf(alpha / 2, max(1, groups - 1))) * error
        return Estimate(value, error, (value - reach, value + reach))

    ips = float(np.mean(weights * rewards))
    mean_weight = float(weights.mean())
    snips = float(np.sum(weights * rewards) / weights.sum()) if mean_weight > 0 else math.nan
    model = _reward_model(log, owners)
    each = np.sum(policy * model, axis=1) + weights * (rewards - model[rows, log.actions])
    robust, logged = float(each.mean()), float(rewards.mean())
    square = float(np.sum(weights**2))
    scale = mean_weight if mean_weight > 0 else math.nan
    return Estimates(
        ips=estimate(ips, weights * rewards - ips),
        snips=estimate(snips, weights * (rewards - snips) / scale),
        dr=estimate(robust, each - robust),
        logged=estimate(logged, rewards - logged),
        difference=estimate(robust - logged, each - robust - (rewards - logged)),
        effective_n=float(weights.sum()) ** 2 / square if square > 0 else 0.0,
        n=int(n),
        units=groups,
        mean_weight=estimate(mean_weight, weights - mean_weight),
        largest_share=float(weights.max() / weights.sum()) if mean_weight > 0 else 0.0,
        smallest_propensity=float(log.propensities.min()),
    )


def _reward_model(log: Log, owners: NDArray[np.int64]) -> Floats:
    """Mean reward of every variant (requests, variants), for the units of one half from those of the other;
    the mean of all where a half has none of a variant."""
    arms = len(log.variants)
    half = owners % 2
    overall = float(log.rewards.mean())
    means = np.full((2, arms), overall)
    for side in (0, 1):
        other = half != side
        counts = np.bincount(log.actions[other], minlength=arms)
        sums = np.bincount(log.actions[other], log.rewards[other], arms)
        means[side, counts > 0] = sums[counts > 0] / counts[counts > 0]
    return means[half]


def warnings(found: Estimates, uncovered: int) -> list[str]:
    """What speaks against believing the estimates."""
    said = []
    if found.effective_n < _FEW_EFFECTIVE or found.effective_n < 0.05 * found.n:
        said.append(
            f"The {found.n} logged requests are worth {found.effective_n:.0f} for this policy, which differs "
            "much from the one that was logged: its interval is wide, and may be too narrow even so."
        )
    if found.smallest_propensity < _TINY_PROPENSITY:
        said.append(
            f"Propensities as small as {found.smallest_propensity:.2g} make single requests weigh very much."
        )
    if found.largest_share > _LARGE_SHARE:
        said.append(f"One request carries {found.largest_share:.0%} of all weight.")
    if abs(found.mean_weight.value - 1) > 3 * found.mean_weight.std_error + 1e-6:
        said.append(
            f"The weights have mean {found.mean_weight.value:.3f} where 1 is expected: the logged "
            "propensities are not how requests were assigned, or the policy "
            "chooses variants that were never logged."
        )
    if uncovered:
        said.append(f"{uncovered} logged requests have no assignment in this policy and are left out.")
    return said


def off_policy_json(model: str, metric: str, found: Estimates, uncovered: int) -> Json:
    """The answer of POST /v1/experiments/off-policy."""
    share = is_share(metric)

    def shown(one: Estimate) -> Json:
        known = math.isfinite(one.value)
        return {
            "value": one.value if known else None,
            "std_error": one.std_error if known and math.isfinite(one.std_error) else None,
            "interval": list(one.interval) if known and math.isfinite(one.std_error) else None,
        }

    low, high = found.difference.interval
    sides = "above" if low > 0 else "below" if high < 0 else "not told apart from"
    value, logged = (f"{one.value:.2%}" if share else f"{one.value:.4g}" for one in (found.dr, found.logged))
    return {
        "model": model,
        "metric": metric,
        "requests": found.n,
        "units": found.units,
        "effective_n": found.effective_n,
        "ips": shown(found.ips),
        "snips": shown(found.snips),
        "dr": shown(found.dr),
        "logged": shown(found.logged),
        "difference": shown(found.difference),
        "mean_weight": found.mean_weight.value,
        "smallest_propensity": found.smallest_propensity,
        "assumptions": [
            "What decides a request's variant besides chance is in its propensity.",
            "Units are independent of each other, and one unit's variant changes no other's reward.",
            "Fixed-horizon intervals: they hold for one policy thought of beforehand.",
        ],
        "warnings": warnings(found, uncovered),
        "summary": (
            f"{metric} of this policy would have been {value}, {sides} the {logged} that was logged "
            f"({found.n:,} requests of {found.units:,} units, worth {found.effective_n:,.0f})."
        ),
    }
