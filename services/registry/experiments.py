"""Experiments: made, changed, started, stopped. Every function runs in the caller's transaction, which
changes experiment, deployment, trial and history together or not at all. What an experiment does by itself
is decided in experiment_steps.py and carried out here."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from headrace.v1.control_pb2 import ServingConfig
from headrace.v1.trials_pb2 import Verdict

from services.common.assignment import BUCKETS
from services.common.clock import Clock
from services.common.errors import FailedPrecondition, InvalidArgument, NotFound
from services.common.ids import new_id
from services.registry import deployments
from services.registry.experiment_running import Readiness, begin, end, reconfigure
from services.registry.experiment_schemas import (
    ExperimentIn,
    ExperimentPatch,
    HoldoutIn,
    NewExperimentIn,
    StopIn,
    VariantIn,
    check_experiment,
)
from services.registry.experiment_state import spec_of, stored
from services.registry.layers import split
from services.registry.repository import Repository
from services.registry.schemas import checked
from services.registry.tables import ExperimentEventRow, ExperimentRow
from services.registry.trial_schemas import ten_thousandths
from services.registry.trials import end_trial, experiment_trial, publish_trial

#: Changes of weight kept in the history of an experiment: a bandit makes one every second if told to.
REWEIGHTINGS_KEPT = 1000
#: What may change while units are in it: anything else would make another experiment of it.
_WHILE_RUNNING = frozenset(
    {"name", "description", "traffic", "variants", "overrides", "stop_at", "auto_stop", "planned_units"}
)


async def create(tx: Repository, wanted: NewExperimentIn, clock: Clock, ready: Readiness) -> ExperimentRow:
    """A draft, or with `start` what `start` makes of it. Raises InvalidArgument naming a wrong field,
    NotFound for an unknown model, and what `start` raises."""
    if await tx.model(wanted.model, lock=True) is None:
        raise deployments.no_model(wanted.model)
    spec = await _checked_spec(tx, wanted, clock)
    row = ExperimentRow(
        experiment_id=f"exp_{new_id()[:8].hex()}",
        model=wanted.model,
        status="draft",
        revision=1,
        spec=stored(spec),
        layer=[],
        buckets=split([], spec.weights()),
        waiting_for="",
        created_at=clock.now(),
        started_at=None,
        weighted_at=None,
        stopped_at=None,
        stopped_because="",
        closed_at=None,
    )
    tx.add(row)
    await tx.flush()
    note(tx, row, clock, "created", "it was made")
    if wanted.start:
        return await start(tx, row.experiment_id, clock, ready)
    # Of a draft analytics shows the plan.
    publish_trial(tx, experiment_trial(row))
    return row


async def change(tx: Repository, experiment_id: str, patch: ExperimentPatch, clock: Clock) -> ExperimentRow:
    """A draft changes as a whole; what runs changes its weights, traffic, overrides, times and texts.

    Raises NotFound, InvalidArgument naming a wrong field, FailedPrecondition naming one that cannot change
    now or traffic that is not free.
    """
    row = await locked(tx, experiment_id)
    changes = patch.model_dump(mode="json", exclude_unset=True)
    if row.status == "stopped":
        raise FailedPrecondition(f"{experiment_id} has stopped", field="experiment_id")
    before = spec_of(row)
    if row.status == "running" or row.waiting_for:
        _check_running_change(before, patch, changes)
    spec = await _checked_spec(tx, checked(ExperimentIn, {**row.spec, **changes}), clock, before)
    if spec == before:
        return row
    same_variants = [variant.name for variant in spec.variants] == [v.name for v in before.variants]
    buckets = split(row.buckets if same_variants else [], spec.weights())
    moved = buckets != row.buckets
    row.spec, row.buckets = stored(spec), buckets
    row.revision += 1
    if moved and row.status == "running":
        row.weighted_at = clock.now()
    note(tx, row, clock, "changed", f"{', '.join(sorted(changes))} changed", changes)
    if row.status == "running":
        await reconfigure(tx, row, clock)
    else:
        publish_trial(tx, experiment_trial(row))
    return row


async def start(tx: Repository, experiment_id: str, clock: Clock, ready: Readiness) -> ExperimentRow:
    """Let it run: at once, at its `start_at`, or as soon as workers have loaded what it brings. Again is
    fine.

    Raises NotFound; FailedPrecondition where it has stopped, its model is not deployed, or its traffic is not
    free.
    """
    row = await locked(tx, experiment_id)
    if row.status == "stopped":
        raise FailedPrecondition(
            f"{experiment_id} has stopped and does not run again; make another one", field="experiment_id"
        )
    if row.status != "draft":
        return row
    spec = spec_of(row)
    now = clock.now()
    if spec.stop_at is not None and spec.stop_at <= now:
        raise FailedPrecondition("stop_at has passed already", field="stop_at")
    row.status = "scheduled"
    row.revision += 1
    if spec.start_at is not None and spec.start_at > now:
        publish_trial(tx, experiment_trial(row))
        note(tx, row, clock, "scheduled", f"it starts at {spec.start_at.isoformat()}")
        return row
    waiting = await begin(tx, row, clock, ready)
    if waiting:
        publish_trial(tx, experiment_trial(row))
        row.waiting_for = waiting
        note(tx, row, clock, "scheduled", f"it starts as soon as it can: {waiting}")
    else:
        note(tx, row, clock, "started", "it was started")
    return row


async def start_scheduled(
    tx: Repository, row: ExperimentRow, reason: str, clock: Clock, ready: Readiness
) -> bool:
    """Let one that is due run, or note once what it waits for. The caller holds the locks."""
    try:
        waiting = await begin(tx, row, clock, ready)
    except (FailedPrecondition, InvalidArgument, NotFound) as error:
        waiting = error.message
    if waiting:
        if waiting != row.waiting_for:
            row.waiting_for = waiting
            note(tx, row, clock, "waiting", f"it is due and waits: {waiting}")
        return False
    row.waiting_for = ""
    note(tx, row, clock, "started", reason)
    return True


async def stop(tx: Repository, experiment_id: str, wanted: StopIn, clock: Clock) -> ExperimentRow:
    """End it: from the next record on routers treat its units like all others. With `winner`, the
    deployment's traffic goes to that variant's version in the same revision. Again is fine.

    Raises NotFound, InvalidArgument for an unknown winner, FailedPrecondition for a draft and for a winner of
    what does not run.
    """
    row = await locked(tx, experiment_id)
    if row.status == "draft":
        raise FailedPrecondition(f"{experiment_id} was not started; delete it", field="experiment_id")
    winner = _version_of(row, wanted.winner) if wanted.winner is not None else None
    if winner is not None and row.status != "running":
        raise FailedPrecondition(
            f"{experiment_id} does not run, so nothing can win; deploy the version", field="winner"
        )
    if row.status == "stopped":
        return row
    reason = wanted.reason or "it was stopped by hand"
    if winner is not None:
        await _check_no_rollout(tx, row.model)
        reason = f"{reason}; variant {wanted.winner} (version {winner}) gets all traffic"
    await finish(tx, row, reason, clock, winner=winner)
    return row


async def finish(
    tx: Repository,
    row: ExperimentRow,
    reason: str,
    clock: Clock,
    *,
    winner: str | None = None,
    verdict: Verdict | None = None,
) -> None:
    """Stop what runs or is scheduled. The caller holds the locks."""
    now = clock.now()
    ran = row.status == "running"
    row.status, row.stopped_at, row.stopped_because, row.waiting_for = "stopped", now, reason, ""
    row.revision += 1
    if not ran:
        row.closed_at = now  # there is nothing to count
    await end(tx, row, clock, winner)
    detail = {} if verdict is None else {"verdict": verdict.summary, "until_us": verdict.until_us}
    note(tx, row, clock, "stopped", reason, detail)


async def reweight(
    tx: Repository, row: ExperimentRow, weights: Sequence[int], reason: str, clock: Clock
) -> None:
    """Give the variants other weights, in 1/10,000. The caller holds the locks."""
    spec = spec_of(row)
    variants = tuple(
        VariantIn(name=variant.name, version=variant.version, weight=Decimal(weight) / BUCKETS)
        for variant, weight in zip(spec.variants, weights, strict=True)
    )
    row.spec = stored(spec.model_copy(update={"variants": variants}))
    row.buckets = split(row.buckets, weights)
    row.weighted_at = clock.now()
    row.revision += 1
    note(tx, row, clock, "reweighted", reason, {"weights": [weight / BUCKETS for weight in weights]})
    await tx.flush()
    await tx.prune_reweightings(row.experiment_id, REWEIGHTINGS_KEPT)
    await reconfigure(tx, row, clock)


async def delete(tx: Repository, experiment_id: str) -> None:
    """Forget a draft. Raises NotFound, FailedPrecondition for one that was started."""
    row = await locked(tx, experiment_id)
    if row.status != "draft":
        raise FailedPrecondition(
            f"{experiment_id} was started; what was found with it stays", field="experiment_id"
        )
    await tx.delete_experiment(experiment_id)
    end_trial(tx, experiment_id)


async def get(tx: Repository, experiment_id: str) -> ExperimentRow:
    """Raises NotFound."""
    row = await tx.experiment(experiment_id)
    if row is None:
        raise NotFound(f"there is no experiment {experiment_id!r}", field="experiment_id")
    return row


async def page(
    tx: Repository, model: str | None, status: str | None, after: str, limit: int
) -> tuple[Sequence[ExperimentRow], str | None]:
    """A page by id, oldest first, and where the next one starts."""
    rows = await tx.experiments(model, [status] if status else [], after, limit + 1)
    return rows[:limit], rows[limit - 1].experiment_id if len(rows) > limit else None


async def history(
    tx: Repository, experiment_id: str, before: int | None, limit: int
) -> tuple[Sequence[ExperimentEventRow], int | None]:
    """What happened, newest first, and where the next page starts. Raises NotFound."""
    await get(tx, experiment_id)
    rows = await tx.experiment_events(experiment_id, before if before is not None else 1 << 62, limit + 1)
    return rows[:limit], rows[limit - 1].id if len(rows) > limit else None


async def set_holdout(tx: Repository, model: str, wanted: HoldoutIn, clock: Clock) -> Decimal:
    """Keep a share of the units of `model` out of every experiment; the same units as long as it does not
    shrink. Raises NotFound."""
    row = await tx.model(model, lock=True)
    if row is None:
        raise deployments.no_model(model)
    row.holdout = ten_thousandths(wanted.share)

    def edit(config: ServingConfig) -> None:
        config.holdout = ten_thousandths(wanted.share)

    if await tx.deployment(model) is not None:
        await deployments.revise(tx, model, "holdout", clock, edit)
    return Decimal(row.holdout) / BUCKETS


async def get_holdout(tx: Repository, model: str) -> Decimal:
    """Raises NotFound."""
    row = await tx.model(model)
    if row is None:
        raise deployments.no_model(model)
    return Decimal(row.holdout) / BUCKETS


async def locked(tx: Repository, experiment_id: str) -> ExperimentRow:
    """The experiment with its model's lock, which everybody takes first. Raises NotFound."""
    row = await get(tx, experiment_id)
    await tx.model(row.model, lock=True)
    again = await tx.experiment(experiment_id, lock=True)
    if again is None:
        raise NotFound(f"there is no experiment {experiment_id!r}", field="experiment_id")
    return again


