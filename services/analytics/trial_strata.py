"""Which requests a trial is about, and by what chance each got its arm: the tables that `trial_queries` asks.

A stratum is a set of weights: revisions under which every arm was assigned with the same chance. Requests
whose version nobody's dice chose (asked for by name, an override, all traffic on one version) are in no
stratum, nor are those that another version answered instead. Everything blocks, run it in a thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import duckdb
import numpy as np
import pyarrow as pa
from headrace.v1.trials_pb2 import Trial
from numpy.typing import NDArray

#: What is served after the last weights that left the control any traffic, and, where no weights ever divided
#: it, what the control served before.
BAKE, BEFORE = 1_000_000, 999_999

_WHOLE = 10_000

# By intention to treat: a fallback that answers does so for the variant that the unit was given, and that
# variant failed. A rollout's variants are named as versions are, unless a deployment gives them names of its
# own (and has no fallback then): of those the version tells the arm.
_MINE = """
CREATE TEMP TABLE mine AS
SELECT online.* EXCLUDE (failed), arms.arm,
       online.failed OR (online.version <> '' AND online.version <> arms.version) AS failed
FROM online JOIN arms ON arms.name = CASE
    WHEN $rollout AND online.variant NOT IN (SELECT name FROM arms) THEN online.version
    ELSE online.variant END
WHERE answered_at_us >= getvariable('started_us') AND coalesce(experiment, '') = $of
"""

_EXPOSED = """
CREATE TEMP TABLE exposed AS
SELECT strata.arm AS arm, strata.stratum AS stratum, unit_hash, online.request_id, code, failed, cached,
       latency_us, version, predicted, predicted_text, rows, answered_at_us
FROM mine AS online JOIN strata ON strata.arm = online.arm AND strata.revision = online.revision
    AND strata.propensity = round(online.propensity * 10000)
