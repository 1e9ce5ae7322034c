"""What analytics is asked: the Trial of everything that runs, ran or shall run, on `control.trials.v1`. Every
function runs in the caller's transaction."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.v1.trials_pb2 import Bandit, Trial, TrialArm

from services.common.topics import TRIALS
from services.registry.experiment_schemas import UNITS, ExperimentIn
from services.registry.repository import Repository
from services.registry.rollout_state import trial_of
from services.registry.schemas import utc_us
from services.registry.tables import ExperimentRow
from services.registry.trial_schemas import metric_message, ten_thousandths


def publish_trial(tx: Repository, trial: Trial) -> None:
    """Put `trial` on the topic when this transaction commits."""
    # Deterministic, so that publishing the same state again gives the same bytes
    tx.publish(TRIALS, trial.trial_id, trial.SerializeToString(deterministic=True))


def end_trial(tx: Repository, trial_id: str) -> None:
    """Forget a trial for good."""
    tx.publish(TRIALS, trial_id, None)


async def republish_trial(tx: Repository, trial_id: str, seen: int) -> None:
    """Put a trial on the topic again, which holds revision `seen` (0: nothing). A higher one is overtaken."""
    experiment = await tx.experiment(trial_id, lock=True)
    rollout = await tx.rollout(trial_id, fresh=True)
    if experiment is not None:
        experiment.revision = _overtaking(experiment.revision, seen)
        publish_trial(tx, experiment_trial(experiment))
    elif rollout is not None:
        rollout.revision = _overtaking(rollout.revision, seen)
        publish_trial(tx, trial_of(rollout))


def _overtaking(revision: int, seen: int) -> int:
    return revision if revision >= seen else seen + 1


def experiment_trial(row: ExperimentRow) -> Trial:
    """What analytics shall judge of an experiment; one that has not started has no `started_at_us`."""
    spec = ExperimentIn.model_validate(row.spec)
    bandit = None
    if spec.bandit is not None:
        bandit = Bandit(
            min_weight=ten_thousandths(spec.bandit.min_weight),
            max_change=ten_thousandths(spec.bandit.max_change),
            update_every_s=spec.bandit.update_every_s,
        )
    return Trial(
        trial_id=row.experiment_id,
        kind=Trial.KIND_EXPERIMENT,
        model=row.model,
        revision=row.revision,
        arms=_arms(spec, row.buckets),
        unit=UNITS[spec.unit],
        metrics=[metric_message(metric, spec.minimal_effect or 0.0) for metric in spec.metrics],
        alpha=spec.alpha,
        started_at_us=utc_us(row.started_at) if row.started_at else 0,
        stopped_at_us=utc_us(row.stopped_at) if row.stopped_at else 0,
        closed=row.closed_at is not None,
        bandit=bandit,
        planned_units=spec.planned_units or 0,
        name=spec.name,
    )


def _arms(spec: ExperimentIn, buckets: Sequence[Sequence[int]]) -> list[TrialArm]:
    """Weights are counted in buckets, which is how units are assigned."""
    weights = [0] * len(spec.variants)
    for first, last, variant in buckets:
        weights[variant] += last - first + 1
    return [
        TrialArm(name=variant.name, version=variant.version, weight=weight)
        for variant, weight in zip(spec.variants, weights, strict=True)
    ]
