"""Looks at every open trial as its data come, and says what they say."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from types import TracebackType
from typing import Self

import duckdb
import structlog
from headrace.v1.trials_pb2 import Trial, Verdict
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from services.analytics import shadows, trial_queries, trial_strata, trial_values
from services.analytics.evidence import Observed, metric_key
from services.analytics.late_firsts import KnownFirsts
from services.analytics.lease import LEASE_WAIT_S, Lease
from services.analytics.metrics import Metrics
from services.analytics.pace import Open, Pace
from services.analytics.reading import Reader
from services.analytics.shadow_evidence import SHADOW_METRICS
from services.analytics.shadow_totals import ShadowTotals
from services.analytics.trial_queries import Counts
from services.analytics.trial_store import forget_maxima, raise_maxima
from services.analytics.trial_strata import TrialQuestion
from services.analytics.trials import Trials
from services.analytics.verdicts import Look, look_at, nothing_observed, verdict
from services.common.bus.port import Bus, Record
from services.common.clock import Clock
from services.common.db import transaction
from services.common.errors import HeadraceError, NotFound
from services.common.ids import new_id
from services.common.tasks import ended
from services.common.topics import VERDICTS

log = structlog.get_logger(__name__)

#: A verdict that has not changed is said again after that time.
_SAY_AGAIN_S = 30.0
#: Short, since rollouts wait for whoever follows one that was killed; asked for at least every LEASE_WAIT_S.
_LEASE_S = 9.0
#: No trial that runs rests longer than this, whatever a look costs: rollouts wait for what is found.
_LONGEST_REST_S = 15.0


@dataclass(slots=True)
class _Said:
    """The last verdict that the broker took, and when."""

    verdict: Verdict
    at: float


class Looking:
    """Publishes a verdict of every open trial when it has changed, and every 30 s. One look at a time, at the
    pace of `Pace`; of several replicas one looks.

    Everything is read from the store at every look but the largest e-values, which are in the database before
    the verdict that rests on them is published: whatever is killed when, the next look says the same."""

    def __init__(
        self,
        trials: Trials,
        reader: Reader,
        engine: AsyncEngine,
        bus: Bus,
        clock: Clock,
        metrics: Metrics,
        share: float,
    ) -> None:
        """`share` of one core's time, at most, goes into looks."""
        self._trials = trials
        trials.watch(self.seen)
        self._reader = reader
        self._engine = engine
        self._bus = bus
        self._clock = clock
        self._metrics = metrics
        self._pace = Pace(share, _LONGEST_REST_S)
        self._wake = asyncio.Event()
        self._said: dict[str, _Said] = {}
        self._firsts: dict[str, KnownFirsts] = {}
        self._lease = Lease(engine, clock, "trials", _LEASE_S)
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="looking")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            await ended(self._task)
            await self._lease.give_back()

    def seen(self, model: str) -> None:
        """There is something new about a model (empty: about any)."""
        for trial in self._trials.open(model):
            self._pace.wake(trial.trial_id)
        self._wake.set()

    def last(self, trial_id: str) -> Verdict | None:
        """The newest verdict that this process has published."""
        said = self._said.get(trial_id)
        return said.verdict if said is not None else None

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            trials = {trial.trial_id: trial for trial in self._trials.open()}
            self._pace.keep(
                {
                    name: Open(trial.revision, running=not trial.stopped_at_us)
                    for name, trial in trials.items()
                }
            )
            self._said = {name: said for name, said in self._said.items() if self._trials.get(name)}
            self._firsts = {name: known for name, known in self._firsts.items() if name in trials}
            self._metrics.trials.set(len(trials))
            wait_s = LEASE_WAIT_S
            await self._forget()
            if not trials:
                wait_s = _SAY_AGAIN_S
            elif await self._lease.held():
                name, wait_s = self._pace.next(self._clock.monotonic())
                if name is not None:
                    await self._look(trials[name])
                    continue
                wait_s = min(wait_s, LEASE_WAIT_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
                    # What comes with it belongs to the same look, and one that is not due does not spin.
                    await asyncio.sleep(min(wait_s, 0.05))

    async def _forget(self) -> None:
        """Drop what is kept of trials that ended for good."""
        ended = set(self._trials.ended)
        if not ended:
            return
        try:
            async with transaction(self._engine) as session:
                await forget_maxima(session, ended)
        except (HeadraceError, SQLAlchemyError, OSError) as error:
            log.info("trials_forgotten_later", reason=str(error))
        else:
            self._trials.ended -= ended

    async def _look(self, trial: Trial) -> None:
        """One look at one trial; whatever fails is tried again later and holds up no other trial."""
        began, used = self._clock.monotonic(), time.process_time()
        try:
            await self._say(await self.judge(trial))
        except HeadraceError as error:
            log.info("trial_later", trial_id=trial.trial_id, reason=error.message)
            result = "later"
        except Exception:
            log.exception("trial_failed", trial_id=trial.trial_id)
            result = "failed"
        else:
            result = "ok"
        now = self._clock.monotonic()
        # On a busy machine a look waits more than it works, and is no reason to look less often.
        took = min(now - began, time.process_time() - used)
        (self._pace.looked if result == "ok" else self._pace.failed)(trial.trial_id, now, took)
        self._metrics.looks.labels(result).inc()
        self._metrics.look_seconds.observe(now - began)

    async def judge(self, trial: Trial) -> Verdict:
        """Look now, whoever's turn it is; what was seen counts as a look, and is not published."""
        look = await self._observe(trial)
        async with transaction(self._engine) as session:
            largest, split = await raise_maxima(session, trial.trial_id, look.evidence, look.ratio_log_e)
        return verdict(trial, look, largest, split, verdict_id=new_id(), now_us=self._clock.unix_us())

    async def _observe(self, trial: Trial) -> Look:
        totals = await self._shadows(trial)
        question = TrialQuestion.of(trial)
        until_us = self._clock.unix_us()
        wanted = trial_values.outcome_names([metric.name for metric in trial.metrics])
        before_s = max((metric.pre_period_s for metric in trial.metrics if metric.covariate), default=0)

        def ask(connection: duckdb.DuckDBPyConnection) -> Look:
            observed, counts = observe(connection, trial, question, totals)
            known = KnownFirsts.at(
                until_us, partial(trial_queries.known_firsts, connection), self._firsts.get(trial.trial_id)
            )
            self._firsts[trial.trial_id] = known
            look = look_at(trial, observed, counts, until_us)
            return replace(look, warnings=[*look.warnings, known.warning]) if known.warning else look

        try:
            return await self._reader.ask(
                trial.model,
                ask,
                metric=wanted[0] if len(wanted) == 1 else None,
                outcomes=bool(wanted),
                since_us=trial.started_at_us - before_s * 1_000_000,
                until_us=trial.stopped_at_us or None,
            )
        except NotFound:
            none = [Counts(0, 0, 0, 0)] * len(trial.arms)
            return look_at(trial, nothing_observed(trial, totals), none, until_us)

    async def _shadows(self, trial: Trial) -> ShadowTotals:
        """Whole hours: the one in which the shadow began, too."""
        if not trial.shadow_version or all(one.name not in SHADOW_METRICS for one in trial.metrics):
            return ShadowTotals()
        since = datetime.fromtimestamp((trial.shadow_since_us or trial.started_at_us) / 1e6, UTC)
        pair = (trial.arms[0].version, trial.shadow_version)
        found = await shadows.totals_of(self._engine, trial.model, *pair, since, None)
        return found.get(pair, ShadowTotals())

    async def _say(self, made: Verdict) -> None:
        said, now = self._said.get(made.trial_id), self._clock.monotonic()
        if said is not None and now - said.at < _SAY_AGAIN_S and _same(said.verdict, made):
            return
        key = made.trial_id.encode()
        await self._bus.publish([Record(VERDICTS.name, key, made.SerializeToString())])
        self._said[made.trial_id] = _Said(made, now)


def observe(
    connection: duckdb.DuckDBPyConnection, trial: Trial, question: TrialQuestion, totals: ShadowTotals
) -> tuple[Observed, list[Counts]]:
    """Everything that the trial's evidence needs, from a snapshot. Blocks."""
    strata = trial_strata.open_trial(connection, question)
    visits = trial_queries.visits(connection, strata)
    cells, histograms, bounded = {}, {}, {}
    for metric in trial.metrics:
        if metric.name in SHADOW_METRICS:
            continue
        if metric.quantile:
            histograms[metric_key(metric)] = trial_queries.histograms(connection, metric)
        else:
            cells[metric.name] = trial_queries.cells(connection, metric)
        if trial_values.is_bounded(metric):
            bounded[metric.name] = trial_queries.bounded(connection, metric, strata)
    observed = Observed(strata, visits, cells, histograms, totals, bounded)
    return observed, trial_queries.counts(connection, question)


def _same(one: Verdict, other: Verdict) -> bool:
    """Whether both say the same, whenever they were computed."""
    bare = []
    for made in (one, other):
        copy = Verdict()
        copy.CopyFrom(made)
        copy.ClearField("verdict_id")
        copy.ClearField("computed_at_us")
        copy.ClearField("until_us")
        bare.append(copy.SerializeToString(deterministic=True))
    return bare[0] == bare[1]
