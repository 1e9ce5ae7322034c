"""Results, plans and off-policy estimates over HTTP, from logged requests in memory."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import duckdb
import httpx
import numpy as np
import pyarrow as pa
import pytest
from fastapi import FastAPI
from headrace.v1.tensor_pb2 import Code
from headrace.v1.trials_pb2 import Trial, TrialArm, TrialMetric, Verdict

from services.analytics import queries
from services.analytics.columns import CORE, to_table
from services.analytics.experiment_endpoints import experiment_routes
from services.analytics.looking import observe
from services.analytics.queries import OUTCOMES, Snapshot
from services.analytics.shadow_totals import ShadowTotals
from services.analytics.trial_strata import TrialQuestion
from services.analytics.trials import Trials
from services.analytics.verdicts import look_at, verdict
from services.common.assignment import unit_digest
from services.common.clock import SystemClock
from services.common.problems import install_problem_handlers
from tests.fixtures.prediction_log import START_US, prediction_batch, request_id

N = 800
ID = "exp_0123456789abcdef"


def user_hash(number: int) -> int:
    return int.from_bytes(unit_digest(f"user-{number}".encode()), "little")


def logged() -> Snapshot:
    """Users of two variants, every other one of which bought; the second variant fails far less often."""
    rng = np.random.default_rng(1)
    arm = rng.integers(0, 2, N)
    failed = rng.random(N) < np.where(arm == 1, 0.05, 0.4)
    batches = []
    for place, name in enumerate(("control", "bold")):
        numbers = np.flatnonzero(arm == place).tolist()
        batches.append(
            prediction_batch(
                numbers,
                version=str(place + 1),
                variant=name,
                experiment_ids=[ID],
                experiments=[1] * len(numbers),
                unit_hashes=[user_hash(number) for number in numbers],
                codes=[Code.CODE_INTERNAL if failed[number] else Code.CODE_OK for number in numbers],
            )
        )
    bought = range(0, N, 2)
    outcomes = {
        "event_id": [bytes(number.to_bytes(16, "big")) for number in bought],
        "request_id": [request_id(number) for number in bought],
        "metric": ["revenue" for _ in bought],
        "number": [10.0 + number % 7 for number in bought],
        "text": [None for _ in bought],
        "row": [0 for _ in bought],
        "observed_at_us": [START_US for _ in bought],
    }
    return Snapshot(inbox=to_table(batches).select(CORE.names), outcomes=pa.table(outcomes, schema=OUTCOMES))


class MemoryReader:
    """Asks a snapshot in memory, as `Reader` asks the store's."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    async def ask(self, _model: str, question: Callable[[duckdb.DuckDBPyConnection], Any], **_: Any) -> Any:
        def run() -> Any:
            with queries.open_snapshot(self._snapshot) as connection:
                return question(connection)

        return await asyncio.to_thread(run)


class MemoryLooking:
    """Judges a trial from the same snapshot, without the maxima of earlier looks."""

    def __init__(self, reader: MemoryReader) -> None:
        self._reader = reader

    def last(self, _trial_id: str) -> Verdict | None:
        return None

    async def judge(self, trial: Trial) -> Verdict:
        def ask(connection: duckdb.DuckDBPyConnection) -> Verdict:
            observed, counts = observe(connection, trial, TrialQuestion.of(trial), ShadowTotals())
            look = look_at(trial, observed, counts, START_US + 10**9)
            return verdict(trial, look, {}, look.ratio_log_e, verdict_id=bytes(16), now_us=START_US + 10**9)

        made: Verdict = await self._reader.ask(trial.model, ask)
        return made


async def test_of_a_draft_the_plan_is_shown() -> None:
    """Without a look at any log: there is nothing to see of it."""
    draft = running()
    draft.started_at_us, draft.planned_units, draft.name = 0, 5_000, "bold buttons"
    trials = Trials()
    trials.apply(ID.encode(), draft.SerializeToString())
    assert trials.open() == []
    app = FastAPI()
    install_problem_handlers(app)
    app.include_router(experiment_routes(trials, None, None, SystemClock()))  # type: ignore[arg-type]  # not asked
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://a") as client:
        shown = (await client.get(f"/v1/experiments/{ID}/results")).json()
    assert (shown["status"], shown["started_at"], shown["until"]) == ("not started", None, None)
    assert shown["planned_units"] == 5_000
    assert [arm["requests"] for arm in shown["arms"]] == [0, 0]
    assert {metric["metric"]: metric["margin"] for metric in shown["metrics"]}["error_rate"] == 0.05
    assert shown["summary"].startswith("bold buttons: It is not started. The plan: bold")
    assert "5,000 units an arm" in shown["summary"]
    assert shown["warnings"] == []


