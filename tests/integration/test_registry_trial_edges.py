"""What trials must survive: bad input, aliases that come and go, clocks that were ahead, rows that nobody can
read, and bandits without end."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from headrace.v1.control_pb2 import ServingConfig
from headrace.v1.trials_pb2 import Verdict
from onnx import TensorProto

from deploy.embedded.tansu import TansuServer
from services.common.bus.admin import ensure_topics
from services.common.clock import SystemClock
from services.registry import deployments, experiments, rollouts
from services.registry.edge import Edge
from services.registry.experiment_schemas import ExperimentPatch
from services.registry.rollout_control import RolloutActor
from services.registry.rollout_plan import Action, Cause, Step
from services.registry.rollout_state import rollout_of
from services.registry.workers import Workers
from tests.fixtures.onnx_files import linear, renamed
from tests.fixtures.registry import Running, registry_settings, running_registry
from tests.fixtures.registry_trials import TOPICS

VARIANTS = [{"name": "a", "version": "1"}, {"name": "b", "version": "2"}]
ROLLOUT = {"model": "m", "version": "2"}
EXPERIMENT = {"model": "m", "variants": VARIANTS}


@pytest.fixture
async def running(
    database_url: str, new_tansu: Callable[[], TansuServer], tmp_path: Path
) -> AsyncIterator[Running]:
    broker = new_tansu().url
    await ensure_topics(broker, TOPICS)
    async with running_registry(registry_settings(database_url, broker, tmp_path)) as running:
        await running.make("m", linear(weight=1), linear(weight=2), linear(weight=3))
        yield running


async def config(edge: Edge) -> ServingConfig:
    async with edge.transaction() as tx:
        row = await tx.deployment("m")
    assert row is not None
    return ServingConfig.FromString(row.config)


async def posted(running: Running, path: str, body: Any, status: int) -> dict[str, Any]:
    answer = await running.rest.post(f"/v1/{path}", json=body)
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def carried_out(edge: Edge, rollout_id: str, *actions: Action, step: int | None = None) -> None:
    """As if the controller had decided so; no `step`: about the last one."""
    for action in actions:
        async with edge.transaction() as tx:
            row = await tx.rollout(rollout_id)
            assert row is not None
            await tx.model(row.model, lock=True)
            about = len(rollout_of(row).plan) - 1 if step is None else step
            decided = Step(action, Cause.GATE, "go", about)
            await rollouts.carry_out(tx, row, decided, None, edge.clock)


async def test_versions_that_get_the_same_requests_take_the_same_inputs(running: Running) -> None:
    """Requests are read by the signature of one of them; the others' users would get errors."""
    other = [renamed(name="z"), renamed(TensorProto.DOUBLE), renamed(features=4)]
    await running.make("n", linear(), *other, renamed())
    wrong = {"2": "has no input 'x'", "3": "takes 'x' as FP64[-1,3]", "4": "takes 'x' as FP32[-1,4]"}

    async def refusal(method: str, path: str, body: dict[str, Any], field: str, words: str) -> None:
        answer = await running.rest.request(method, f"/v1/{path}", json=body)
        said = answer.json()
        assert (answer.status_code, said.get("field")) == (422, field), said
        assert words in said["detail"]

    for version, words in wrong.items():
        shares = [{"version": "1", "weight": 50}, {"version": version, "weight": 50}]
        await refusal("PUT", "deployments/n", {"versions": shares}, "versions[1].version", words)
        unshared = [{"version": "1", "weight": 100}, {"version": version, "weight": 0}]
        for role, rest in (("shadow", {"share": 5}), ("fallback", {})):
            body = {"versions": unshared, role: {"version": version, **rest}}
            await refusal("PUT", "deployments/n", body, f"{role}.version", words)
        # Who asks for a version by its name sends what it takes.
        assert (await running.rest.put("/v1/deployments/n", json={"versions": unshared})).is_success
        arms = [{"name": "a", "version": "1"}, {"name": "b", "version": version}]
        await refusal(
            "POST", "experiments", {"model": "n", "variants": arms, "start": True}, "variants", words
        )
        rollout = {"model": "n", "version": version, "steps": [{"weight": 0.5}]}
        await refusal("POST", "rollouts", rollout, "version", words)
    at_once = {"model": "n", "version": "2", "steps": [{"weight": 1}]}
    made = await posted(running, "rollouts", at_once, 201)
    assert (await running.rest.post(f"/v1/rollouts/{made['rollout_id']}/abort", json={})).is_success
    assert (await running.deploy("n", {"1": 50, "5": 50})).is_success  # other outputs
    assert (await running.deploy("n", {"2": 100})).is_success