"""


@dataclass(frozen=True, slots=True)
class TrialQuestion:
    """Which requests a trial is about. `versions` (rollouts) or `variants` (experiments) name the arms, the
    control first; `weights` are those of now, in 1/10,000."""

    trial_id: str
    revision: int
    rollout: bool
    names: tuple[str, ...]
    versions: tuple[str, ...]
    weights: tuple[int, ...]
    started_us: int

    @classmethod
    def of(cls, trial: Trial) -> Self:
        """Of an experiment arms are its variants, of a rollout versions."""
        rollout = trial.kind == Trial.KIND_ROLLOUT
        return cls(
            trial_id=trial.trial_id,
            revision=trial.revision,
            rollout=rollout,
            names=tuple(arm.version if rollout else arm.name for arm in trial.arms),
            versions=tuple(arm.version for arm in trial.arms),
            weights=tuple(arm.weight for arm in trial.arms),
            started_us=trial.started_at_us,
        )

    @property
    def baking(self) -> int | None:
        """The arm that has all traffic, if it is not the control."""
        whole = [arm for arm, weight in enumerate(self.weights) if arm and weight == _WHOLE]
        return whole[0] if self.rollout and whole else None


@dataclass(frozen=True, slots=True)
class Strata:
    """Chances of every arm per stratum, shape (strata, arms); NaN where nothing says one. Strata are numbered
    in the order in which they came; `last` is the newest in which the control had traffic."""

    shares: NDArray[np.float64]
    last: int

    def share(self, arm: int) -> NDArray[np.float64]:
        """Chance of the arm among the control and itself, per stratum; NaN where one of them is not known or
        is 0."""
        pair = self.shares[:, [0, arm]]
        pair = np.where(pair > 0, pair, np.nan)
        return np.asarray(pair[:, 1] / pair.sum(axis=1))


def open_trial(connection: duckdb.DuckDBPyConnection, question: TrialQuestion) -> Strata:
    """Make the tables that `trial_queries` reads, from a snapshot that reaches back to the start (and to
    the pre-period). Once per connection."""
    _prepare(connection, question)
    found = connection.execute(
        "SELECT revision, arm, mode(round(propensity * 10000))::BIGINT FROM mine "
        "WHERE propensity > 0 AND propensity < 1 GROUP BY revision, arm ORDER BY revision, arm"
    ).fetchall()
    arms = len(question.names)
    chances: dict[int, list[int | None]] = {}
    for revision, arm, chance in found:
        chances.setdefault(revision, [None] * arms)[arm] = chance
    numbers: dict[tuple[int | None, ...], int] = {}
    rows: list[tuple[int, int, int, int]] = []
    last = -1
    for revision, seen in chances.items():
        key = tuple(_completed(seen, question.weights))
        stratum = numbers.setdefault(key, len(numbers))
        rows += [(revision, arm, chance, stratum) for arm, chance in enumerate(key) if chance is not None]
        if seen[0] is not None:
            last = stratum
    rows += _bake_rows(connection, question, last)
    table = pa.table(
        {
            name: pa.array([row[place] for row in rows], kind)
            for place, (name, kind) in enumerate(
                (
                    ("revision", pa.uint64()),
                    ("arm", pa.int32()),
                    ("propensity", pa.int64()),
                    ("stratum", pa.int32()),
                )
            )
        }
    )
    connection.register("strata", table)
    connection.execute(_EXPOSED)
    shares = np.full((len(numbers), arms), np.nan)
    for key, stratum in numbers.items():
        shares[stratum] = [np.nan if chance is None else chance / _WHOLE for chance in key]
    return Strata(shares, last)


def _prepare(connection: duckdb.DuckDBPyConnection, question: TrialQuestion) -> None:
    """`mine`: the trial's requests with their arms; `before`: everybody's before it began."""
    connection.execute("SET VARIABLE started_us = $value", {"value": question.started_us})
    connection.execute("SET VARIABLE undivided = $value", {"value": BEFORE})
    connection.register(
        "arms",
        pa.table(
            {
                "name": pa.array(question.names, pa.string()),
                "version": pa.array(question.versions, pa.string()),
                "arm": pa.array(range(len(question.names)), pa.int32()),
            }
        ),
    )
    of = "" if question.rollout else question.trial_id
    connection.execute(_MINE, {"of": of, "rollout": question.rollout})
    connection.execute(
        "CREATE TEMP VIEW before AS SELECT * FROM online WHERE answered_at_us < getvariable('started_us')"
    )


def _completed(seen: list[int | None], weights: Sequence[int]) -> list[int | None]:
    """The chance of the one arm that logged nothing is what the others leave, and of all that did not, where
    they leave nothing, 0. Of several it is as configured, where it is for all others: an arm that ought to
    get units and gets none has to be counted, with none."""
    missing = [arm for arm, chance in enumerate(seen) if chance is None]
    left = _WHOLE - sum(chance or 0 for chance in seen)
    if left == 0 or (len(missing) == 1 and left > 0):
        return [left if chance is None else chance for chance in seen]
    as_configured = all(chance in (None, weight) for chance, weight in zip(seen, weights, strict=True))
    if as_configured and sum(weights) == _WHOLE:
        return list(weights)
    return list(seen)


def _bake_rows(
    connection: duckdb.DuckDBPyConnection, question: TrialQuestion, last: int
) -> list[tuple[int, int, int, int]]:
    """What has all traffic now; and where no weights ever divided it, the control's time before."""
    arm = question.baking
    if arm is None:
        return []
    rows = connection.execute(
        "SELECT DISTINCT revision, arm FROM mine WHERE round(propensity * 10000) = 10000 "
        "AND ((arm = $arm AND revision >= $since) OR (arm = 0 AND revision < $since AND $alone))",
        {"arm": arm, "since": question.revision, "alone": last < 0},
    ).fetchall()
    return [(revision, found, _WHOLE, BAKE if found else BEFORE) for revision, found in rows]