def running(name: str = ID, kind: Trial.Kind = Trial.KIND_EXPERIMENT) -> Trial:
    def guardrail(name: str) -> TrialMetric:
        role, direction = TrialMetric.ROLE_GUARDRAIL, TrialMetric.DIRECTION_DECREASE
        return TrialMetric(name=name, role=role, direction=direction, margin=0.05)

    return Trial(
        trial_id=name,
        kind=kind,
        model="cancer",
        revision=1,
        arms=[
            TrialArm(name="control", version="1", weight=5_000),
            TrialArm(name="bold", version="2", weight=5_000),
        ],
        metrics=[
            guardrail("error_rate"),
            guardrail("latency_ms"),
            TrialMetric(
                name="revenue",
                role=TrialMetric.ROLE_SUCCESS,
                direction=TrialMetric.DIRECTION_INCREASE,
                missing_is_zero=True,
            ),
        ],
        alpha=0.05,
        started_at_us=START_US - 10**9,
    )


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    trials = Trials()
    for one in (running(), running("rol_0123456789abcdef", Trial.KIND_ROLLOUT)):
        trials.apply(one.trial_id.encode(), one.SerializeToString())
    reader = MemoryReader(logged())
    app = FastAPI()
    app.include_router(
        experiment_routes(trials, MemoryLooking(reader), reader, SystemClock())  # type: ignore[arg-type] # fakes
    )
    install_problem_handlers(app)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://analytics") as made:
        yield made


async def test_results_of_an_experiment_and_of_a_rollout_without_requests(client: httpx.AsyncClient) -> None:
    reply = await client.get(f"/v1/experiments/{ID}/results?bounds=pocock&looks=3")
    assert reply.status_code == 200, reply.text
    found = reply.json()
    assert sum(arm["units"] for arm in found["arms"]) == N
    by_name = {one["metric"]: one for one in found["metrics"]}
    errors = by_name["error_rate"]["comparisons"][0]
    assert errors["estimate"] == pytest.approx(-0.35, abs=0.06)
    assert errors["decision"]["finding"] == "better"
    assert [one["quantile"] for one in by_name["latency_ms"]["comparisons"][0]["quantiles"]] == [
        0.5,
        0.95,
        0.99,
    ]
    sales = by_name["revenue"]
    assert sum(arm["units"] for arm in sales["arms"]) == N
    assert sales["arms"][0]["mean"] == pytest.approx(6.5, abs=1)
    assert "proven to be better" in found["summary"]
    empty = (await client.get("/v1/rollouts/rol_0123456789abcdef/results")).json()
    assert "nothing to say" in empty["summary"]


async def test_what_never_started_is_not_found(client: httpx.AsyncClient) -> None:
    for path in ("/v1/experiments/exp_ffffffffffffffff", f"/v1/rollouts/{ID}"):
        reply = await client.get(f"{path}/results")
        assert (reply.status_code, reply.json()["field"]) == (404, "id")


async def test_a_plan_and_a_bad_one(client: httpx.AsyncClient) -> None:
    reply = await client.post("/v1/experiments/plan", json={"baseline": 0.05, "relative_effect": 0.1})
    assert reply.json()["units_per_variant"] == 31_234
    for body, field in (
        ({"baseline": 2, "effect": 0.1}, "baseline"),
        ({"baseline": 0.1, "effect": 0.1, "power": 2}, "power"),
        ({"baseline": 0.1, "effect": 0.1, "surprise": 2}, "surprise"),
    ):
        reply = await client.post("/v1/experiments/plan", json=body)
        assert (reply.status_code, reply.json()["field"]) == (422, field)


async def test_off_policy_for_all_and_unit_by_unit(client: httpx.AsyncClient) -> None:
    body = {"model": "cancer", "metric": "error_rate", "experiment_id": ID}
    reply = await client.post("/v1/experiments/off-policy", json=body | {"policy": {"weights": {"bold": 1}}})
    assert reply.status_code == 200, reply.text
    found = reply.json()
    assert found["dr"]["value"] == pytest.approx(0.05, abs=0.03)
    assert found["dr"]["interval"][0] < found["dr"]["value"] < found["dr"]["interval"][1]
    assert found["units"] == N
    chosen = [{"unit": f"user-{number}", "variant": "control"} for number in range(200)]
    reply = await client.post("/v1/experiments/off-policy", json=body | {"policy": {"assignments": chosen}})
    found = reply.json()
    assert found["requests"] == 200
    assert "600 logged requests have no assignment" in " ".join(found["warnings"])


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        ({}, "policy"),
        ({"weights": {"bold": 0.5}}, "policy.weights"),
        ({"weights": {"odd": 1.0}}, "policy.weights.odd"),
        ({"weights": {"bold": 1.5}}, "policy.weights.bold"),
        ({"assignments": [{"variant": "bold"}]}, "policy.assignments[0]"),
        ({"assignments": [{"unit": "nobody", "variant": "bold"}]}, "policy.assignments"),
        (
            {
                "assignments": [
                    {"unit": "user-1", "variant": v, "probability": 0.7} for v in ("bold", "control")
                ]
            },
            "policy.assignments[1]",
        ),
    ],
)
async def test_a_bad_policy_is_named(client: httpx.AsyncClient, policy: dict[str, Any], field: str) -> None:
    body = {"model": "cancer", "metric": "error_rate", "experiment_id": ID, "policy": policy}
    reply = await client.post("/v1/experiments/off-policy", json=body)
    assert (reply.status_code, reply.json()["field"]) == (422, field)
