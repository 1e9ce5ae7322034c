"""What an experiment changes where it is served: it comes into the serving configuration, changes there, and
leaves it, each as one revision with the Trial in the same transaction. The caller holds the model's lock."""

from __future__ import annotations

from collections.abc import Callable

from headrace.v1.control_pb2 import ServedVersion, ServingConfig

from services.common.assignment import BUCKETS
from services.common.clock import Clock
from services.common.errors import FailedPrecondition
from services.registry import deployments, serving_config
from services.registry.experiment_state import layer_of, served_experiment, spec_of, start_of_layer
from services.registry.layers import Span, own, owners, size
from services.registry.repository import Repository
from services.registry.tables import ExperimentRow
from services.registry.trial_schemas import ten_thousandths
from services.registry.trials import experiment_trial, publish_trial

#: Experiments that run on one model: every router and worker reads all of them with every revision.
MOST_AT_ONCE = 100
#: Whether a worker has loaded a version of what is configured.
Readiness = Callable[[ServingConfig, str], bool]


async def begin(tx: Repository, row: ExperimentRow, clock: Clock, ready: Readiness) -> str:
    """Let `row` run and answer "", or answer what it has to wait for: versions that only experiments and
    rollouts need must be loaded before anybody is sent to them. They are brought by this.

    Raises FailedPrecondition where the model is not deployed, the traffic is not free or too many run,
    InvalidArgument where a variant takes other inputs than what is deployed, NotFound for a version that was
    deleted meanwhile.
    """
    deployed = await tx.deployment(row.model)
    if deployed is None:
        raise FailedPrecondition(f"{row.model} is not deployed; deploy it first", field="model")
    config = ServingConfig.FromString(deployed.config)
    if len(config.experiments) >= MOST_AT_ONCE:
        raise FailedPrecondition(f"{MOST_AT_ONCE} experiments run on {row.model} already", field="model")
    layer = free_layer(config, row)
    versions = [variant.version for variant in spec_of(row).variants]
    brought = await deployments.held_versions(tx, row.model, config, versions)
    for version in (*config.versions, *brought):
        if version.version in versions:
            serving_config.check_alike(config, version, "variants")
    unloaded = _unloaded(config, brought, versions, ready)
    if unloaded:
        if brought:
            await deployments.revise(
                tx, row.model, deployments.EXPERIMENT, clock, lambda config: config.versions.extend(brought)
            )
        return f"no worker of pool {config.pool} has loaded version {unloaded} yet"
    now = clock.now()
    row.status, row.started_at, row.weighted_at, row.waiting_for = "running", now, now, ""
    row.layer = [list(span) for span in layer]
    await _publish(tx, row, clock, lambda config: config.experiments.append(served_experiment(row)))
    return ""


async def reconfigure(tx: Repository, row: ExperimentRow, clock: Clock) -> None:
    """Let routers and analytics know of new weights, traffic or overrides of what runs. Raises
    FailedPrecondition where the traffic is not free."""
    deployed = await tx.deployment(row.model)
    if deployed is None:
        raise deployments.not_deployed(row.model)
    row.layer = [list(span) for span in free_layer(ServingConfig.FromString(deployed.config), row)]

    def edit(config: ServingConfig) -> None:
        for experiment in config.experiments:
            if experiment.experiment_id == row.experiment_id:
                experiment.CopyFrom(served_experiment(row))

    await _publish(tx, row, clock, edit)


async def end(tx: Repository, row: ExperimentRow, clock: Clock, winner: str | None = None) -> None:
    """Take `row` out of what is served, with what it alone needed; `winner`, a version, gets all traffic."""
    deployed = await tx.deployment(row.model)
    if deployed is not None:
        needed = await deployments.needed_versions(
            tx, ServingConfig.FromString(deployed.config), but=row.experiment_id
        )

    def edit(config: ServingConfig) -> None:
        stay = [other for other in config.experiments if other.experiment_id != row.experiment_id]
        if len(stay) < len(config.experiments):
            left = [type(other).FromString(other.SerializeToString()) for other in stay]
            del config.experiments[:]
            config.experiments.extend(left)
        if winner is not None:
            for version in config.versions:
                version.held = version.held and version.version != winner
            serving_config.set_weights(config, {winner: BUCKETS})
        serving_config.release(config, needed)

    if deployed is not None:
        await _publish(tx, row, clock, edit)
    else:
        publish_trial(tx, experiment_trial(row))


def close(tx: Repository, row: ExperimentRow, clock: Clock) -> None:
    """Count no more of what comes in late."""
    row.closed_at = clock.now()
    row.revision += 1
    publish_trial(tx, experiment_trial(row))


def free_layer(config: ServingConfig, row: ExperimentRow) -> list[Span]:
    """The buckets that `row` shall own beside what runs. Raises FailedPrecondition saying what is free."""
    wanted = ten_thousandths(spec_of(row).traffic)
    others = {
        other.experiment_id: [Span(span.first, span.last) for span in other.layer]
        for other in config.experiments
        if other.experiment_id != row.experiment_id
    }
    taken = [span for spans in others.values() for span in spans]
    try:
        return own(layer_of(row), taken, wanted, start_of_layer(row.experiment_id))
    except ValueError:
        free = (BUCKETS - size(taken)) / BUCKETS
        raise FailedPrecondition(
            f"{wanted / BUCKETS:g} of the traffic of {row.model} is wanted and {free:g} is free: "
            f"{owners(others)}",
            field="traffic",
        ) from None


async def _publish(
    tx: Repository, row: ExperimentRow, clock: Clock, edit: Callable[[ServingConfig], None]
) -> None:
    """One revision of the deployment, and the Trial with the same one: units are logged with it."""
    deployed = await deployments.revise(
        tx, row.model, deployments.EXPERIMENT, clock, edit, above=row.revision
    )
    row.revision = max(row.revision, deployed.config.revision)
    publish_trial(tx, experiment_trial(row))


def _unloaded(
    config: ServingConfig, brought: list[ServedVersion], versions: list[str], ready: Readiness
) -> str:
    """The first version that nobody has asked to be deployed and no worker has loaded; "": none. What is
    deployed is the business of whoever deployed it."""
    held = {version.version for version in config.versions if version.held}
    for version in versions:
        if any(one.version == version for one in brought):
            return version
        if version in held and not ready(config, version):
            return version
    return ""
