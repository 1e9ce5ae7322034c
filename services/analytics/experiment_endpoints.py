"""Results, plans and off-policy estimates, behind the gateway's door."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated

import duckdb
from fastapi import APIRouter, Query
from headrace.v1.trials_pb2 import Trial, Verdict

from services.analytics import off_policy, trial_queries, trial_values
from services.analytics.arm_results import Bounds, Json, Options, Seen
from services.analytics.experiment_schemas import AssignmentIn, OffPolicyIn, PlanIn
from services.analytics.looking import Looking, observe
from services.analytics.novelty import tenure
from services.analytics.off_policy import Estimates, Log
from services.analytics.planning import plan
from services.analytics.reading import Reader
from services.analytics.results import not_started, results
from services.analytics.schemas import period_json, unix_us
from services.analytics.shadow_totals import ShadowTotals
from services.analytics.trial_queries import Counts
from services.analytics.trial_strata import TrialQuestion
from services.analytics.trials import Trials
from services.analytics.verdicts import nothing_observed
from services.common.assignment import unit_digest
from services.common.clock import Clock
from services.common.errors import InvalidArgument, NotFound
from services.common.ids import parse_id

#: What the A/A arm of a model has shown; None where there is none.
Placebo = Callable[[str], Awaitable[Json | None]]

_USUAL_US = 30 * 86_400 * 1_000_000
_BUILT_IN = {"error_rate": None, "latency_ms": None, "accuracy": "label"}
_SLACK = 1e-6


def experiment_routes(
    trials: Trials, looking: Looking, reader: Reader, clock: Clock, placebo: Placebo | None = None
) -> APIRouter:
    """Under /v1/experiments and /v1/rollouts, beside what the registry answers there."""
    router = APIRouter(prefix="/v1", tags=["experiments"])

    async def shown(trial_id: str, kind: Trial.Kind, options: Options) -> Json:
        trial = trials.get(trial_id)
        if trial is None or trial.kind != kind:
            raise NotFound(
                f"Nothing has been heard of {trial_id}: it does not exist, or was made a moment ago.",
                field="id",
            )
        if not trial.started_at_us:
            return await asyncio.to_thread(results, not_started(trial, clock.unix_us()), options)
        verdict = looking.last(trial_id) or await looking.judge(trial)
        shown_beside = await placebo(trial.model) if placebo is not None else None
        return await _results(trial, verdict, reader, clock, options, shown_beside)

    @router.get("/experiments/{trial_id}/results")
    async def show_experiment(
        trial_id: str,
        bounds: Bounds | None = None,
        looks: Annotated[int, Query(ge=1, le=50)] = 5,
    ) -> Json:
        """Every number of an experiment so far, the verdict, and one paragraph. `bounds` asks for
        group-sequential ones with that many even looks."""
        return await shown(trial_id, Trial.KIND_EXPERIMENT, Options(bounds, looks))

    @router.get("/rollouts/{trial_id}/results")
    async def show_rollout(
        trial_id: str,
        bounds: Bounds | None = None,
        looks: Annotated[int, Query(ge=1, le=50)] = 5,
    ) -> Json:
        """The same of a rollout: the new version against the one that served."""
        return await shown(trial_id, Trial.KIND_ROLLOUT, Options(bounds, looks))

    @router.post("/experiments/plan")
    async def make_plan(body: PlanIn) -> Json:
        """How many units an experiment needs, looked at once or whenever one wants, and how long that takes;
        or, with units_per_variant, the least effect it finds."""
        return await asyncio.to_thread(plan, body.question())

    @router.post("/experiments/off-policy")
    async def evaluate_policy(body: OffPolicyIn) -> Json:
        """What a policy would have earned on logged requests: IPS, SNIPS and doubly robust, with
        intervals."""
        body.policy.check()
        since_us, until_us = _period(body, clock)

        def question(connection: duckdb.DuckDBPyConnection) -> Log:
            return off_policy.logged_requests(connection, body.metric, body.experiment_id or "")

        log = await reader.ask(
            body.model,
            question,
            metric=_BUILT_IN.get(body.metric, body.metric),
            outcomes=body.metric not in ("error_rate", "latency_ms"),
            since_us=since_us,
            until_us=until_us,
        )
        found, uncovered = await asyncio.to_thread(_evaluated, log, body)
        answer = off_policy.off_policy_json(body.model, body.metric, found, uncovered)
        return answer | period_json(since_us, until_us)

    return router


async def _results(
    trial: Trial, verdict: Verdict, reader: Reader, clock: Clock, options: Options, placebo: Json | None
) -> Json:
    question = TrialQuestion.of(trial)
    wanted = trial_values.outcome_names([metric.name for metric in trial.metrics])
    before_s = max((metric.pre_period_s for metric in trial.metrics if metric.covariate), default=0)
    now_us = clock.unix_us()
    metrics = {metric.name: metric for metric in trial.metrics if not metric.quantile}

    def ask(connection: duckdb.DuckDBPyConnection) -> Seen:
        observed, counts = observe(connection, trial, question, ShadowTotals())
        latency = next((one for one in trial.metrics if one.name == "latency_ms"), None)
        latencies = trial_queries.histograms(connection, latency) if latency is not None else {}
        ran_us = (trial.stopped_at_us or now_us) - trial.started_at_us
        tenures = {name: tenure(connection, metrics[name], ran_us) for name in observed.cells}
        return Seen(trial, verdict, observed, counts, now_us, latencies, placebo, tenures)

    try:
        seen = await reader.ask(
            trial.model,
            ask,
            metric=wanted[0] if len(wanted) == 1 else None,
            outcomes=bool(wanted),
            since_us=trial.started_at_us - before_s * 1_000_000,
            until_us=trial.stopped_at_us or None,
        )
    except NotFound:
        none = [Counts(0, 0, 0, 0)] * len(trial.arms)
        seen = Seen(trial, verdict, nothing_observed(trial, ShadowTotals()), none, now_us, {}, placebo)
    return await asyncio.to_thread(results, seen, options)


def _evaluated(log: Log, body: OffPolicyIn) -> tuple[Estimates, int]:
    policy = body.policy
    if policy.weights is not None:
        return off_policy.evaluate(log, off_policy.same_for_all(log, policy.weights), alpha=body.alpha), 0
    units, requests = _chances(policy.assignments or [])
    covered, probabilities, uncovered = off_policy.by_unit(log, units, requests)
    if not covered.units.size and log.units.size:
        raise InvalidArgument(
            "None of the assignments is of a unit or request in the log.", field="policy.assignments"
        )
    return off_policy.evaluate(covered, probabilities, alpha=body.alpha), uncovered


def _chances(
    assignments: list[AssignmentIn],
) -> tuple[Mapping[int, Mapping[str, float]], Mapping[bytes, Mapping[str, float]]]:
    """By hash of the unit and by request id. Raises InvalidArgument naming the entry that is wrong."""
    units: dict[int, dict[str, float]] = defaultdict(dict)
    requests: dict[bytes, dict[str, float]] = defaultdict(dict)
    for place, one in enumerate(assignments):
        field = f"policy.assignments[{place}]"
        if (one.unit is None) == (one.request_id is None):
            raise InvalidArgument("An assignment is of either a unit or a request.", field=field)
        if one.unit is not None:
            chances = units[int.from_bytes(unit_digest(one.unit.encode()), "little")]
        else:
            chances = requests[parse_id(one.request_id or "")]
        chances[one.variant] = chances.get(one.variant, 0.0) + one.probability
        if sum(chances.values()) > 1 + _SLACK:
            raise InvalidArgument("Probabilities of one unit or request add up to more than 1.", field=field)
    return units, requests


def _period(body: OffPolicyIn, clock: Clock) -> tuple[int, int | None]:
    until_us = None if body.until is None else unix_us(body.until)
    if body.since is not None:
        return unix_us(body.since), until_us
    return (clock.unix_us() if until_us is None else until_us) - _USUAL_US, until_us
