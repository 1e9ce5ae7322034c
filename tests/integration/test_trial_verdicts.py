"""Trials in, predictions in, verdicts out: analytics on a real PostgreSQL and a real broker."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
from headrace.v1.control_pb2 import ServedVersion, ServingConfig
from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import Code, Signature
from headrace.v1.trials_pb2 import Evidence, Trial, TrialArm, TrialMetric, Verdict
from sqlalchemy import select

from deploy.embedded.tansu import TansuServer
from services.analytics.app import SCHEMA, analytics_app
from services.analytics.settings import Settings
from services.analytics.tables import MaximumRow
from services.common.bus.admin import ensure_topics
from services.common.bus.kafka import KafkaBus
from services.common.bus.port import Record
from services.common.clock import SystemClock
from services.common.db import engine, transaction
from services.common.topics import DEPLOYMENTS, OUTCOMES, PREDICTIONS, TRIALS, VERDICTS, all_topics
from tests.fixtures.prediction_log import START_US, outcome, outcome_batch, prediction_batch
from tests.fixtures.waiting import eventually, eventually_of

ERRORS = TrialMetric(
    name="error_rate",
    role=TrialMetric.ROLE_GUARDRAIL,
    direction=TrialMetric.DIRECTION_DECREASE,
    margin=0.01,
)
REVENUE = TrialMetric(
    name="revenue",
    role=TrialMetric.ROLE_SUCCESS,
    direction=TrialMetric.DIRECTION_INCREASE,
    missing_is_zero=True,
)


def rollout(revision: int, canary: int) -> Trial:
    return Trial(
        trial_id="rol_1",
        kind=Trial.KIND_ROLLOUT,
        model="cancer",
        revision=revision,
        arms=[
            TrialArm(name="1", version="1", weight=10_000 - canary),
            TrialArm(name="2", version="2", weight=canary),
        ],
        metrics=[ERRORS],
        alpha=0.05,
        started_at_us=START_US,
    )


def experiment() -> Trial:
    return Trial(
        trial_id="exp_1",
        kind=Trial.KIND_EXPERIMENT,
        model="digits",
        revision=1,
        arms=[
            TrialArm(name="control", version="1", weight=5_000),
            TrialArm(name="bold", version="1", weight=5_000),
        ],
        metrics=[ERRORS, REVENUE],
        alpha=0.05,
        started_at_us=START_US,
    )


class Published:
    """The newest verdict of each trial, as the broker has it."""

    def __init__(self) -> None:
        self.newest: dict[str, Verdict] = {}

    async def take(self, records: Sequence[Record]) -> None:
        for record in records:
            verdict = Verdict.FromString(record.value or b"")
            self.newest[verdict.trial_id] = verdict

    def evidence(self, trial_id: str, metric: str = "error_rate") -> Evidence:
        held = self.newest.get(trial_id, Verdict())
        return next((one for one in held.evidence if one.metric == metric), Evidence())

    def requests(self, trial_id: str) -> int:
        return sum(arm.requests for arm in self.newest.get(trial_id, Verdict()).arms)


@asynccontextmanager
async def running(database_url: str, bootstrap: str, folder: Path) -> AsyncIterator[None]:
    cfg = Settings(
        kafka_bootstrap_servers=bootstrap,
        internal_token="a-token-for-tests-only",
        database_url=database_url,
        artifact_store_url=f"file://{folder}/store",
        state_dir=folder / "state",
        http_port=0,
        analytics_keep_days=10_000,
        analytics_keep_outcomes_days=10_000,
        analytics_looks_share=1.0,
    )
    async with analytics_app(cfg, SystemClock()):
        yield


def traffic(
    numbers: range, share: float, rates: tuple[float, float], revision: int, seed: int
) -> list[PredictionBatch]:
    """Requests of a user each, by chance to version 2 with that share, failing at those rates."""
    rng = np.random.default_rng(seed)
    treated = rng.random(len(numbers)) < share
    failed = rng.random(len(numbers)) < np.where(treated, rates[1], rates[0])
    batches = []
    for version, arm in (("1", ~treated), ("2", treated)):
        chosen = [number for number, mine in zip(numbers, arm, strict=True) if mine]
        codes = [Code.CODE_INTERNAL if bad else Code.CODE_OK for bad in failed[arm]]
        chance = share if version == "2" else 1 - share
        batches.append(
            prediction_batch(
                chosen, version=version, propensities=chance, revisions=revision, codes=codes, payload=False
            )
        )
    return batches


def assigned(numbers: range, name: str) -> PredictionBatch:
    return prediction_batch(
        numbers,
        model="digits",
        variant=name,
        propensities=0.5,
        payload=False,
        experiment_ids=["exp_1"],
        experiments=[1] * len(numbers),
    )


def records(batches: Sequence[PredictionBatch]) -> list[Record]:
    return [
        Record(PREDICTIONS.name, f"{batch.model}/{batch.version}".encode(), batch.SerializeToString())
        for batch in batches
    ]


def trial_record(trial: Trial) -> Record:
    return Record(TRIALS.name, trial.trial_id.encode(), trial.SerializeToString())


def deployed(model: str) -> Record:
    versions = [ServedVersion(version=version, signature=Signature()) for version in "12"]
    config = ServingConfig(model=model, versions=versions)
    return Record(DEPLOYMENTS.name, model.encode(), config.SerializeToString())


async def test_verdicts_follow_what_is_logged_also_after_a_restart_and_late(
    database_url: str, new_tansu: Callable[[], TansuServer], tmp_path: Path
) -> None:
    bootstrap = new_tansu().url
    await ensure_topics(bootstrap, all_topics())
    published = Published()
    async with (
        KafkaBus(bootstrap, "test") as bus,
        bus.consume(VERDICTS, "registry", published.take),
    ):
        await bus.publish([deployed("cancer"), deployed("digits")])
        await bus.publish([trial_record(rollout(3, 1_000)), trial_record(experiment())])
        async with running(database_url, bootstrap, tmp_path):
            # Two versions that fail alike, and requests that nobody's dice sent to version 2.
            by_name = prediction_batch(range(90_000, 90_050), version="2", propensities=1.0, codes=13)
            await bus.publish(records([*traffic(range(2_000), 0.1, (0.02, 0.02), 3, 1), by_name]))
            await bus.publish(records([assigned(range(1_000), "control")]))
            await bus.publish(records([assigned(range(1_000, 2_000), "bold")]))
            await eventually(lambda: published.requests("rol_1") == 2_050, on=published.newest)
            await eventually(lambda: published.requests("exp_1") == 2_000, on=published.newest)
            alike = published.evidence("rol_1")
            assert alike.finding == Evidence.FINDING_UNDECIDED
            assert alike.units + alike.control_units == 2_000
            assert not published.newest["rol_1"].sample_ratio_mismatch
            assert published.evidence("exp_1", "revenue").finding == Evidence.FINDING_UNDECIDED

            # More weight, and version 2 breaks.
            await bus.publish([trial_record(rollout(4, 2_500))])
            await bus.publish(records(traffic(range(2_000, 2_200), 0.25, (0.02, 0.9), 4, 2)))
            await eventually(lambda: published.evidence("rol_1").finding == Evidence.FINDING_HARMFUL)
            held = published.newest["rol_1"]
            assert held.trial_revision == 4
            assert held.arms[1].requests_since < 200 < held.arms[1].requests
            assert "worse by more than 1.00 points" in held.summary
        found = published.evidence("rol_1").log_e_harm
        published.newest.clear()
        async with running(database_url, bootstrap, tmp_path):
            # A new process says the same, and counts outcomes that come late and twice.
            await eventually(lambda: published.requests("rol_1") == 2_250, on=published.newest)
            assert published.evidence("rol_1").finding == Evidence.FINDING_HARMFUL
            assert published.evidence("rol_1").log_e_harm >= found
            sold = [
                outcome(number, 1.0 + (number >= 1_000) * 2.0, metric="revenue", model="digits")
                for number in range(0, 2_000, 2)
            ]
            late = outcome_batch(*sold).SerializeToString()
            await bus.publish([Record(OUTCOMES.name, bytes(16), late)] * 2)
            await eventually(
                lambda: published.evidence("exp_1", "revenue").finding == Evidence.FINDING_BETTER,
                on=published.newest,
            )
            revenue = published.evidence("exp_1", "revenue")
            assert (revenue.control_mean, revenue.mean) == (0.5, 1.5)
            assert revenue.low < 1.0 < revenue.high

            # What ended for good leaves nothing behind.
            async def kept() -> set[str]:
                async with transaction(database) as session:
                    return set(await session.scalars(select(MaximumRow.trial_id)))

            database = engine(database_url, SCHEMA)
            try:
                assert await kept() == {"rol_1", "exp_1"}
                await bus.publish([Record(TRIALS.name, b"rol_1", None)])
                assert await eventually_of(kept, lambda found: "rol_1" not in found) == {"exp_1"}
            finally:
                await database.dispose()
