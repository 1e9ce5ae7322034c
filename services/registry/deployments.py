"""What serves a model: versions and weights, one revision after another. Every function runs in the caller's
transaction; the record for `control.deployments.v1` commits with the change or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from headrace.v1.control_pb2 import (
    ServedVersion,
    ServingConfig,
)
from headrace.v1.registry_pb2 import Deployment

from services.common.clock import Clock
from services.common.errors import Aborted, FailedPrecondition, NotFound
from services.common.topics import DEPLOYMENTS
from services.registry import serving_config
from services.registry.repository import Repository
from services.registry.rollout_guard import guard_rollout, rollout_name
from services.registry.schemas import DeployIn, utc_us
from services.registry.tables import DeploymentRow, HistoryRow

#: The reason of revisions that experiments made; a bandit makes them without end, so old ones are forgotten.
EXPERIMENT = "experiment"
EXPERIMENT_REVISIONS_KEPT = 1000


@dataclass(frozen=True, slots=True)
class Revision:
    """One entry of a deployment's history; no `deployment`: undeployed."""

    revision: int
    reason: str
    at: datetime
    deployment: Deployment | None


async def deploy(tx: Repository, model: str, wanted: DeployIn, clock: Clock) -> Deployment:
    """Make `wanted` the state of `model`'s serving. An alias may name a version; it is resolved now.

    Asking for what is there already changes nothing and makes no revision. Experiments and holdout stay as
    they are. Raises NotFound for an unknown model, InvalidArgument naming `versions…`, `cache`, `shadow…` or
    `fallback…` (where versions take unlike inputs, too), Aborted where `expected_revision` is not the current
    one, FailedPrecondition where something that runs needs a version that would go.
    """
    owner = await tx.model(model, lock=True)
    if owner is None:
        raise no_model(model)
    row = await tx.deployment(model)
    if wanted.expected_revision is not None and wanted.expected_revision != (row.revision if row else 0):
        at = f"at revision {row.revision}" if row else "not deployed"
        raise Aborted(f"{model} is {at}, not at {wanted.expected_revision}", field="expected_revision")
    aliases = {alias.alias: alias.version for alias in await tx.aliases(model)}
    served = await _served(tx, model, wanted, aliases)
    old = ServingConfig.FromString(row.config) if row else ServingConfig()
    served += await _held(tx, old, served)
    config = serving_config.composed(model, wanted, served, aliases, old, owner.holdout)
    rollout = await tx.unfinished_rollout(model)
    if rollout is not None:
        guard_rollout(rollout, old, config)
    if row is not None and serving_config.same_state(old, config):
        return _deployment(row)
    serving_config.check_inputs(config)
    return await _commit_revision(tx, config, "deploy", clock)


async def undeploy(tx: Repository, model: str, clock: Clock) -> None:
    """Take `model` out of serving. Raises NotFound where it is not deployed, FailedPrecondition while
    something runs on it."""
    if await tx.model(model, lock=True) is None:
        raise no_model(model)
    row = await tx.deployment(model)
    if row is None:
        raise not_deployed(model)
    for what in (await needed_versions(tx, ServingConfig.FromString(row.config))).values():
        raise FailedPrecondition(f"{what} runs on {model}; stop it first", field="model")
    revision = await tx.next_revision(model)
    await tx.delete_deployment(model)
    tx.add(HistoryRow(model=model, revision=revision, reason="undeploy", config=None, created_at=clock.now()))
    tx.publish(DEPLOYMENTS, model, None)


async def revise(
    tx: Repository,
    model: str,
    reason: str,
    clock: Clock,
    edit: Callable[[ServingConfig], None],
    *,
    above: int = 0,
) -> Deployment:
    """Change what is deployed by `edit`, as one revision higher than `above`, or none where it changes
    nothing. Aliases of versions that come can be asked for from then on, those of versions that go cannot.
    The caller holds the model's lock. Raises NotFound where the model is not deployed."""
    row = await tx.deployment(model)
    if row is None:
        raise not_deployed(model)
    config = ServingConfig.FromString(row.config)
    edit(config)
    aliases = {alias.alias: alias.version for alias in await tx.aliases(model)}
    serving_config.set_aliases(config, serving_config.resolvable(aliases, config.versions))
    if serving_config.same_state(ServingConfig.FromString(row.config), config):
        return _deployment(row)
    return await _commit_revision(tx, config, reason, clock, above=above)


async def held_versions(
    tx: Repository, model: str, config: ServingConfig, names: Sequence[str]
) -> list[ServedVersion]:
    """Those of the versions `names` that `config` lacks, ready to be added to it: loaded, without traffic,
    gone when `release` finds that nothing needs them. Raises NotFound for one that is not there,
    InvalidArgument for one whose answers cannot be kept where answers are."""
    served = {version.version for version in config.versions}
    missing = [name for name in dict.fromkeys(names) if name not in served]
    rows = {row.version: row for row in await tx.versions(model, missing)} if missing else {}
    for name in missing:
        if name not in rows:
            raise NotFound(f"{model} has no version {name!r}", field="version")
    if config.HasField("cache"):
        serving_config.check_kept(rows.values(), "version")
    added = [serving_config.served_version(rows[name], 0, name) for name in missing]
    for version in added:
        version.held = True
    return added


