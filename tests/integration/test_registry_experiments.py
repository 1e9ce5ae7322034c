"""Experiments over REST, on real PostgreSQL and a real broker: what routers and analytics are told."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from headrace.v1.control_pb2 import LoadedVersion, ServingConfig, Unit, WorkerStatus
from headrace.v1.dataplane_pb2 import PredictRequest
from headrace.v1.trials_pb2 import Evidence, Trial, TrialMetric, Verdict

from deploy.embedded.tansu import TansuServer
from services.common.bus import KafkaBus, Record
from services.common.bus.admin import ensure_topics
from services.common.topics import ALERTS, DEPLOYMENTS, KEYS, TRIALS, VERDICTS, WORKERS, dead_letters
from services.registry.settings import Settings
from services.router.routing_table import RoutingTable
from tests.fixtures.onnx_files import linear
from tests.fixtures.registry import Running, registry_settings, running_registry
from tests.fixtures.waiting import PATIENCE_S, eventually, eventually_of

log = logging.getLogger(__name__)

TOPICS = [DEPLOYMENTS, KEYS, TRIALS, VERDICTS, WORKERS, ALERTS, dead_letters(VERDICTS, "registry")]


@dataclass
class Platform:
    """The registry, what a router and analytics know of it, and a bus to speak to it."""

    running: Running
    bus: KafkaBus
    routes: RoutingTable
    #: What is not known yet is empty.
    configs: dict[str, ServingConfig] = field(default_factory=lambda: defaultdict(ServingConfig))
    trials: dict[str, Trial] = field(default_factory=lambda: defaultdict(Trial))
    #: Trials that were ever taken back.
    withdrawn: set[str] = field(default_factory=set)

    async def call(self, method: str, path: str, status: int = 200, **kwargs: Any) -> Any:
        answer = await self.running.rest.request(method, f"/v1/{path}", **kwargs)
        assert answer.status_code == status, answer.text
        return answer.json() if answer.content else None

    async def experiment(self, **changes: Any) -> dict[str, Any]:
        made: dict[str, Any] = await self.call("POST", "experiments", 201, json=body(**changes))
        return made

    async def refusal(self, method: str, path: str, **kwargs: Any) -> tuple[int, str | None, str]:
        """Status, field and sentence of a call that fails."""
        answer: httpx.Response = await self.running.rest.request(method, f"/v1/{path}", **kwargs)
        assert answer.headers["content-type"] == "application/problem+json", answer.text
        problem = answer.json()
        return answer.status_code, problem.get("field"), problem["detail"]

    async def say(self, verdict: Verdict) -> None:
        """A verdict of analytics."""
        verdict.verdict_id = verdict.verdict_id or verdict.trial_id.encode()[-16:]
        await self.bus.publish(
            [Record(VERDICTS.name, verdict.trial_id.encode(), verdict.SerializeToString())]
        )

    async def load(self, *versions: str) -> None:
        """The heartbeat of a worker that has loaded these versions of churn."""
        digests = {v.version: v.artifact_digest for v in self.configs["churn"].versions}
        status = WorkerStatus(
            worker_id="w1",
            pool="default",
            state=WorkerStatus.STATE_READY,
            interval_ms=600_000,
            versions=[
                LoadedVersion(
                    model="churn",
                    version=version,
                    state=LoadedVersion.STATE_READY,
                    artifact_digest=digests[version],
                )
                for version in versions
            ],
        )
        await self.bus.publish([Record(WORKERS.name, b"w1", status.SerializeToString())])

    async def status_of(self, experiment_id: str, wanted: str) -> dict[str, Any]:
        """The experiment once it has the status `wanted`."""
        seen: dict[str, Any] = await eventually_of(
            lambda: self.call("GET", f"experiments/{experiment_id}"), lambda seen: seen["status"] == wanted
        )
        return seen

    async def told(self, condition: Callable[[], Any]) -> None:
        """Return once router or analytics know what `condition` asks for."""
        await eventually(condition)


def body(**changes: Any) -> dict[str, Any]:
    """An experiment of versions 1 and 2 of churn, on half of its traffic, that starts at once."""
    variants = [
        {"name": "old", "version": "1", "weight": 0.5},
        {"name": "new", "version": "2", "weight": 0.5},
    ]
    whole = {"model": "churn", "name": "newer", "traffic": 0.5, "variants": variants, "start": True}
    return {name: value for name, value in {**whole, **changes}.items() if value is not None}


@asynccontextmanager
async def platform_of(cfg: Settings) -> AsyncIterator[Platform]:
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(running_registry(cfg))
        bus = await stack.enter_async_context(KafkaBus(cfg.kafka_bootstrap_servers, "test"))
        platform = Platform(running, bus, RoutingTable(1.0))

        def configured(key: bytes, value: bytes | None) -> None:
            platform.routes.apply(key, value)
            if value is not None:
                platform.configs[key.decode()] = ServingConfig.FromString(value)

        def tried(key: bytes, value: bytes | None) -> None:
            if value is None:
                platform.trials.pop(key.decode(), None)
                platform.withdrawn.add(key.decode())
            else:
                platform.trials[key.decode()] = Trial.FromString(value)

        for topic, apply in ((DEPLOYMENTS, configured), (TRIALS, tried)):
            table = await stack.enter_async_context(bus.table(topic, apply))
            await table.ready(PATIENCE_S)
        yield platform


@pytest.fixture
async def settings(database_url: str, new_tansu: Callable[[], TansuServer], tmp_path: Path) -> Settings:
    broker = new_tansu().url
    await ensure_topics(broker, TOPICS)
    return registry_settings(database_url, broker, tmp_path)


@pytest.fixture
async def platform(settings: Settings) -> AsyncIterator[Platform]:
    async with platform_of(settings) as platform:
        await platform.running.make("churn", linear(weight=1), linear(weight=2), linear(weight=3))
        yield platform


def shares(config: ServingConfig) -> Mapping[str, int]:
    return {version.version: version.weight for version in config.versions}


async def test_an_experiment_from_its_draft_to_its_winner(platform: Platform) -> None:
    await platform.running.deploy("churn", {"1": 90, "2": 10})
    draft = await platform.experiment(
        start=False,
        variants=[{"name": "old", "version": "1"}, {"name": "new", "version": "2"}],
        targeting=[{"attribute": "country", "operator": "in", "values": ["de", "fr"]}],
        overrides=[{"unit": "alice", "variant": "new"}],
        metrics=[{"name": "error_rate", "role": "guardrail"}, {"name": "revenue", "missing": "zero"}],
        minimal_effect=0.1,
        planned_units=5000,
    )
    identity = draft["experiment_id"]
    assert draft["status"] == "draft"
    assert [variant["weight"] for variant in draft["variants"]] == [0.5, 0.5]
    await platform.told(lambda: identity in platform.trials)
    assert not platform.trials[identity].started_at_us
    await platform.call("PUT", "models/churn/holdout", json={"share": 0.02})
    started = await platform.call("POST", f"experiments/{identity}/start")
    assert (started["status"], started["waiting_for"]) == ("running", None)
    await platform.told(
        lambda: platform.configs["churn"].experiments and platform.trials[identity].started_at_us
    )
    config, trial = platform.configs["churn"], platform.trials[identity]
    assert config.holdout == 200
    (served,) = config.experiments
    assert sum(span.last - span.first + 1 for span in served.layer) == 5000
    assert [(arm.name, arm.version, arm.weight) for arm in trial.arms] == [
        ("old", "1", 5000),
        ("new", "2", 5000),
    ]
    assert (trial.revision, trial.planned_units) == (config.revision, 5000)
    assert [(m.name, m.margin, m.margin_is_relative) for m in trial.metrics] == [
        ("error_rate", 0.01, False),
        ("revenue", 0.1, True),
    ]

    # What is explained is what a router does.
    route = platform.routes.find("churn")
    assert route is not None
    assert route.experiments is not None
    met = 0
    for number in range(60):
        unit = "alice" if number == 0 else f"user-{number}"
        asked = PredictRequest(unit=unit, request_id=bytes(16))
        asked.attributes["country"].string_value = "de"
        assigned = route.experiments.assign(asked)
        where = {"unit": unit, "attribute.country": "de"}
        said = await platform.call("GET", f"experiments/{identity}/assignment", params=where)
        assert said["in_experiment"] == (assigned is not None), said
        if assigned is not None:
            met += 1
            assert said["variant"] == served.variants[assigned.variant].name
            assert said["propensity"] == (1.0 if assigned.overridden else 0.5)
    assert 10 < met < 55
    elsewhere = {"unit": "user-1", "attribute.country": "it"}
    said = await platform.call("GET", f"experiments/{identity}/assignment", params=elsewhere)
    assert not said["in_experiment"]
    assert said["because"].startswith("The request is not in the experiment: ")

    # Weights grow: nobody leaves the variant that gains.
    before = {b for piece in served.buckets if piece.variant == 1 for b in range(piece.first, piece.last + 1)}
    heavier = [{"name": "old", "version": "1", "weight": 0.2}, {"name": "new", "version": "2", "weight": 0.8}]
    await platform.call("PATCH", f"experiments/{identity}", json={"variants": heavier})
    await platform.told(lambda: platform.trials[identity].arms[1].weight == 8000)
    await platform.told(lambda: platform.configs["churn"].revision >= platform.trials[identity].revision)
    (served,) = platform.configs["churn"].experiments
    after = {b for piece in served.buckets if piece.variant == 1 for b in range(piece.first, piece.last + 1)}
    assert before < after
    assert len(after) == 8000

    # It stays through whatever is deployed, and what it needs stays too.
    assert (await platform.running.deploy("churn", {"1": 100, "2": 0})).status_code == 200
    await platform.call("PUT", "models/churn/aliases/champion", json={"version": "1"})
    await platform.told(lambda: platform.configs["churn"].aliases)
    assert [one.experiment_id for one in platform.configs["churn"].experiments] == [identity]
    assert platform.configs["churn"].holdout == 200
    gone = {"versions": [{"version": "1", "weight": 100}]}
    status, named, why = await platform.refusal("PUT", "deployments/churn", json=gone)
    assert (status, named) == (409, "versions")
    assert identity in why
    status, named, why = await platform.refusal("DELETE", "deployments/churn")
    assert (status, named) == (409, "model")
    assert identity in why
    for name, value in (("unit", "session"), ("alpha", 0.1), ("metrics", [])):
        status, named, _ = await platform.refusal("PATCH", f"experiments/{identity}", json={name: value})
        assert (status, named) == (409, name)
    status, named, why = await platform.refusal("POST", "experiments", json=body(traffic=0.6))
    assert (status, named) == (409, "traffic")
    assert "0.5 is free" in why
    assert identity in why

    # The kill switch, with a winner: measured by hand, asserted generously.
    stop = {"reason": "good enough", "winner": "new"}
    stopped = await platform.call("POST", f"experiments/{identity}/stop", json=stop)
    answered = time.monotonic()
    await platform.told(lambda: not platform.configs["churn"].experiments)
    log.info("a router knew %.0f ms after the answer", 1000 * (time.monotonic() - answered))
    assert stopped["status"] == "stopped"
    assert shares(platform.configs["churn"]) == {"1": 0, "2": 10_000}
    await platform.told(lambda: platform.trials[identity].stopped_at_us)
    assert not platform.trials[identity].closed
    events = (await platform.call("GET", f"experiments/{identity}/history"))["events"]
    assert [event["kind"] for event in events] == ["stopped", "changed", "started", "created"]
    assert "good enough" in events[0]["reason"]
    listed = await platform.call("GET", "experiments", params={"model": "churn", "status": "stopped"})
    assert [one["experiment_id"] for one in listed["experiments"]] == [identity]


async def test_what_an_experiment_brings_is_loaded_first_and_leaves_with_it(platform: Platform) -> None:
    await platform.running.deploy("churn", {"1": 100})
    # While nobody has loaded version 2, nobody is sent to it.
    first = await platform.experiment(traffic=0.25)
    assert first["status"] == "scheduled"
    assert "version 2" in first["waiting_for"]
    await platform.told(lambda: len(platform.configs["churn"].versions) == 2)
    assert not platform.configs["churn"].experiments
    assert [version.held for version in platform.configs["churn"].versions] == [False, True]
    assert (await platform.running.deploy("churn", {"1": 100}, log_payloads=False)).status_code == 200
    await platform.told(lambda: not platform.configs["churn"].log_payloads)
    assert shares(platform.configs["churn"]) == {"1": 10_000, "2": 0}
    await platform.load("1", "2")
    await platform.status_of(first["experiment_id"], "running")
    second = await platform.experiment(traffic=0.75)
    assert second["status"] == "running"
    await platform.told(lambda: len(platform.configs["churn"].experiments) == 2)
    owned = [
        {bucket for span in one.layer for bucket in range(span.first, span.last + 1)}
        for one in platform.configs["churn"].experiments
    ]
    assert not owned[0] & owned[1]
    assert len(owned[0] | owned[1]) == 10_000
    # The second still needs it, then nothing does.
    await platform.call("POST", f"experiments/{first['experiment_id']}/stop")
    await platform.told(lambda: len(platform.configs["churn"].experiments) == 1)
    assert shares(platform.configs["churn"]) == {"1": 10_000, "2": 0}
    await platform.call("POST", f"experiments/{second['experiment_id']}/stop")
    await platform.told(lambda: shares(platform.configs["churn"]) == {"1": 10_000})
    # What an earlier one is to start with cannot be deleted.
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    third = await platform.experiment(start_at=later)
    assert third["status"] == "scheduled"
    status, named, why = await platform.refusal("DELETE", "models/churn/versions/2")
    assert (status, named) == (409, "version")
    assert third["experiment_id"] in why
    await platform.call("POST", f"experiments/{third['experiment_id']}/stop")
    await platform.call("DELETE", "models/churn/versions/2", 204)
    # A model takes its experiments with it.
    await platform.told(lambda: first["experiment_id"] in platform.trials)
    await platform.call("DELETE", "deployments/churn", 204)
    await platform.call("DELETE", "models/churn", 204)
    await platform.told(lambda: first["experiment_id"] not in platform.trials)
    assert (await platform.refusal("GET", f"experiments/{first['experiment_id']}"))[0] == 404


async def test_the_controller_acts_on_verdicts_and_goes_on_after_a_restart(settings: Settings) -> None:
    async with platform_of(settings) as platform:
        await platform.running.make("churn", linear(weight=1), linear(weight=2))
        await platform.running.deploy("churn", {"1": 50, "2": 50})
        metrics = [{"name": "error_rate", "role": "guardrail"}, {"name": "sold"}]
        bandit = {"min_weight": 0.1, "max_change": 0.15, "update_every_s": 1}
        moving = await platform.experiment(metrics=metrics, bandit=bandit, traffic=0.3)
        watched = await platform.experiment(metrics=metrics, auto_stop=True, traffic=0.3)
        soon = (datetime.now(UTC) + timedelta(seconds=1)).isoformat()
        ending = await platform.experiment(stop_at=soon, traffic=0.2)
        await platform.told(lambda: moving["experiment_id"] in platform.trials)
        trial = platform.trials[moving["experiment_id"]]
        assert (trial.bandit.min_weight, trial.bandit.max_change) == (1000, 1500)
        await platform.say(
            Verdict(
                trial_id=moving["experiment_id"],
                trial_revision=trial.revision,
                computed_at_us=2_000_000,
                weights=[500, 9500],
                summary="new sells more",
            )
        )
        await platform.told(lambda: platform.trials[moving["experiment_id"]].arms[1].weight == 6500)
        moved = await platform.call("GET", f"experiments/{moving['experiment_id']}")
        assert moved["verdict"]["summary"] == "new sells more"
        assert [variant["weight"] for variant in moved["variants"]] == [0.35, 0.65]
        # One that was overtaken changes nothing; nor does what cannot be read.
        old = Verdict(trial_id=moving["experiment_id"], computed_at_us=1_000_000, summary="old")
        await platform.bus.publish([Record(VERDICTS.name, b"x", b"\xff\xff")])
        await platform.say(old)
        await platform.status_of(ending["experiment_id"], "stopped")
    # Another registry goes on where this one was.
    async with platform_of(settings) as platform:
        harmed = Evidence(
            metric="error_rate",
            role=TrialMetric.ROLE_GUARDRAIL,
            arm="new",
            finding=Evidence.FINDING_HARMFUL,
            low=float("-inf"),
            high=float("inf"),
            reason="12 of 431 failed",
        )
        await platform.say(
            Verdict(trial_id=watched["experiment_id"], computed_at_us=3_000_000, evidence=[harmed])
        )
        stopped = await platform.status_of(watched["experiment_id"], "stopped")
        assert stopped["stopped_because"] == "new is proven to harm error_rate: 12 of 431 failed"
        assert stopped["verdict"]["evidence"][0]["low"] is None
        same = await platform.call("GET", f"experiments/{moving['experiment_id']}")
        assert (same["status"], same["verdict"]["summary"]) == ("running", "new sells more")
        await platform.told(lambda: len(platform.configs["churn"].experiments) == 1)
        # What the broker lost is published again.
        lost = moving["experiment_id"]
        await platform.bus.publish([Record(TRIALS.name, lost.encode(), None)])
        # Both may be told at once.
        await platform.told(lambda: lost in platform.withdrawn and lost in platform.trials)
        counted = await eventually_of(
            lambda: platform.running.rest.get("/metrics"),
            lambda seen: 'headrace_registry_experiments{status="stopped"} 2.0' in seen.text,
        )
        assert 'headrace_registry_decisions_total{action="stop",kind="experiment"} 1.0' in counted.text
        for topic in ("analytics.verdicts.v1", "drift.alerts.v1"):
            assert f'headrace_registry_lag{{topic="{topic}"}}' in counted.text
            assert f'headrace_registry_dead_letters{{topic="{topic}"}}' in counted.text


async def test_bad_input_names_its_field(platform: Platform) -> None:
    await platform.running.deploy("churn", {"1": 50, "2": 50})

    def variants(*weights: float, names: str = "ab", versions: str = "12") -> dict[str, Any]:
        entries = zip(names, versions, weights, strict=True)
        return {"variants": [{"name": n, "version": v, "weight": w} for n, v, w in entries]}

    def metric(**fields: Any) -> dict[str, Any]:
        return {"metrics": [{"name": "m", **fields}]}

    condition = {"attribute": "a", "operator": "lt", "values": [1, 2]}
    wrong: list[tuple[dict[str, Any], int, str]] = [
        (variants(0.5, 0.4), 422, "variants"),
        (variants(0.5, 0.5, names="aa"), 422, "variants[1].name"),
        (variants(0.5, 0.5, versions="19"), 422, "variants[1].version"),
        (variants(0.50001, 0.49999), 422, "variants[0].weight"),
        ({"variants": [{"name": "a", "version": "1"}]}, 422, "variants"),
        ({"metrics": [{"name": "m"}, {"name": "m"}]}, 422, "metrics[1].name"),
        (metric(low=1.0, high=0.0), 422, "metrics[0]"),
        (metric(quantile=1.5), 422, "metrics[0].quantile"),
        (metric(name="shadow_error_rate", margin=0.1, margin_is_relative=True), 422, "metrics[0].name"),
        ({"alpha": 0}, 422, "alpha"),
        ({"alpha": 1.5}, 422, "alpha"),
        ({"traffic": 0}, 422, "traffic"),
        ({"overrides": [{"unit": "u", "variant": "other"}]}, 422, "overrides[0].variant"),
        ({"targeting": [condition]}, 422, "targeting[0].values"),
        (
            {"targeting": [{"attribute": "a", "operator": "in", "values": [None]}]},
            422,
            "targeting[0].values[0]",
        ),
        ({"stop_at": "2020-01-01T00:00:00Z"}, 422, "stop_at"),
        ({"auto_stop": True}, 422, "auto_stop"),
        ({"bandit": {}}, 422, "bandit"),
        ({"salt": "layer:churn"}, 422, "salt"),
        ({"model": "nobody"}, 404, "model"),
        ({"surprise": 1}, 422, "surprise"),
    ]
    for changes, expected, at in wrong:
        status, named, _ = await platform.refusal("POST", "experiments", json=body(**changes))
        assert (status, named) == (expected, at), changes
    refusal = platform.refusal
    assert (await refusal("GET", "experiments/exp_0"))[:2] == (404, "experiment_id")
    assert (await refusal("GET", "experiments/exp%00"))[:2] == (404, "experiment_id")
    assert (await refusal("PUT", "models/churn/holdout", json={"share": 2}))[:2] == (422, "share")
    draft = (await platform.experiment(start=False))["experiment_id"]
    assert (await refusal("GET", f"experiments/{draft}/assignment"))[:2] == (422, "unit")
    assert (await refusal("PATCH", f"experiments/{draft}", json={"name": None}))[:2] == (422, "name")
    assert (await refusal("POST", f"experiments/{draft}/stop"))[:2] == (409, "experiment_id")
    await platform.call("PATCH", f"experiments/{draft}", json={"unit": "session", "traffic": 1})
    await platform.told(lambda: platform.trials[draft].unit == Unit.UNIT_SESSION)
    await platform.call("DELETE", f"experiments/{draft}", 204)
    await platform.told(lambda: draft not in platform.trials)
    await platform.call("DELETE", "deployments/churn", 204)
    assert (await refusal("POST", "experiments", json=body()))[:2] == (409, "model")
    assert (await platform.call("GET", "experiments"))["experiments"] == []
