"""Experiments and rollouts on the running platform: from assignment to verdict to a version that takes over,
or does not."""

from __future__ import annotations

import asyncio
import json
import random
import secrets
from typing import Any

import httpx
from onnx import TensorProto, helper

from deploy.embedded.stack import Stack
from tests.e2e.rest import Json, caller
from tests.e2e.traffic import Traffic, flowing
from tests.fixtures.asking import until
from tests.fixtures.onnx_files import model_bytes, value
from tests.fixtures.waiting import eventually, eventually_of

NO_WAIT = {"min_duration_s": 0, "min_requests": 30}
#: For a whole rollout, on a machine that does many other things.
WHOLE_S = 240.0
#: Latencies on a machine that runs tests beside say nothing of a version.
ERRORS = {"name": "error_rate", "role": "guardrail", "direction": "decrease"}


def failing_from(threshold: float, sign: float = 1.0) -> bytes:
    """y = sign · x below `threshold`, and a failure of the model's own from there on: FP32 [batch, 1] →
    FP32 [batch, 1]. It makes 1 + ⌊x / threshold⌋ columns of x and multiplies them with a matrix that has one
    row."""
    return model_bytes(
        [value("x", TensorProto.FLOAT, "batch", 1)],
        [value("y", TensorProto.FLOAT, "batch", 1)],
        [
            helper.make_node("Mul", ["x", "scale"], ["scaled"]),
            helper.make_node("ReduceMax", ["scaled"], ["largest"], keepdims=0),
            helper.make_node("Cast", ["largest"], ["whole"], to=TensorProto.INT64),
            helper.make_node("Add", ["whole", "one"], ["columns"]),
            helper.make_node("Concat", ["one", "columns"], ["shape"], axis=0),
            helper.make_node("Expand", ["x", "shape"], ["wide"]),
            helper.make_node("MatMul", ["wide", "weight"], ["y"]),
        ],
        initializers=[
            helper.make_tensor("one", TensorProto.INT64, [1], [1]),
            helper.make_tensor("scale", TensorProto.FLOAT, [1], [1 / threshold]),
            helper.make_tensor("weight", TensorProto.FLOAT, [1, 1], [sign]),
        ],
    )


async def make(client: httpx.AsyncClient, kind: str, *versions: bytes) -> str:
    """A model of the test's own with these versions, the first one in service."""
    model = f"{kind}-{secrets.token_hex(4)}"
    (await client.post("/v1/models", json={"name": model})).raise_for_status()
    for number, content in enumerate(versions, 1):
        metadata = json.dumps({"version": str(number), "backend": "onnx"})
        files = [("files", ("model.onnx", content))]
        sent = await client.post(f"/v1/models/{model}/versions", data={"metadata": metadata}, files=files)
        sent.raise_for_status()
    # One request a batch: a row that fails takes no other with it.
    deployment = {"versions": [{"version": "1", "weight": 100}], "batching": {"max_rows": 1}}
    (await client.put(f"/v1/deployments/{model}", json=deployment)).raise_for_status()
    body = {"model": model, "inputs": [[0.0]]}
    await eventually_of(
        lambda: client.post("/v1/predict", json=body), lambda answer: answer.status_code == 200
    )
    return model


async def roll(client: httpx.AsyncClient, model: str, **changes: Any) -> str:
    """Start to bring version 2 of `model` into service."""
    body = {"model": model, "version": "2", "metrics": [ERRORS | {"margin": 0.01}], "bake_s": 2} | changes
    answer = await client.post("/v1/rollouts", json=body)
    assert answer.status_code == 201, answer.text
    rollout_id: str = answer.json()["rollout_id"]
    return rollout_id


async def weights(client: httpx.AsyncClient, model: str) -> dict[str, float]:
    shown = (await client.get(f"/v1/deployments/{model}")).json()
    return {version["version"]: version["weight"] for version in shown["versions"]}


async def decisions(client: httpx.AsyncClient, rollout_id: str) -> list[Json]:
    """What was done, oldest first; waits and holds left out."""
    events = (await client.get(f"/v1/rollouts/{rollout_id}/events?limit=1000")).json()["events"]
    return [event for event in reversed(events) if event["action"] not in {"wait", "hold"}]


def worse(rng: random.Random) -> float:
    """1% of the requests fail in both versions, 20% in version 2 alone."""
    return rng.choices([0.5, 1.5, 2.5], [0.79, 0.2, 0.01])[0]


def better(rng: random.Random) -> float:
    """5% of the requests fail in version 1."""
    return rng.choices([0.5, 1.5], [0.95, 0.05])[0]


async def kill_both(stack: Stack) -> None:
    """SIGKILL to registry and analytics; the supervisor starts them again."""
    killed = {name: stack.kill(name) for name in ("registry", "analytics")}
    for name, pid in killed.items():
        await asyncio.to_thread(stack.wait_ready, name, not_pid=pid, timeout=120)