async def test_nobody_changes_the_inputs_under_an_experiment(running: Running) -> None:
    await running.make("n", linear(weight=1), linear(weight=2), renamed(name="z"))
    await running.deploy("n", {"1": 50, "2": 50})
    await posted(running, "experiments", {**EXPERIMENT, "model": "n", "start": True}, 201)
    answer = await running.deploy("n", {"1": 0, "2": 0, "3": 100})
    assert (answer.status_code, answer.json()["field"]) == (422, "versions")
    assert "version '1' needs an input 'x', which version '3' does not take" in answer.json()["detail"]


async def test_aliases_follow_what_a_rollout_brings_and_an_alias_keeps_the_previous_version(
    running: Running,
) -> None:
    edge = running.registry.edge
    await running.deploy("m", {"1": 100})
    for alias, version in (("champion", "1"), ("next", "2"), ("last", "3")):
        assert (await running.rest.put(f"/v1/models/m/aliases/{alias}", json={"version": version})).is_success
    first = await posted(running, "rollouts", ROLLOUT, 201)
    # Whoever asks for it by its name is answered as soon as it is loaded.
    assert dict((await config(edge)).aliases) == {"champion": "1", "next": "2"}
    await carried_out(edge, first["rollout_id"], Action.ENTER, Action.COMPLETE)
    after = await config(edge)
    assert {one.version: one.weight for one in after.versions} == {"1": 0, "2": 10_000}
    assert dict(after.aliases) == {"champion": "1", "next": "2"}
    second = await posted(running, "rollouts", ROLLOUT | {"version": "3"}, 201)
    assert (await running.rest.put("/v1/models/m/aliases/next", json={"version": "3"})).is_success
    await carried_out(edge, second["rollout_id"], Action.ENTER, Action.COMPLETE)
    after = await config(edge)
    assert {one.version: one.weight for one in after.versions} == {"1": 0, "3": 10_000}
    third = await posted(running, "rollouts", ROLLOUT, 201)
    await carried_out(edge, third["rollout_id"], Action.ROLL_BACK)
    assert dict((await config(edge)).aliases) == {"champion": "1", "next": "3", "last": "3"}


async def test_a_second_shadow_step_like_the_first_begins_with_nothing_known(running: Running) -> None:
    edge = running.registry.edge
    await running.deploy("m", {"1": 100})
    steps = [{"shadow": 0.1}, {"shadow": 0.1, "min_requests": 5000}, {"weight": 0.5}]
    asked = ROLLOUT | {"strategy": "shadow_canary", "steps": steps}
    identity = (await posted(running, "rollouts", asked, 201))["rollout_id"]
    seen = []
    for step in range(4):
        await carried_out(edge, identity, Action.ENTER, step=step)
        async with edge.transaction() as tx:
            row = await tx.rollout(identity)
        assert row is not None
        seen.append((row.revision, (await config(edge)).revision))
    trials, deployed = zip(*seen, strict=True)
    # A verdict on the first step is none on the second, whose configuration is the same.
    assert len(set(trials)) == 4
    assert list(trials) == sorted(trials)
    assert deployed[0] == deployed[1] < trials[1] < deployed[2]
    assert trials[2:] == deployed[2:]


async def test_a_verdict_of_a_clock_that_was_ahead_gives_way_to_later_ones(running: Running) -> None:
    edge = running.registry.edge
    now = edge.clock.now()

    async def kept(summary: str, ahead: timedelta) -> str:
        said = Verdict(summary=summary).SerializeToString()
        async with edge.transaction() as tx:
            await tx.put_verdict("rol_1", said, now + ahead, now)
        async with edge.transaction() as tx:
            row = await tx.verdict("rol_1")
        assert row is not None
        return Verdict.FromString(row.verdict).summary

    second = timedelta(seconds=1)
    assert await kept("first", 0 * second) == "first"
    assert await kept("older", -second) == "first"
    assert await kept("ahead", timedelta(days=3000)) == "ahead"
    assert await kept("the same again", timedelta(days=3000)) == "ahead"
    assert await kept("set back", second) == "set back"
    assert await kept("older", 0 * second) == "set back"
    # The clocks of two machines differ a little all the time.
    assert await kept("a little ahead", 30 * second) == "a little ahead"
    assert await kept("older", 20 * second) == "a little ahead"


async def test_a_rollout_that_cannot_be_read_does_not_hold_up_the_others(running: Running) -> None:
    edge = running.registry.edge
    await running.make("n", linear(weight=1), linear(weight=2))
    made = {}
    for model in ("m", "n"):
        await running.deploy(model, {"1": 100})
        made[model] = (await posted(running, "rollouts", ROLLOUT | {"model": model}, 201))["rollout_id"]
        async with edge.transaction() as tx:
            await tx.delete_deployment(model)  # what calls for a decision
    async with edge.transaction() as tx:
        row = await tx.rollout(made["m"])
        assert row is not None
        row.spec = {"steps": "of a program that is not this one"}
    actor = RolloutActor(edge, Workers(SystemClock()))
    async with edge.transaction() as tx:
        due = await actor.candidates(tx, edge.clock.now())
        ended = await tx.rollout(made["n"])
    # The registry's own controller may have been there before.
    assert made["m"] not in due
    assert made["n"] in due or (ended is not None and ended.status == "aborted")