def note(
    tx: Repository,
    row: ExperimentRow,
    clock: Clock,
    kind: str,
    reason: str,
    detail: dict[str, Any] | None = None,
) -> None:
    """Add to the history."""
    tx.add(
        ExperimentEventRow(
            experiment_id=row.experiment_id, at=clock.now(), kind=kind, reason=reason, detail=detail or {}
        )
    )


async def _checked_spec(
    tx: Repository, wanted: ExperimentIn, clock: Clock, before: ExperimentIn | None = None
) -> ExperimentIn:
    """`wanted` with aliases resolved. Raises InvalidArgument naming the field that cannot be."""
    check_experiment(wanted)
    if wanted.salt is not None and wanted.salt.startswith(("layer:", "holdout:")):
        raise InvalidArgument("salts that begin so are those of layers and holdouts", field="salt")
    changed = before is None or before.stop_at != wanted.stop_at
    if changed and wanted.stop_at is not None and wanted.stop_at <= clock.now():
        raise InvalidArgument("stop_at has passed already", field="stop_at")
    aliases = {alias.alias: alias.version for alias in await tx.aliases(wanted.model)}
    variants = tuple(
        variant.model_copy(update={"version": aliases.get(variant.version, variant.version)})
        for variant in wanted.variants
    )
    known = {row.version for row in await tx.versions(wanted.model, [v.version for v in variants])}
    for index, variant in enumerate(variants):
        if variant.version not in known:
            raise InvalidArgument(
                f"{wanted.model} has no version {wanted.variants[index].version!r}",
                field=f"variants[{index}].version",
            )
    fields = {name: getattr(wanted, name) for name in ExperimentIn.model_fields}
    return ExperimentIn(**(fields | {"variants": variants}))


def _check_running_change(before: ExperimentIn, patch: ExperimentPatch, changes: dict[str, Any]) -> None:
    for name in changes:
        if name not in _WHILE_RUNNING:
            raise FailedPrecondition(f"{name} cannot change while the experiment runs", field=name)
    if patch.variants is None:
        return
    if before.bandit is not None:
        raise FailedPrecondition("its bandit sets the weights", field="variants")
    now = [(variant.name, variant.version) for variant in before.variants]
    if [(variant.name, variant.version) for variant in patch.variants] != now:
        names = ", ".join(f"{name} (version {version})" for name, version in now)
        raise FailedPrecondition(
            f"only the weights of {names} can change while the experiment runs", field="variants"
        )


def _version_of(row: ExperimentRow, variant: str) -> str:
    for known in spec_of(row).variants:
        if known.name == variant:
            return known.version
    raise InvalidArgument(f"{row.experiment_id} has no variant {variant!r}", field="winner")


async def _check_no_rollout(tx: Repository, model: str) -> None:
    rollout = await tx.unfinished_rollout(model)
    if rollout is not None:
        raise FailedPrecondition(
            f"rollout {rollout.rollout_id} moves the traffic of {model}; abort it first", field="winner"
        )