async def test_a_worse_version_goes_back_and_a_better_one_takes_over_whatever_is_killed(
    bare_platform: Stack,
) -> None:
    async with caller(bare_platform) as client:
        bad_model = await make(client, "worse", failing_from(2), failing_from(1))
        good_model = await make(client, "better", failing_from(1), failing_from(100))
        bad, good = Traffic(client, bad_model, 60, worse), Traffic(client, good_model, 90, better, seed=1)
        async with flowing(bad, good):
            many = [{"weight": 0.2, "min_duration_s": 0, "min_requests": 1900}]
            going_back = await roll(client, bad_model, steps=many)
            steps = [{"weight": weight, **NO_WAIT} for weight in (0.1, 0.3, 0.5)]
            taking_over = await roll(client, good_model, steps=steps)
            for rollout in (going_back, taking_over):
                await until(client, f"/v1/rollouts/{rollout}", lambda shown: shown["weight"] > 0)
            # Some evidence is there, none that decides.
            await eventually(lambda: good.by("2") >= 20 and bad.by("2") >= 5)
            await kill_both(bare_platform)
            back = await until(
                client, f"/v1/rollouts/{going_back}", lambda shown: shown["status"] == "rolled_back", WHOLE_S
            )
            await until(
                client, f"/v1/rollouts/{taking_over}", lambda shown: shown["status"] == "completed", WHOLE_S
            )
            # What was in service before is gone by then; nobody may notice.
            served = len(good.answers)
            await eventually(lambda: len(good.answers) >= served + 200)

        # Failures that only version 2 can have, and all that either can have, count as its answers.
        answered_by_2 = bad.by("2") + sum(answer.x > 1 and answer.version != "2" for answer in bad.failed)
        assert 10 <= answered_by_2 < 2000, back["reason"]
        assert {answer.x for answer in bad.failed} <= {1.5, 2.5}
        assert [event["action"] for event in await decisions(client, going_back)] == ["enter", "roll_back"]
        assert back["reason"].startswith("error_rate: ")
        assert await weights(client, bad_model) == {"1": 100.0}
        assert (await bad.send("somebody", 1.5)).status == 200

        assert not [answer for answer in good.failed if answer.x != 1.5]
        assert good.by("1") > 0 < good.by("2")
        moves = [(event["action"], event["weight"]) for event in await decisions(client, taking_over)]
        assert moves == [("enter", 0.1), ("enter", 0.3), ("enter", 0.5), ("enter", 1.0), ("complete", 1.0)]
        assert await weights(client, good_model) == {"2": 100.0}
        assert (await good.send("somebody", 1.5)).status == 200


async def test_a_shadow_that_answers_otherwise_never_answers_and_an_equal_one_does(
    bare_platform: Stack,
) -> None:
    async with caller(bare_platform) as client:
        model = await make(
            client, "shadowed", failing_from(100), failing_from(100, sign=-1.0), failing_from(101)
        )
        traffic = Traffic(client, model, 120, lambda rng: rng.random())
        shadow = {"shadow": 1, "min_duration_s": 0, "min_requests": 100, "match_rate": 0.9}
        plan = {
            "strategy": "shadow_canary",
            "steps": [shadow, {"weight": 0.5, **NO_WAIT}],
            "metrics": [ERRORS | {"margin": 0.05}],
        }
        async with flowing(traffic):
            other = await roll(client, model, **plan)
            shown = await until(client, f"/v1/rollouts/{other}", lambda seen: seen["status"] == "rolled_back")
            assert "shadow_disagreement" in shown["reason"]
            assert traffic.by("2") == 0
            equal = await roll(client, model, version="3", **plan)
            await until(client, f"/v1/rollouts/{equal}", lambda seen: seen["status"] == "completed", WHOLE_S)
        entered = [event["weight"] for event in await decisions(client, equal)]
        assert entered == [0.0, 0.5, 1.0, 1.0]
        assert traffic.failed == []
        assert (await client.get(f"/v1/deployments/{model}")).json()["shadow"] is None


async def test_assignment_is_sticky_as_explained_and_the_kill_switch_ends_it(bare_platform: Stack) -> None:
    async with caller(bare_platform) as client:
        model = await make(client, "split", failing_from(100), failing_from(101))
        traffic = Traffic(client, model, 50, lambda rng: rng.random())
        users = [f"visitor-{number}" for number in range(40)]
        variants: list[Json] = [
            {"name": "now", "version": "1", "weight": 0.7},
            {"name": "next", "version": "2", "weight": 0.3},
        ]
        metrics = [{"name": "error_rate", "role": "guardrail"}]
        asked = {"model": model, "variants": variants, "metrics": metrics, "start": True}
        made = await client.post("/v1/experiments", json=asked)
        assert made.status_code == 201, made.text
        experiment = made.json()["experiment_id"]

        async def variant_of(user: str) -> str:
            """As it is explained, and as it is answered."""
            explained = (
                await client.get(f"/v1/experiments/{experiment}/assignment", params={"unit": user})
            ).json()
            answer = await eventually_of(
                lambda: traffic.send(user, 0.5),
                lambda seen: (
                    seen.body.get("experiment") == experiment and seen.body["variant"] == explained["variant"]
                ),
            )
            assert answer.version == explained["version"], explained
            variant: str = explained["variant"]
            return variant

        before = {user: await variant_of(user) for user in users}
        assert set(before.values()) == {"now", "next"}
        grown = [variant | {"weight": 0.5} for variant in variants]
        changed = await client.patch(f"/v1/experiments/{experiment}", json={"variants": grown})
        assert changed.status_code == 200, changed.text
        after = {user: await variant_of(user) for user in users}
        assert all(after[user] == "next" for user in users if before[user] == "next")
        assert list(after.values()).count("next") > list(before.values()).count("next")

        async with flowing(traffic):
            await eventually(lambda: any(a.body.get("experiment") for a in traffic.answers))
            stopped = await client.post(f"/v1/experiments/{experiment}/stop", json={"reason": "enough"})
            assert stopped.status_code == 200, stopped.text
            # From the first answer that no experiment assigned, none is assigned any more.
            free = await eventually_of(
                lambda: traffic.send(users[0], 0.5), lambda seen: "experiment" not in seen.body
            )
            assert free.version == "1"
            sent = len(traffic.answers)
            await eventually(lambda: len(traffic.answers) >= sent + 60)
        assert not [answer for answer in traffic.answers[sent + 20 :] if answer.body.get("experiment")]
        assert traffic.failed == []
