"""What two versions of a model measured per unit, in SQL over an open snapshot. Everything blocks, run it in
a thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import duckdb
import numpy as np
from numpy.typing import NDArray

from services.analytics.queries import set_variables

_MEASURED = {
    "error_rate": "SELECT *, failed::DOUBLE AS value FROM online WHERE code <> 1",
    "latency_ms": "SELECT *, latency_us / 1000.0 AS value FROM online WHERE code = 0 AND NOT cached",
    "accuracy": "SELECT * FROM labelled",
}
_MEASURED_OUTCOME = """
SELECT *, number AS value FROM online JOIN outcomes USING (request_id)
WHERE metric = getvariable('metric') AND number IS NOT NULL
"""

_SPLIT = """
CREATE TEMP MACRO arm_of(version, variant) AS CASE
    WHEN version = getvariable('a') THEN 'a'
    WHEN version = getvariable('b') THEN 'b'
    WHEN variant = getvariable('a') THEN 'a'
    WHEN variant = getvariable('b') THEN 'b' END;

-- What an experiment assigned is its own, with weights of its own.
CREATE TEMP VIEW of_the_split AS SELECT * FROM online WHERE experiment IS NULL;

-- Whoever names a version gets it with propensity 1, as does everybody while it has all traffic.
CREATE TEMP MACRO by_chance(propensity) AS propensity > 0 AND propensity < 1;

SELECT count(DISTINCT arm_of(version, variant)) FILTER (by_chance(propensity)),
       count(*) FILTER (NOT by_chance(propensity))
FROM of_the_split WHERE arm_of(version, variant) IS NOT NULL
"""

_ARMS = """
CREATE TEMP TABLE exposures AS
SELECT arm_of(version, variant) AS arm, unit_hash, revision, propensity, answered_at_us FROM of_the_split
WHERE arm_of(version, variant) IS NOT NULL AND (by_chance(propensity) OR NOT getvariable('randomised'));

CREATE TEMP TABLE firsts AS
SELECT unit_hash, arg_min(arm, (answered_at_us, arm)) AS arm, count(DISTINCT arm) > 1 AS crossed
FROM exposures GROUP BY unit_hash;

CREATE TEMP TABLE observations AS
SELECT arm_of(version, variant) AS arm, unit_hash, value FROM measured
WHERE experiment IS NULL AND arm_of(version, variant) IS NOT NULL
      AND (by_chance(propensity) OR NOT getvariable('randomised'));
"""

_ARM = """
SELECT unit_hash, coalesce(total, 0) AS total, coalesce(n, 0)::DOUBLE AS n, revision, propensity,
       coalesce(zero_or_one, true) AS zero_or_one
FROM (
    SELECT unit_hash, arg_min(revision, answered_at_us) AS revision,
           arg_min(propensity, answered_at_us)::DOUBLE AS propensity
    FROM exposures JOIN firsts USING (unit_hash, arm) WHERE arm = $arm GROUP BY unit_hash
)
LEFT JOIN (
    SELECT unit_hash, sum(value) AS total, count(*) AS n, bool_and(value IN (0, 1)) AS zero_or_one
    FROM observations WHERE arm = $arm AND value IS NOT NULL GROUP BY unit_hash
) USING (unit_hash)
ORDER BY unit_hash
"""


_OF_EXPERIMENTS = """
SELECT experiment, count(*) FROM online
WHERE experiment IS NOT NULL AND arm_of(version, variant) IS NOT NULL GROUP BY ALL ORDER BY ALL
"""

# What a share of the values lies below, per arm; who has how many of them, for the spread that units make.
_QUANTILES = """
SELECT count(*), count(DISTINCT unit_hash), quantile_disc(value, $shares)
FROM observations JOIN firsts USING (unit_hash, arm) WHERE arm = $arm AND value IS NOT NULL
"""
_BELOW = """
SELECT avg(n), avg(below), var_samp(n), var_samp(below), covar_samp(n, below) FROM (
    SELECT count(*)::DOUBLE AS n, count(*) FILTER (value <= $point)::DOUBLE AS below
    FROM observations JOIN firsts USING (unit_hash, arm) WHERE arm = $arm AND value IS NOT NULL
    GROUP BY unit_hash
)
"""
_Z95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Observations:
    """What one arm measured, per unit that was exposed to it: the sum of the values and how many there were,
    maybe none. `revisions` and `propensities` are of the unit's first request. `binary`: every value is 0 or
    1."""

    units: NDArray[np.uint64]
    totals: NDArray[np.float64]
    counts: NDArray[np.float64]
    revisions: NDArray[np.uint64]
    propensities: NDArray[np.float64]
    binary: bool


@dataclass(frozen=True, slots=True)
class Quantile:
    """What the share of an arm's values lies at or below, with its 95% interval."""

    share: float
    value: float
    low: float
    high: float
    units: int