async def test_what_a_bandit_changes_without_end_is_forgotten_in_the_end(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments, "REWEIGHTINGS_KEPT", 3)
    monkeypatch.setattr(deployments, "EXPERIMENT_REVISIONS_KEPT", 3)
    edge = running.registry.edge
    await running.deploy("m", {"1": 50, "2": 50})
    made = await posted(running, "experiments", EXPERIMENT | {"start": True}, 201)
    identity = made["experiment_id"]
    for number in range(6):
        async with edge.transaction() as tx:
            row = await experiments.locked(tx, identity)
            await experiments.reweight(tx, row, [5100 + number, 4900 - number], "it learns", edge.clock)
    told = (await running.rest.get(f"/v1/experiments/{identity}/history")).json()["events"]
    assert [event["kind"] for event in told] == ["reweighted"] * 3 + ["started", "created"]
    kept = (await running.rest.get("/v1/deployments/m/history")).json()["revisions"]
    newest = kept[0]["revision"]
    assert [entry["reason"] for entry in kept] == ["experiment", "experiment", "deploy"]
    assert kept[1]["revision"] >= newest - 3 > kept[2]["revision"] == 1


def all_with(
    path: str, body: dict[str, Any], changes: Sequence[dict[str, Any]]
) -> list[tuple[str, dict[str, Any]]]:
    return [(path, body | change) for change in changes]


REASONS: list[Any] = [{"winner": "c"}, {"reason": "\0"}, {"winner": None, "why": 1}, [], {"reason": 7}]
LONE = "\ud800"
ODD: list[Any] = [None, {}, [{}], LONE]
BAD: list[tuple[str, Any]] = [
    ("experiments", None),
    ("experiments", []),
    ("experiments", {}),
    ("experiments", {"model": "m", "variants": []}),
    ("experiments", {"model": "m", "variants": [VARIANTS[0]]}),
    ("experiments", {"model": "m", "variants": [{**VARIANTS[0], "weight": w} for w in ("NaN", 1)]}),
    ("experiments", {"model": "m", "variants": [{**v, "weight": 1e400} for v in VARIANTS]}),
    ("experiments", {"model": "m", "variants": [{**v, "weight": "1e-999999999"} for v in VARIANTS]}),
    ("experiments", {"model": "m", "variants": [{**v, "weight": True} for v in VARIANTS]}),
    ("experiments", {"model": "m\0", "variants": VARIANTS}),
    *all_with(
        "experiments",
        EXPERIMENT,
        (
            {"unit": "person"},
            {"salt": "ä"},
            {"salt": "layer:m"},
            {"traffic": 0},
            {"traffic": float("nan")},
            {"traffic": 1e300},
            {"name": LONE},
            {"description": "\0"},
            {"alpha": float("inf")},
            {"alpha": "much"},
            {"planned_units": 1e30},
            {"planned_units": 10**400},
            {"start_at": "tomorrow"},
            {"start_at": "2026-01-01T00:00:00"},
            {"stop_at": "0001-01-01T00:00:00+23:59"},
            {"start_at": "9999-12-31T23:59:59-23:59", "stop_at": "9999-12-31T23:59:59-23:00"},
            {"start_at": 1e30},
            {"overrides": [{"unit": LONE, "variant": "a"}]},
            {"overrides": [{"unit": "x", "variant": "c"}]},
            {"overrides": [{"unit": "x\0", "variant": "a"}]},
            {"overrides": [{"unit": str(n), "variant": "a"} for n in range(1001)]},
            {"targeting": [{"attribute": LONE, "operator": "present"}]},
            {"targeting": [{"attribute": "a", "operator": "in", "values": [LONE]}]},
            {"targeting": [{"attribute": "a", "operator": "in", "values": []}]},
            {"targeting": [{"attribute": "a", "operator": "in", "values": [None]}]},
            {"targeting": [{"attribute": "a", "operator": "in", "values": [{}]}]},
            {"targeting": [{"attribute": "a", "operator": "lt", "values": [float("nan")]}]},
            {"targeting": [{"attribute": "a", "operator": "lt", "values": [1 << 63]}]},
            {"targeting": [{"attribute": "a", "operator": "lt", "values": [1e300]}]},
            {"targeting": [{"attribute": "a", "operator": "like", "values": ["x"]}]},
            {"targeting": [{"attribute": "a", "operator": "in", "values": ["x" * 1000] * 100}]},
            {"metrics": [{"name": "a b"}]},
            {"metrics": [{"name": "x", "quantile": 1}]},
            {"metrics": [{"name": "x", "low": 1, "high": 1}]},
            {"metrics": [{"name": "x", "margin": -1}]},
            {"metrics": [{"name": "x", "pre_period_s": 1e18, "covariate": "pre_period"}]},
            {"bandit": {}},
            {"bandit": {"update_every_s": 0}},
            {"bandit": None, "auto_stop": None},
            {"surprise": 1},
        ),
    ),
    *all_with(
        "rollouts",
        ROLLOUT,
        (
            {"version": LONE},
            {"steps": [{"weight": "NaN"}]},
            {"steps": [{"weight": None}]},
            {"steps": [{"weight": 0.1, "min_duration_s": float("inf")}]},
            {"steps": [{"weight": 0.1, "min_requests": 10**400}]},
            {"steps": [{"weight": 0.1, "min_requests": -1}]},
            {"steps": [{"shadow": 0.1, "slice_by": LONE}], "strategy": "shadow_canary"},
            {"steps": [{"shadow": 0.1, "tolerance": 0}], "strategy": "shadow_canary"},
            {"steps": [{"weight": n / 100} for n in range(1, 60)]},
            {"alpha": float("nan")},
            {"bake_s": 1e300},
            {"metrics": [{"name": LONE, "role": "guardrail"}]},
            {"start": "perhaps"},
        ),
    ),
]
ASKED = [
    "experiments/%00",
    "experiments/%00/history",
    "experiments/exp_0/assignment?unit=%00",
    "experiments/exp_0/assignment?unit=a&request_id=nothing",
    "experiments/exp_0/assignment",
    "experiments/%ff/assignment?unit=a",
    "experiments?model=%00",
    "experiments?model=%ff",
    "experiments?status=over",
    "experiments?limit=0",
    "experiments?limit=99999999999999999999",
    "experiments?after=%00",
    "rollouts/%00",
    "rollouts/%ff",
    "rollouts/%00/events",
    "rollouts/x/events?before=99999999999999999999",
    "rollouts?status=baked",
    "rollouts?model=%00",
    "models/%00/holdout",
]


