"""Rollouts against a real database and broker: steps, going back, guards, people, crashes, two registries."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from headrace.v1.control_pb2 import ServingConfig
from headrace.v1.events_pb2 import DriftAlert
from headrace.v1.trials_pb2 import Evidence, Trial

from deploy.embedded.tansu import TansuServer
from services.common.bus import Record
from services.common.topics import ALERTS
from services.registry import rollouts
from services.registry.rollout_plan import Action, Cause, Step
from tests.fixtures.onnx_files import linear
from tests.fixtures.registry import Running, registry_settings, running_registry
from tests.fixtures.registry_trials import Surroundings, surroundings
from tests.fixtures.rollouts import HARMFUL, SAFE, UNDECIDED, evidence
from tests.fixtures.waiting import eventually, eventually_of

QUICK = {"min_duration_s": 0, "min_requests": 10}
STEPS = [{"weight": 0.1, **QUICK}, {"weight": 0.5, **QUICK}]
WELL = (evidence("error_rate", SAFE), evidence("latency_ms", SAFE))


class Case:
    """A registry with models, and what goes on around it."""

    def __init__(self, running: Running, around: Surroundings) -> None:
        self.running = running
        self.around = around

    async def model(self, name: str, versions: int = 2) -> None:
        """With version 1 in service and the others uploaded."""
        await self.running.make(name, *(linear(weight=number) for number in range(1, versions + 1)))
        assert (await self.running.deploy(name, {"1": 100})).status_code == 200

    async def post(self, path: str, body: dict[str, Any] | None = None, status: int = 200) -> dict[str, Any]:
        answer = await self.running.rest.post(f"/v1/rollouts{path}", json=body or {})
        assert answer.status_code == status, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def roll(self, model: str, version: str = "2", **changes: Any) -> str:
        body = {"model": model, "version": version, "steps": STEPS, "bake_s": 0} | changes
        made = await self.post("", body, 201)
        assert made["status"] in {"running", "paused"}
        rollout_id: str = made["rollout_id"]
        return rollout_id

    async def view(self, rollout_id: str) -> dict[str, Any]:
        found: dict[str, Any] = (await self.running.rest.get(f"/v1/rollouts/{rollout_id}")).json()
        return found

    async def until(self, rollout_id: str, **values: Any) -> dict[str, Any]:
        """The rollout once it has these values."""
        found: dict[str, Any] = await eventually_of(
            lambda: self.view(rollout_id), lambda seen: all(seen[k] == v for k, v in values.items())
        )
        return found

    async def events(self, rollout_id: str) -> list[dict[str, Any]]:
        """Oldest first."""
        answer = await self.running.rest.get(f"/v1/rollouts/{rollout_id}/events", params={"limit": 1000})
        return list(reversed(answer.json()["events"]))

    async def trial(self, rollout_id: str, revision: int) -> Trial:
        """As analytics knows it, once it knows `revision`."""

        async def look() -> Trial | None:
            return self.around.trials.get(rollout_id)

        found = await eventually_of(look, lambda trial: trial is not None and trial.revision >= revision)
        assert found is not None
        return found

    async def say(self, rollout_id: str, *found: Evidence, **changes: Any) -> None:
        """A verdict on the rollout as it stands now."""
        trial = await self.trial(rollout_id, (await self.view(rollout_id))["revision"])
        await self.around.say(trial, *found, **changes)

    async def config(self, model: str) -> ServingConfig:
        """As it is deployed now."""
        async with self.running.registry.edge.transaction() as tx:
            row = await tx.deployment(model)
        return ServingConfig() if row is None else ServingConfig.FromString(row.config)

    async def weights(self, model: str) -> dict[str, int]:
        return {version.version: version.weight for version in (await self.config(model)).versions}


@asynccontextmanager
async def a_case(database_url: str, broker: TansuServer, directory: Path) -> AsyncIterator[Case]:
    cfg = registry_settings(database_url, broker.url, directory)
    async with surroundings(broker.url) as around, running_registry(cfg) as running:
        yield Case(running, around)


async def test_a_good_version_takes_over_step_by_step_and_a_bad_one_goes_back(
    database_url: str, new_tansu: Callable[[], TansuServer], tmp_path: Path
) -> None:
    async with a_case(database_url, new_tansu(), tmp_path) as case:
        await case.model("m", versions=3)
        case.around.slow.add("2")
        good = await case.roll("m")
        assert await case.weights("m") == {"1": 10_000, "2": 0}
        waiting = await eventually_of(lambda: case.view(good), lambda seen: "0 of 2" in seen["waiting_for"])
        assert (waiting["entered_at"], waiting["weight"]) == (None, 0.0)
        first = await case.trial(good, 1)
        assert [(arm.name, arm.weight) for arm in first.arms] == [("1", 10_000), ("2", 0)]
        assert [metric.name for metric in first.metrics] == ["error_rate", "latency_ms"]
        case.around.slow.clear()
        await case.until(good, weight=0.1)
        assert await case.weights("m") == {"1": 9000, "2": 1000}
        await case.say(good, evidence("error_rate", UNDECIDED), requests=9)
        await eventually_of(
            lambda: case.view(good), lambda seen: str(seen["waiting_for"]).startswith("9 of 10")
        )
        await case.say(good, evidence("error_rate", UNDECIDED), requests=10)
        await case.until(good, weight=0.5)
        # The last step before 100% wants proof, and the old verdict says nothing of this step.
        await case.say(good, *WELL, revision=1)
        await case.say(good, evidence("error_rate", SAFE), evidence("latency_ms", UNDECIDED))
        await eventually_of(
            lambda: case.view(good), lambda seen: "not proven safe" in str(seen["waiting_for"])
        )
        await case.say(good, *WELL)
        await case.until(good, status="baking", weight=1.0)
        assert await case.weights("m") == {"1": 0, "2": 10_000}
        await case.say(good, *WELL)
        done = await case.until(good, status="completed")
        assert await case.weights("m") == {"2": 10_000}
        assert (done["weight"], done["waiting_for"]) == (1.0, None)
        assert (await case.trial(good, done["revision"])).stopped_at_us > 0
        events = await case.events(good)
        moves = [(e["action"], e["weight"]) for e in events if e["action"] not in {"wait", "hold"}]
        assert moves == [("enter", 0.1), ("enter", 0.5), ("enter", 1.0), ("complete", 1.0)]
        assert all(event["reason"] for event in events)
        said = [(e["status"], e["step"], e["action"], e["cause"], e["reason"]) for e in events]
        assert len(said) == len(set(said)) < 25

        before = await case.config("m")
        bad = await case.roll("m", "3")
        await case.until(bad, weight=0.1)
        harm = evidence("error_rate", HARMFUL, mean=0.2, control_mean=0.01)
        harm.arm = "3"
        await case.say(bad, harm, requests=60)
        back = await case.until(bad, status="rolled_back")
        assert "0.2 over 400 units against 0.01" in back["reason"]
        assert back["evidence"][0]["finding"] == "harmful"
        after = await case.config("m")
        assert (after.buckets, after.versions) == (before.buckets, before.versions)
        listed = await case.running.rest.get("/v1/rollouts", params={"model": "m"})
        assert [entry["status"] for entry in listed.json()["rollouts"]] == ["completed", "rolled_back"]
        only = await case.running.rest.get("/v1/rollouts", params={"status": "rolled_back"})
        assert [entry["rollout_id"] for entry in only.json()["rollouts"]] == [bad]

        # Nothing moves where the workers cannot load it, and what they say is told.
        case.around.failing["3"] = "no such operator"
        broken = await case.roll("m", "3")
        failed = await case.until(broken, status="rolled_back")
        assert "w1: no such operator" in failed["reason"]
        assert await case.weights("m") == {"2": 10_000}

        # Nor is one waited for that loads for ever.
        case.around.slow.add("2")
        await case.model("n", versions=2)
        slow = await case.roll("n", load_timeout_s=0.5)
        late = await case.until(slow, status="rolled_back")
        assert "0 of 2 workers have loaded version 2, and 75% would be enough" in late["reason"]

        # What was closed a year ago is forgotten, here and by analytics; what is not closed stays.
        async with case.running.registry.edge.transaction() as tx:
            row = await tx.rollout(slow, fresh=True)
            assert row is not None
            assert row.closed_at is None
            row.closed_at = datetime.now(UTC) - timedelta(days=366)
        await eventually_of(
            lambda: case.running.rest.get(f"/v1/rollouts/{slow}"), lambda answer: answer.status_code == 404
        )
        await eventually(lambda: slow not in case.around.trials)
        assert (await case.view(broken))["status"] == "rolled_back"
        assert broken in case.around.trials
        assert await case.weights("m") == {"2": 10_000}


async def test_people_pause_resume_promote_and_abort_and_nobody_else_moves_weights(
    database_url: str, new_tansu: Callable[[], TansuServer], tmp_path: Path
) -> None:
    async with a_case(database_url, new_tansu(), tmp_path) as case:
        await case.model("m", versions=3)
        rest = case.running.rest
        rollout = await case.roll("m", steps=[{"weight": 0.1}, {"weight": 0.5}], start=False)
        await eventually_of(lambda: case.events(rollout), lambda seen: seen[-1]["cause"] == "paused")
        assert (await case.view(rollout))["status"] == "paused"
        refused = await case.post(f"/{rollout}/promote", status=409)
        assert "its first step has not begun" in refused["detail"]
        assert (await case.post(f"/{rollout}/resume", {"reason": "go"}))["status"] == "running"
        await case.until(rollout, weight=0.1)

        # While it runs, versions and weights are its own; everything else may change.
        second = await case.post("", {"model": "m", "version": "3"}, 409)
        assert (second["field"], rollout in second["detail"]) == ("model", True)
        moved = await case.running.deploy("m", {"1": 100})
        assert (moved.status_code, moved.json()["field"]) == (409, "versions")
        assert rollout in moved.json()["detail"]
        kept = await case.running.deploy("m", {"1": 90, "2": 10}, default_timeout_ms=1234)
        assert (kept.status_code, kept.json()["default_timeout_ms"]) == (200, 1234)
        stands_in = {"fallback": {"version": "1"}, "default_timeout_ms": 1234}
        assert (await case.running.deploy("m", {"1": 90, "2": 10}, **stands_in)).status_code == 200
        called = [{"version": "1", "weight": 90}, {"version": "2", "weight": 10, "variant": "new"}]
        masked = await rest.put("/v1/deployments/m", json={"versions": called, **stands_in})
        assert (masked.status_code, masked.json()["field"]) == (409, "fallback")
        gone = await rest.delete("/v1/deployments/m")
        assert (gone.status_code, rollout in gone.json()["detail"]) == (409, True)
        assert (await rest.delete("/v1/models/m/versions/2")).status_code == 409

        await case.post(f"/{rollout}/pause", {"reason": "lunch"})
        paused = await case.view(rollout)
        assert (paused["status"], paused["reason"]) == ("paused", "paused by a person (lunch)")
        await case.post(f"/{rollout}/pause")
        promoted = await case.post(f"/{rollout}/promote", {"reason": "I know"})
        assert (promoted["status"], promoted["weight"], promoted["step"]) == ("running", 0.5, 1)
        assert "a person moved it on" in promoted["reason"]
        assert (await case.config("m")).default_timeout_ms == 1234
        aborted = await case.post(f"/{rollout}/abort", {"reason": "enough"})
        assert (aborted["status"], aborted["weight"]) == ("aborted", 0.0)
        assert await case.weights("m") == {"1": 10_000}
        for action in ("pause", "resume", "abort", "promote"):
            refused = await case.post(f"/{rollout}/{action}", status=409)
            assert "is aborted and stays so" in refused["detail"]
        assert (await rest.get("/v1/rollouts/rol_0000000000000000")).status_code == 404

        # A shadow first: it answers nobody, and what was the shadow before is one again afterwards.
        before = {"version": "3", "share": 5}
        assert (await case.running.deploy("m", {"1": 100, "3": 0}, shadow=before)).status_code == 200
        steps = [{"shadow": 0.5, "min_requests": 10, "min_duration_s": 0, "slice_by": "region"}, *STEPS]
        shadow = await case.roll("m", strategy="shadow_canary", steps=steps)
        await eventually_of(lambda: case.config("m"), lambda config: config.shadow.version == "2")
        config = await case.config("m")
        assert (config.shadow.share, config.shadow.slice_by) == (5000, "region")
        trial = await case.trial(shadow, config.revision)
        assert (trial.shadow_version, trial.shadow_since_us > 0) == ("2", True)
        assert {m.name: m.margin for m in trial.metrics}["shadow_disagreement"] == pytest.approx(0.01)
        other = await case.running.deploy("m", {"1": 100, "3": 0, "2": 0}, shadow=before)
        assert (other.status_code, other.json()["field"]) == (409, "shadow")
        same = await case.running.deploy("m", {"1": 100, "3": 0})
        assert same.json()["shadow"]["version"] == "2"
        alike = [evidence(name, SAFE) for name in ("shadow_disagreement", "shadow_error_rate")]
        await case.say(shadow, *alike)
        await case.until(shadow, weight=0.1)
        assert (await case.config("m")).shadow.version == "3"
        assert (await case.trial(shadow, config.revision + 1)).shadow_version == ""

        # Drift of the new version alone, since it answers.
        now_us = int(datetime.now(UTC).timestamp() * 1e6)
        drifted: dict[str, Any] = {
            "model": "m",
            "version": "2",
            "feature": "age",
            "message": "PSI 0.3",
            "window_end_us": now_us,
        }
        warning = DriftAlert(alert_id=bytes(16), severity=DriftAlert.SEVERITY_WARNING, **drifted)
        await case.around.bus.publish([Record(ALERTS.name, b"m", warning.SerializeToString())])
        await eventually_of(
            lambda: case.view(shadow), lambda seen: seen["waiting_for"] == "drift of age: PSI 0.3"
        )
        warning.severity = DriftAlert.SEVERITY_CRITICAL
        await case.around.bus.publish([Record(ALERTS.name, b"m", warning.SerializeToString())])
        assert "critical drift of age" in (await case.until(shadow, status="rolled_back"))["reason"]
        assert (await case.config("m")).shadow.version == "3"

        # Blue and green: nothing, then everything.
        baseline = [{"weight": 0, "min_duration_s": 0}]
        green = await case.roll("m", strategy="blue_green", steps=baseline, keep_previous=True)
        assert (await case.until(green, status="baking"))["weight"] == 1.0
        await case.say(green, *WELL)
        await case.until(green, status="completed")
        assert await case.weights("m") == {"1": 0, "3": 0, "2": 10_000}


class Killed(Exception):
    """As if the process had ended."""


def killed(*_: Any, **__: Any) -> None:
    raise Killed


async def enter_first_step(running: Running, rollout_id: str) -> None:
    edge = running.registry.edge
    async with edge.transaction() as tx:
        row = await tx.rollout(rollout_id)
        assert row is not None
        entering = Step(Action.ENTER, Cause.STARTED, "go", 0)
        await rollouts.carry_out(tx, row, entering, None, edge.clock)


async def test_it_goes_on_where_it_was_whatever_is_killed_and_however_many_registries_there_are(
    database_url: str, new_tansu: Callable[[], TansuServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = new_tansu()
    cfg = registry_settings(database_url, broker.url, tmp_path)
    async with surroundings(broker.url) as around:
        async with running_registry(cfg) as running:
            case = Case(running, around)
            await case.model("m")
            case.around.slow.add("2")
            rollout = await case.roll("m")
            revision = (await case.config("m")).revision
            # A step that fails at its very end leaves nothing of itself behind.
            for cut in ("deployments.revise", "_note", "publish_trial"):
                with monkeypatch.context() as patched:
                    patched.setattr(f"services.registry.rollouts.{cut}", killed)
                    with pytest.raises(Killed):
                        await enter_first_step(running, rollout)
                assert (await case.config("m")).revision == revision
                assert (await case.view(rollout))["entered_at"] is None
                assert (await case.trial(rollout, 1)).revision == revision
            around.slow.clear()
            await case.until(rollout, weight=0.1)
        # Two others take its place; every step is made once.
        async with running_registry(cfg) as one, running_registry(cfg) as two:
            case = Case(one, around)
            await case.say(rollout, *WELL)
            await case.until(rollout, weight=0.5)
            await case.say(rollout, *WELL)
            await Case(two, around).until(rollout, status="baking")
            await case.say(rollout, *WELL)
            await case.until(rollout, status="completed")
            await asyncio.sleep(1.0)  # for a second registry that would do it again
            events = await case.events(rollout)
            moves = [e["action"] for e in events if e["action"] not in {"wait", "hold"}]
            assert moves == ["enter", "enter", "enter", "complete"]

            # A deployment that is not what the rollout made is left alone.
            lost = await case.roll("m", "1")
            await case.until(lost, weight=0.1)
            async with one.registry.edge.transaction() as tx:
                await tx.delete_deployment("m")
            ended = await case.until(lost, status="aborted")
            assert ended["reason"] == "m is not deployed any more"
            assert (await case.trial(lost, ended["revision"])).stopped_at_us > 0


BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"version": "9"}, 404, "version"),
    ({"model": "nobody"}, 404, "model"),
    ({"version": "1"}, 422, "version"),
    ({"steps": []}, 422, "steps"),
    ({"steps": [{}]}, 422, "steps[0]"),
    ({"steps": [{"weight": 0.1, "shadow": 0.1}]}, 422, "steps[0]"),
    ({"steps": [{"weight": 0.1}, {"weight": 0.1}]}, 422, "steps[1].weight"),
    ({"steps": [{"weight": 0.5}, {"weight": 0.1}]}, 422, "steps[1].weight"),
    ({"steps": [{"weight": 1.1}]}, 422, "steps[0].weight"),
    ({"steps": [{"weight": 0.00001}]}, 422, "steps[0].weight"),
    ({"steps": [{"weight": 1, "gate": "safe"}]}, 422, "steps[0].gate"),
    ({"steps": [{"weight": 0.1, "match_rate": 0.9}]}, 422, "steps[0].match_rate"),
    ({"steps": [{"weight": 0.1, "gate": "good"}]}, 422, "steps[0].gate"),
    ({"steps": [{"weight": 0.1, "min_duration_s": 60, "max_duration_s": 5}]}, 422, "steps[0].max_duration_s"),
    ({"steps": [{"weight": 0.1, "gate": "better"}]}, 422, "metrics"),
    ({"steps": [{"shadow": 0.1}]}, 422, "strategy"),
    ({"strategy": "shadow_canary", "steps": [{"weight": 0.1}]}, 422, "steps"),
    ({"strategy": "shadow_canary", "steps": [{"weight": 0.1}, {"shadow": 0.1}]}, 422, "steps[1].shadow"),
    ({"strategy": "blue_green", "steps": [{"weight": 0.5}]}, 422, "steps[0].weight"),
    ({"strategy": "yolo"}, 422, "strategy"),
    ({"metrics": []}, 422, "metrics"),
    ({"metrics": [{"name": "clicks"}]}, 422, "metrics"),
    ({"metrics": [{"name": "e", "role": "guardrail"}] * 2}, 422, "metrics[1].name"),
    ({"metrics": [{"name": "shadow_disagreement", "role": "guardrail"}]}, 422, "metrics[0].name"),
    ({"alpha": 0}, 422, "alpha"),
    ({"bake_s": -1}, 422, "bake_s"),
    ({"on_inconclusive": "hope"}, 422, "on_inconclusive"),
    ({"bake": 1}, 422, "bake"),
]


async def test_what_is_wrong_is_named(
    database_url: str, new_tansu: Callable[[], TansuServer], tmp_path: Path
) -> None:
    async with a_case(database_url, new_tansu(), tmp_path) as case:
        await case.running.make("m", linear(weight=1), linear(weight=2))
        undeployed = await case.post("", {"model": "m", "version": "2"}, 409)
        assert (undeployed["field"], "not deployed" in undeployed["detail"]) == ("model", True)
        await case.running.deploy("m", {"1": 50, "2": 50})
        split = await case.post("", {"model": "m", "version": "2"}, 409)
        assert "1 (50%), 2 (50%)" in split["detail"]
        called = [{"version": "1", "weight": 100, "variant": "old"}, {"version": "2", "weight": 0}]
        stands_in = {"versions": called, "fallback": {"version": "2"}}
        await case.running.rest.put("/v1/deployments/m", json=stands_in)
        masked = await case.post("", {"model": "m", "version": "2"}, 409)
        assert "hides failures" in masked["detail"]
        called = [{"version": "1", "weight": 100, "variant": "2"}]
        await case.running.rest.put("/v1/deployments/m", json={"versions": called})
        mistaken = await case.post("", {"model": "m", "version": "2"}, 409)
        assert "called '2' as another version is" in mistaken["detail"]
        await case.running.deploy("m", {"1": 100})
        for changes, status, field in BAD:
            body = {"model": "m", "version": "2"} | changes
            answer = await case.running.rest.post("/v1/rollouts", json=body)
            assert answer.status_code == status, (changes, answer.text)
            assert answer.json()["field"] == field, (changes, answer.text)
        assert (await case.running.rest.get("/v1/rollouts")).json()["rollouts"] == []
        assert await case.weights("m") == {"1": 10_000}
