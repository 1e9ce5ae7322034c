"""Looks at placebos, beside the looks that decide and at a pace of their own."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Self

import duckdb
import structlog
from headrace.v1.trials_pb2 import Trial
from sqlalchemy.ext.asyncio import AsyncEngine

from services.analytics import placebo_queries, placebo_store, trial_values
from services.analytics.lease import LEASE_WAIT_S, Lease
from services.analytics.metrics import Metrics
from services.analytics.pace import Open, Pace
from services.analytics.placebo import ALPHA, Crossings, crossings
from services.analytics.placebo_store import Placebo
from services.analytics.reading import Reader
from services.analytics.statistics.proportions import wilson
from services.analytics.trials import Trials
from services.common.clock import Clock
from services.common.db import transaction
from services.common.errors import HeadraceError, NotFound
from services.common.tasks import ended

log = structlog.get_logger(__name__)

_PERIOD_S = 10.0
#: A placebo of a model without trials lasts a day.
_DAY = "day:"
_KEPT = timedelta(days=90)


@dataclass(frozen=True, slots=True)
class _Control:
    """Whose halves are compared: a trial's control, or everybody whom the model answered on one day."""

    model: str
    name: str
    trial: Trial | None
    since_us: int


class Placebos:
    """Keeps which salts ever crossed, per trial, and per day for models without a trial. Of several replicas
    one looks. A flag once set stays, so a look that is repeated changes nothing but the count of looks."""

    def __init__(
        self,
        trials: Trials,
        reader: Reader,
        engine: AsyncEngine,
        clock: Clock,
        metrics: Metrics,
        share: float,
    ) -> None:
        """`share` of one core's time, at most, goes into these looks."""
        self._trials = trials
        self._reader = reader
        self._engine = engine
        self._clock = clock
        self._metrics = metrics
        self._pace = Pace(share)
        self._lease = Lease(engine, clock, "placebos")
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="placebos")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            await ended(self._task)
            await self._lease.give_back()

    async def of(self, model: str) -> dict[str, Any] | None:
        """What the placebos of a model say; None where there is none yet."""
        found = await self.all(model)
        return found[0] if found else None

    async def all(self, model: str | None = None) -> list[dict[str, Any]]:
        """By model: `false_positive_rate` of the deciding method with its 95% interval, that of a
        fixed-horizon test looked at as often, and what they rest on."""
        async with transaction(self._engine) as session:
            kept = await placebo_store.placebos(session, model)
        return [_shown(name, [one for one in kept if one.model == name]) for name in _models(kept)]

    async def _run(self) -> None:
        while True:
            wait_s = LEASE_WAIT_S
            if await self._lease.held():
                wait_s = await self._turn()
            await asyncio.sleep(wait_s)

    async def _turn(self) -> float:
        try:
            controls = {f"{one.model}/{one.name}": one for one in await self._controls()}
        except HeadraceError as error:
            log.info("placebos_later", reason=error.message)
            return _PERIOD_S
        except Exception:
            log.exception("placebos_failed")
            return _PERIOD_S
        self._pace.keep(dict.fromkeys(controls, Open(0, running=True)))
        name, wait_s = self._pace.next(self._clock.monotonic())
        if name is None:
            return max(0.1, wait_s)
        began = self._clock.monotonic()
        try:
            await self._look(controls[name])
        except HeadraceError as error:
            log.info("placebo_later", placebo=name, reason=error.message)
            self._pace.failed(name, self._clock.monotonic(), self._clock.monotonic() - began)
        except Exception:
            log.exception("placebo_failed", placebo=name)
            self._pace.failed(name, self._clock.monotonic(), self._clock.monotonic() - began)
        else:
            self._pace.looked(name, self._clock.monotonic(), self._clock.monotonic() - began)
        return 0.0

    async def _controls(self) -> list[_Control]:
        now = self._clock.now()
        day = datetime(now.year, now.month, now.day, tzinfo=UTC)
        running = [trial for trial in self._trials.open() if not trial.stopped_at_us]
        async with transaction(self._engine) as session:
            served = await placebo_store.served_since(session, round(day.timestamp() * 1e6))
            await placebo_store.forget(session, now - _KEPT)
        tried = {trial.model for trial in running}
        return [_Control(trial.model, trial.trial_id, trial, trial.started_at_us) for trial in running] + [
            _Control(model, f"{_DAY}{day:%Y-%m-%d}", None, round(day.timestamp() * 1e6))
            for model in served
            if model not in tried
        ]

    async def _look(self, control: _Control) -> None:
        def ask(connection: duckdb.DuckDBPyConnection) -> tuple[int, Crossings]:
            if control.trial is not None:
                units = placebo_queries.of_trial(connection, control.trial)
            else:
                units = placebo_queries.of_everybody(connection, control.since_us)
            return units.units.size, crossings(units)

        metric = placebo_queries.mean_metric(control.trial) if control.trial else placebo_queries.LATENCY
        wanted = trial_values.outcome_names([metric.name])
        try:
            units, found = await self._reader.ask(
                control.model,
                ask,
                metric=wanted[0] if wanted else None,
                outcomes=bool(wanted),
                since_us=control.since_us,
            )
        except NotFound:
            return
        async with transaction(self._engine) as session:
            await placebo_store.add_look(
                session, control.model, control.name, units, found, self._clock.now()
            )
            kept = await placebo_store.placebos(session, control.model)
        for name in _models(kept):
            self._metrics.placebo_rate.labels(name).set(_shown(name, kept)["false_positive_rate"] or 0.0)


def _models(kept: list[Placebo]) -> list[str]:
    return sorted({one.model for one in kept})


def _shown(model: str, kept: list[Placebo]) -> dict[str, Any]:
    salts, crossed = sum(one.salts for one in kept), sum(one.crossed for one in kept)
    return {
        "model": model,
        "alpha": ALPHA,
        "comparisons": salts,
        "false_positives": crossed,
        "false_positive_rate": crossed / salts if salts else None,
        "interval": list(wilson(crossed, salts)) if salts else None,
        "naive_false_positive_rate": sum(one.naive for one in kept) / salts if salts else None,
        "looks": sum(one.looks for one in kept),
        "placebos": [
            {
                "of": one.name.removeprefix(_DAY),
                "units": one.units,
                "looks": one.looks,
                "comparisons": one.salts,
                "false_positives": one.crossed,
                "naive_false_positives": one.naive,
                "looked_at": one.looked_at.isoformat(),
            }
            for one in kept
        ],
    }
