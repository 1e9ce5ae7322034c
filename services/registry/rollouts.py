"""Rollouts: from one version to the next, step by step. Every function runs in the caller's transaction,
which changes rollout, deployment, trial and the list of decisions together or not at all. What a rollout does
by itself is decided in rollout_steps.py and carried out here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from headrace.v1.control_pb2 import ServingConfig
from headrace.v1.events_pb2 import DriftAlert
from headrace.v1.trials_pb2 import Verdict

from services.common.clock import Clock
from services.common.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound
from services.common.ids import new_id
from services.registry import deployments, rollout_config, serving_config
from services.registry.repository import Repository
from services.registry.rollout_guard import check_unmasked, rollout_name
from services.registry.rollout_plan import Action, Alert, Cause, Facts, Status, Step
from services.registry.rollout_schemas import NewRolloutIn, check_rollout
from services.registry.rollout_state import evidence_of, rollout_of, spec_of, trial_of
from services.registry.rollout_steps import next_step
from services.registry.rollout_words import back, loading
from services.registry.schemas import storable
from services.registry.tables import RolloutEventRow, RolloutRow
from services.registry.trials import publish_trial
from services.registry.workers import Workers

#: Decisions kept of each rollout, and alerts of its model looked at (as many as are kept).
EVENTS_KEPT = 1000
_ALERTS = 100
#: Decisions to wait for workers.
_OF_WORKERS = (Cause.LOADING, Cause.WORKERS)
_ENDS = {
    Action.COMPLETE: Status.COMPLETED,
    Action.ROLL_BACK: Status.ROLLED_BACK,
    Action.ABORT: Status.ABORTED,
}


async def create_rollout(tx: Repository, wanted: NewRolloutIn, clock: Clock) -> RolloutRow:
    """Begin to bring `wanted.version` (a version or an alias) into service: workers load it, and the
    controller does the rest.

    Raises InvalidArgument naming a wrong field, NotFound for an unknown model or version, FailedPrecondition
    where the model is not deployed, several versions share its requests or a fallback hides failures, Aborted
    while another rollout of it is not finished.
    """
    check_rollout(wanted)
    if await tx.model(wanted.model, lock=True) is None:
        raise deployments.no_model(wanted.model)
    other = await tx.unfinished_rollout(wanted.model)
    if other is not None:
        raise Aborted(
            f"rollout {other.rollout_id} of {wanted.model} is not finished: await its end or abort it",
            field="model",
        )
    deployed = await tx.deployment(wanted.model)
    if deployed is None:
        raise FailedPrecondition(
            f"{wanted.model} is not deployed: a rollout needs a version in service", field="model"
        )
    config = ServingConfig.FromString(deployed.config)
    alias = await tx.alias(wanted.model, wanted.version)
    version = wanted.version if alias is None else alias.version
    previous = rollout_config.in_service(config)
    check_unmasked(config, version, "model")
    if previous == version:
        raise InvalidArgument(f"version {version!r} answers everything already", field="version")
    added = await deployments.held_versions(tx, wanted.model, config, [version])
    if any(step.shadow is not None or step.weight not in (0, 1) for step in wanted.all_steps()):
        brought = next(one for one in (*config.versions, *added) if one.version == version)
        serving_config.check_alike(config, brought, "version")
    # With every default filled in: what a running rollout does must not change with the program.
    usual = {"steps": wanted.all_steps(), "metrics": wanted.metrics_watched(), "version": version}
    resolved = wanted.model_copy(update=usual)
    now = clock.now()
    rollout_id = f"rol_{new_id()[:8].hex()}"
    revised = await deployments.revise(
        tx,
        wanted.model,
        "rollout",
        clock,
        lambda config: rollout_config.begin(config, added, version, rollout_id),
    )
    row = RolloutRow(
        rollout_id=rollout_id,
        model=wanted.model,
        version=version,
        previous_version=previous,
        status=Status.RUNNING,
        step=0,
        entered_at=None,
        clock_at=None,
        waiting_since=None,
        paused_at=None if wanted.start else now,
        promoted=False,
        revision=revised.config.revision,
        spec=resolved.model_dump(mode="json", exclude={"start"}),
        before=deployed.config,
        decided="",
        reason="",
        started_at=now,
        shadow_since=None,
        finished_at=None,
        closed_at=None,
    )
    tx.add(row)
    await tx.flush()
    reason = f"version {version} shall take over from version {previous} of {wanted.model}"
    await _note(tx, row, Step(Action.WAIT, Cause.STARTED, reason, 0), None, now)
    publish_trial(tx, trial_of(row))
    return row


async def get_rollout(tx: Repository, rollout_id: str) -> RolloutRow:
    """Raises NotFound."""
    row = await tx.rollout(rollout_id)
    if row is None:
        raise NotFound(f"there is no rollout {rollout_id!r}", field="rollout_id")
    return row


async def list_rollouts(
    tx: Repository, model: str | None, status: str | None, after: str, limit: int
) -> tuple[list[RolloutRow], str | None]:
    """A page by id, oldest first, and where the next one starts."""
    rows = list(await tx.rollouts(model, status, after, limit + 1))
    page = rows[:limit]
    return page, page[-1].rollout_id if len(rows) > limit else None


async def rollout_events(
    tx: Repository, rollout_id: str, before: int | None, limit: int
) -> tuple[list[RolloutEventRow], int | None]:
    """Decisions, newest first, and where the next page starts. Raises NotFound."""
    await get_rollout(tx, rollout_id)
    rows = list(await tx.rollout_events(rollout_id, before if before is not None else 1 << 62, limit + 1))
    page = rows[:limit]
    return page, page[-1].id if len(rows) > limit else None


async def pause(tx: Repository, rollout_id: str, why: str, clock: Clock) -> RolloutRow:
    """Let a rollout make no step forward; guardrails still take it back. Pausing twice changes nothing.
    Raises NotFound, FailedPrecondition for one that is finished."""
    row = await _unfinished(tx, rollout_id)
    if row.paused_at is None:
        row.paused_at = clock.now()
        await _note_person(tx, row, Action.HOLD, _with("paused by a person", why), clock)
    return row


async def resume(tx: Repository, rollout_id: str, why: str, clock: Clock) -> RolloutRow:
    """Go on with the time of the step that was left at the pause. Raises as `pause` does."""
    row = await _unfinished(tx, rollout_id)
    if row.paused_at is not None:
        now = clock.now()
        if row.clock_at is not None:
            row.clock_at += max(now - max(row.paused_at, row.clock_at), timedelta())
        row.paused_at = None
        await _note_person(tx, row, Action.WAIT, _with("resumed by a person", why), clock)
    return row


async def abort(tx: Repository, rollout_id: str, why: str, clock: Clock) -> RolloutRow:
    """End a rollout, the buckets as before. Raises as `pause` does."""
    row = await _unfinished(tx, rollout_id)
    reason = _with(f"aborted by a person; {back(rollout_of(row))}", why)
    await _go_back(tx, row, clock)
    await _finish(tx, row, Step(Action.ABORT, Cause.PERSON, reason, row.step), None, clock)
    return row


async def promote(tx: Repository, rollout_id: str, why: str, workers: Workers, clock: Clock) -> RolloutRow:
    """Leave the present step now, whatever it still waits for. A person may not overrule a guardrail that is
    proven harmful, nor move requests to workers that cannot answer them: FailedPrecondition. Raises as
    `pause` does."""
    row = await _unfinished(tx, rollout_id)
    facts = await facts_of(tx, row, workers)
    if row.entered_at is None:
        raise FailedPrecondition(
            f"its first step has not begun: {loading(rollout_of(row), facts.readiness)}", field="rollout_id"
        )
    row.promoted, row.paused_at = True, None
    step = next_step(rollout_of(row), facts, clock.now())
    if step.action not in {Action.ENTER, Action.COMPLETE}:
        raise FailedPrecondition(step.reason, field="rollout_id")
    explained = Step(step.action, step.cause, _with(step.reason, why), step.step, step.about)
    await carry_out(tx, row, explained, facts.verdict, clock)
    return row


async def facts_of(tx: Repository, row: RolloutRow, workers: Workers) -> Facts:
    """What is known now of a rollout."""
    deployed = await tx.deployment(row.model)
    config = ServingConfig() if deployed is None else ServingConfig.FromString(deployed.config)
    verdict = await tx.verdict(row.rollout_id)
    return Facts(
        served=None if deployed is None else {v.version: v.weight for v in config.versions},
        readiness=workers.readiness(config, row.version),
        verdict=None if verdict is None else Verdict.FromString(verdict.verdict),
        verdict_at=None if verdict is None else verdict.received_at,
        alerts=await _open_alerts(tx, row.model, row.version),
        waiting_since=row.waiting_since,
    )


async def carry_out(
    tx: Repository, row: RolloutRow, step: Step, verdict: Verdict | None, clock: Clock
) -> None:
    """Do what `step` says. The caller holds the model's lock, and decided from what it read under it."""
    match step.action:
        case Action.WAIT | Action.HOLD:
            await _note(tx, row, step, verdict, clock.now())
        case Action.RESTART_CLOCK:
            row.clock_at = clock.now()
            await _note(tx, row, step, verdict, clock.now())
        case Action.ENTER:
            await _enter(tx, row, step, verdict, clock)
        case Action.ROLL_BACK:
            await _go_back(tx, row, clock)
            await _finish(tx, row, step, verdict, clock)
        case Action.COMPLETE:
            await _hand_over(tx, row, clock)
            await _finish(tx, row, step, verdict, clock)
        case Action.ABORT:
            before = ServingConfig.FromString(row.before)
            await _leave(tx, row, lambda config: rollout_config.let_go(config, before, row.version), clock)
            await _finish(tx, row, step, verdict, clock)