async def test_no_input_is_a_fault_of_the_service_and_every_refusal_names_its_field(running: Running) -> None:
    await running.deploy("m", {"1": 100, "2": 0})
    for path, body in BAD:
        # Python's JSON has NaN and lone surrogates, which other callers may send as well.
        text = json.dumps(body)
        headers = {"content-type": "application/json"}
        answer = await running.rest.post(f"/v1/{path}", content=text, headers=headers)
        assert answer.status_code in (400, 404, 409, 422), (text[:200], answer.text)
        assert answer.json().get("field") or answer.status_code == 400, (text[:200], answer.text)
    for path in ASKED:
        answer = await running.rest.get(f"/v1/{path}")
        assert answer.status_code in (404, 422), (path, answer.text)
        assert answer.json().get("field"), (path, answer.text)
    for path in ("rollouts", "experiments"):
        assert (await running.rest.get(f"/v1/{path}")).json()[path] == []
    for method, path in (("POST", "rollouts/%00/abort"), ("POST", "experiments/%00/stop")):
        answer = await running.rest.request(method, f"/v1/{path}", json={})
        assert answer.status_code == 404, answer.text
    for status, odd in (("draft", ODD), ("running", [None])):
        made = await posted(running, "experiments", EXPERIMENT | {"start": status == "running"}, 201)
        path = f"/v1/experiments/{made['experiment_id']}"
        assert made["status"] == status
        changes = [{name: value} for name in ExperimentPatch.model_fields for value in odd]
        for change in [{}, {"model": "n"}, *changes, {"variants": [*VARIANTS, VARIANTS[0]]}]:
            headers = {"content-type": "application/json"}
            answer = await running.rest.patch(path, content=json.dumps(change), headers=headers)
            assert answer.status_code in (200, 409, 422), (change, answer.text)
            assert answer.status_code == 200 or answer.json().get("field"), (change, answer.text)
        for wrong in REASONS:
            answer = await running.rest.post(f"{path}/stop", json=wrong)
            assert answer.status_code in (409, 422), (wrong, answer.text)
            assert answer.json().get("field"), (wrong, answer.text)
    for body in ({"share": "NaN"}, {"share": 1.1}, {"share": -0.1}, {"share": 0.00001}, {"share": None}, {}):
        answer = await running.rest.put("/v1/models/m/holdout", json=body)
        assert (answer.status_code, answer.json()["field"]) == (422, "share"), answer.text