@dataclass(frozen=True, slots=True)
class Arms:
    """Both arms, and how many units were seen in both (they count for the one they met first).

    `randomised`: only requests that the split assigned by chance are in them, and `left_out` were not; else
    there are none of an arm, and everything is in them. `unmapped` labels of these versions could not be held
    against an answer. `experiments` assigned requests of these versions, which are left out: id and requests.
    """

    a: Observations
    b: Observations
    crossed: int
    randomised: bool = True
    left_out: int = 0
    unmapped: int = 0
    experiments: Sequence[tuple[str, int]] = ()


def arms(connection: duckdb.DuckDBPyConnection, metric: str, a: str, b: str) -> Arms:
    """Observations of two versions (or variants) per unit that the split sent there. A unit that met both
    counts with the one that it met first, by its requests there. Requests that an experiment assigned do not
    count: they are not of the deployment's split. Once per connection.

    `metric`: error_rate, latency_ms, accuracy, or the name of an outcome with numbers.
    """
    set_variables(connection, a=a, b=b, metric=metric)
    measured = _MEASURED.get(metric, _MEASURED_OUTCOME)
    connection.execute(f"CREATE TEMP VIEW measured AS {measured}")
    ((split, others),) = connection.execute(_SPLIT).fetchall()
    randomised = split == 2
    set_variables(connection, randomised=randomised)
    connection.execute(_ARMS)
    ((crossed, unmapped),) = connection.execute(
        "SELECT (SELECT count(*) FROM firsts WHERE crossed), "
        "(SELECT count(*) FROM observations WHERE value IS NULL)"
    ).fetchall()
    return Arms(
        a=_arm(connection, "a"),
        b=_arm(connection, "b"),
        crossed=crossed,
        randomised=randomised,
        left_out=others if randomised else 0,
        unmapped=unmapped,
        experiments=connection.execute(_OF_EXPERIMENTS).fetchall(),
    )


def arm_quantiles(connection: duckdb.DuckDBPyConnection, arm: str, shares: Sequence[float]) -> list[Quantile]:
    """Quantiles of the values of an arm ("a", "b"), after `arms`; none below two units.

    The values of one unit go together: the share below the estimate is a ratio of sums per unit, whose
    standard error by the delta method says which ranks around the estimate bound its interval (Deng, Knoblich
    & Lu, "Applying the delta method in metric analytics", KDD 2018, section 4).
    """
    given: dict[str, object] = {"arm": arm}
    ((observations, units, values),) = connection.execute(
        _QUANTILES, given | {"shares": list(shares)}
    ).fetchall()
    if units < 2:
        return []
    found = []
    for share, value in zip(shares, values, strict=True):
        ((n, below, n_var, below_var, both),) = connection.execute(
            _BELOW, given | {"point": value}
        ).fetchall()
        ratio = below / n
        spread = max(0.0, below_var - 2 * ratio * both + ratio * ratio * n_var) / (n * n)
        # Never below that of independent values: rounding of values makes the share jump.
        error = max(spread / units, share * (1 - share) / observations) ** 0.5
        ranks = [min(1.0, max(0.0, share + sign * _Z95 * error)) for sign in (-1, 1)]
        ((_, _, (low, high)),) = connection.execute(_QUANTILES, given | {"shares": ranks}).fetchall()
        found.append(Quantile(share, value, low, high, units))
    return found


def _arm(connection: duckdb.DuckDBPyConnection, arm: str) -> Observations:
    found = connection.execute(_ARM, {"arm": arm}).fetchnumpy()
    return Observations(
        units=np.asarray(found["unit_hash"], dtype=np.uint64),
        totals=np.asarray(found["total"], dtype=np.float64),
        counts=np.asarray(found["n"], dtype=np.float64),
        revisions=np.asarray(found["revision"], dtype=np.uint64),
        propensities=np.asarray(found["propensity"], dtype=np.float64),
        binary=bool(np.all(found["zero_or_one"])),
    )