def decision_key(row: RolloutRow, step: Step) -> str:
    """The same for decisions that say the same thing again, whatever their numbers."""
    return f"{row.status}/{step.step}/{step.action}/{step.cause}/{step.about}"


def waits_for_workers(row: RolloutRow) -> bool:
    """Whether that was the last decision."""
    return any(f"/{cause}/" in row.decided for cause in _OF_WORKERS)


def is_news(row: RolloutRow, step: Step) -> bool:
    """Whether `step` changes anything, or says something that was not said last."""
    return not step.changes_nothing or row.decided != decision_key(row, step)


async def _enter(tx: Repository, row: RolloutRow, step: Step, verdict: Verdict | None, clock: Clock) -> None:
    now = clock.now()
    row.step, row.entered_at, row.clock_at, row.promoted = step.step, now, now, False
    rollout, before = rollout_of(row), ServingConfig.FromString(row.before)
    row.status = Status.BAKING if rollout.at_full else Status.RUNNING
    row.shadow_since = now if rollout.planned.shadow else None
    asked = spec_of(row).all_steps()[row.step]
    revised = await deployments.revise(
        tx,
        row.model,
        "rollout",
        clock,
        lambda config: rollout_config.enter_step(config, before, rollout, asked),
        above=row.revision,
    )
    # A shadow step like the one before it changes no configuration, yet what is known of that one counts not.
    again = row.revision + 1 if rollout.planned.shadow else row.revision
    row.revision = max(revised.config.revision, again)
    await _note(tx, row, step, verdict, now)
    publish_trial(tx, trial_of(row))