async def needed_versions(tx: Repository, config: ServingConfig, but: str = "") -> dict[str, str]:
    """Versions that something needs that runs on the model or waits for them to be loaded, and what does,
    save for the trial `but`."""
    rollout = await tx.unfinished_rollout(config.model)
    of_rollout = () if rollout is None else (rollout.previous_version, rollout.version)
    return {version: rollout_name(rollout) for version in of_rollout if rollout is not None} | {
        variant["version"]: f"experiment {experiment.experiment_id}"
        for experiment in await tx.started_experiments(config.model)
        if experiment.experiment_id != but
        for variant in experiment.spec["variants"]
    }


async def get_deployment(tx: Repository, model: str) -> Deployment:
    """Raises NotFound where the model is unknown or not deployed."""
    row = await tx.deployment(model)
    if row is not None:
        return _deployment(row)
    if await tx.model(model) is None:
        raise no_model(model)
    raise not_deployed(model)


async def list_deployments(tx: Repository, after: str, limit: int) -> tuple[list[Deployment], str | None]:
    """A page by model name, and where the next one starts."""
    rows = await tx.deployments(after, limit + 1)
    page = rows[:limit]
    return [_deployment(row) for row in page], page[-1].model if len(rows) > limit else None


async def history(
    tx: Repository, model: str, before: int | None, limit: int
) -> tuple[list[Revision], int | None]:
    """Revisions of `model`, newest first, and where the next page starts. Raises NotFound."""
    if await tx.model(model) is None:
        raise no_model(model)
    rows = await tx.history(model, before if before is not None else 1 << 62, limit + 1)
    entries = [_revision(row) for row in rows[:limit]]
    return entries, entries[-1].revision if len(rows) > limit else None


async def refresh_aliases(tx: Repository, model: str, clock: Clock) -> None:
    """After an alias moved: tell those who serve the model. The caller holds the model's lock."""
    row = await tx.deployment(model)
    if row is None:
        return
    config = ServingConfig.FromString(row.config)
    aliases = serving_config.resolvable(
        {alias.alias: alias.version for alias in await tx.aliases(model)}, config.versions
    )
    if dict(config.aliases) == aliases:
        return
    serving_config.set_aliases(config, aliases)
    await _commit_revision(tx, config, "alias", clock)


async def republish(tx: Repository, model: str, seen: int, clock: Clock) -> None:
    """Put the state of `model` on the topic again, where it holds revision `seen` (0: nothing).

    A `seen` above ours (this database was restored from an older copy) is overtaken by a new revision, else
    everybody would go on ignoring ours.
    """
    await tx.model(model, lock=True)
    row = await tx.deployment(model)
    if row is None:
        tx.publish(DEPLOYMENTS, model, None)
    elif row.revision < seen:
        await _commit_revision(tx, ServingConfig.FromString(row.config), "republish", clock, above=seen)
    else:
        tx.publish(DEPLOYMENTS, model, row.config)


async def _served(
    tx: Repository, model: str, wanted: DeployIn, aliases: Mapping[str, str]
) -> list[ServedVersion]:
    names = [aliases.get(share.version, share.version) for share in wanted.versions]
    rows = {row.version: row for row in await tx.versions(model, names)}
    if wanted.cache is not None:
        serving_config.check_kept(rows.values(), "cache")
    return serving_config.chosen(model, wanted.versions, aliases, rows)


async def _held(tx: Repository, old: ServingConfig, served: Sequence[ServedVersion]) -> list[ServedVersion]:
    """Versions that stay although the caller does not name them: something that runs brought them."""
    named = {version.version for version in served}
    needed = await needed_versions(tx, old)
    staying: list[ServedVersion] = []
    for version in old.versions:
        if version.version in named or version.version not in needed:
            continue
        if not version.held:
            raise FailedPrecondition(
                f"{needed[version.version]} needs version {version.version!r}; stop it first",
                field="versions",
            )
        staying.append(serving_config.without_traffic(version))
    return staying


async def _commit_revision(
    tx: Repository, config: ServingConfig, reason: str, clock: Clock, *, above: int = 0
) -> Deployment:
    now = clock.now()
    config.revision = await tx.next_revision(config.model, above)
    config.published_at_us = utc_us(now)
    # Deterministic, so that publishing the same state again gives the same bytes
    value = config.SerializeToString(deterministic=True)
    await tx.put_deployment(config.model, config.revision, value, now)
    tx.add(
        HistoryRow(model=config.model, revision=config.revision, reason=reason, config=value, created_at=now)
    )
    if reason == EXPERIMENT:
        await tx.prune_history(config.model, reason, config.revision - EXPERIMENT_REVISIONS_KEPT)
    tx.publish(DEPLOYMENTS, config.model, value)
    return Deployment(config=config, updated_at_us=utc_us(now))


def _deployment(row: DeploymentRow) -> Deployment:
    config = ServingConfig.FromString(row.config)
    return Deployment(config=config, updated_at_us=utc_us(row.updated_at))


def _revision(row: HistoryRow) -> Revision:
    deployment = None
    if row.config is not None:
        config = ServingConfig.FromString(row.config)
        deployment = Deployment(config=config, updated_at_us=utc_us(row.created_at))
    return Revision(row.revision, row.reason, row.created_at, deployment)


def no_model(model: str) -> NotFound:
    """The error for a model that is not there."""
    return NotFound(f"there is no model {model!r}", field="model")


def not_deployed(model: str) -> NotFound:
    """The error for a model that nothing serves."""
    return NotFound(f"{model} is not deployed", field="model")