async def _go_back(tx: Repository, row: RolloutRow, clock: Clock) -> None:
    before = ServingConfig.FromString(row.before)
    await _leave(tx, row, lambda config: rollout_config.restore(config, before, row.version), clock)


async def _hand_over(tx: Repository, row: RolloutRow, clock: Clock) -> None:
    # Whoever asks for an alias of the previous version must go on being answered.
    named = any(alias.version == row.previous_version for alias in await tx.aliases(row.model))
    keep = named or spec_of(row).keep_previous

    def edit(config: ServingConfig) -> None:
        rollout_config.hand_over(config, row.version, row.previous_version, keep_previous=keep)

    await _leave(tx, row, edit, clock)


async def _leave(
    tx: Repository, row: RolloutRow, edit: Callable[[ServingConfig], None], clock: Clock
) -> None:
    """Edit the deployment once more and take out of it what was there for this rollout only. Nothing happens
    where there is no deployment."""
    deployed = await tx.deployment(row.model)
    if deployed is None:
        row.revision += 1
        return
    needed = await deployments.needed_versions(tx, ServingConfig.FromString(deployed.config))
    others = [version for version, what in needed.items() if what != rollout_name(row)]

    def edit_and_release(config: ServingConfig) -> None:
        edit(config)
        serving_config.release(config, others)

    revised = await deployments.revise(tx, row.model, "rollout", clock, edit_and_release)
    row.revision = max(row.revision + 1, revised.config.revision)


async def _finish(tx: Repository, row: RolloutRow, step: Step, verdict: Verdict | None, clock: Clock) -> None:
    row.status, row.finished_at = _ENDS[step.action], clock.now()
    row.promoted, row.paused_at, row.shadow_since = False, None, None
    await _note(tx, row, step, verdict, clock.now())
    publish_trial(tx, trial_of(row))


async def _note(tx: Repository, row: RolloutRow, step: Step, verdict: Verdict | None, now: datetime) -> None:
    """Keep a decision once."""
    waited_since = row.waiting_since if waits_for_workers(row) else None
    row.waiting_since = (waited_since or now) if step.cause in _OF_WORKERS else None
    row.decided, row.reason = decision_key(row, step), step.reason
    going = row.status in {Status.RUNNING, Status.BAKING, Status.COMPLETED}
    tx.add(
        RolloutEventRow(
            rollout_id=row.rollout_id,
            at=now,
            action=step.action,
            cause=step.cause,
            status=row.status,
            step=step.step,
            weight=rollout_of(row).weight if going else 0,
            reason=step.reason,
            evidence=evidence_of(verdict),
        )
    )
    await tx.flush()
    await tx.prune_rollout_events(row.rollout_id, EVENTS_KEPT)


async def _note_person(tx: Repository, row: RolloutRow, action: Action, reason: str, clock: Clock) -> None:
    await _note(tx, row, Step(action, Cause.PERSON, reason, row.step), None, clock.now())


async def _unfinished(tx: Repository, rollout_id: str) -> RolloutRow:
    """The rollout, its model locked. Raises NotFound, FailedPrecondition."""
    row = await get_rollout(tx, rollout_id)
    await tx.model(row.model, lock=True)
    fresh = await tx.rollout(rollout_id, fresh=True)
    if fresh is None or fresh.finished_at is not None:
        ended = row.status.replace("_", " ")
        raise FailedPrecondition(f"rollout {rollout_id} is {ended} and stays so", field="rollout_id")
    return fresh


async def _open_alerts(tx: Repository, model: str, version: str) -> Sequence[Alert]:
    alerts: list[Alert] = []
    for row in await tx.alerts(model, _ALERTS):
        alert = DriftAlert.FromString(row.alert)
        if alert.version == version and not alert.resolved_at_us:
            critical = alert.severity == DriftAlert.SEVERITY_CRITICAL
            feature, message = storable(alert.feature), storable(alert.message)
            alerts.append(Alert(feature, critical, row.received_at, message))
    return alerts


def _with(reason: str, why: str) -> str:
    return f"{reason} ({why})" if why else reason
