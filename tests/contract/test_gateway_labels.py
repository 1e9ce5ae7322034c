"""By whose classes an answer is labelled, while deployments change: gateways and routers hear of them one
after the other, and answers are on their way meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from headrace.v1.control_pb2 import ServedVersion, ServingConfig
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest

from services.common.bus import Record
from services.common.topics import DEPLOYMENTS
from tests.fixtures.gateway import (
    ADMIN,
    Running,
    answer_like_a_worker,
    cancer_signature,
    running_gateway,
)
from tests.fixtures.waiting import PATIENCE_S, eventually, eventually_of

BENIGN = [10.0, 2.0, 3.0]


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Running]:
    async with running_gateway(tmp_path) as running:
        yield running


async def deploy(gateway: Running, revision: int, **classes: list[str]) -> None:
    """Versions `v1`, … with these classes and no others."""
    served = []
    for name, labels in classes.items():
        signature = cancer_signature()
        signature.ClearField("classes")
        signature.classes.extend(labels)
        served.append(ServedVersion(version=name.removeprefix("v"), signature=signature, weight=5000))
    config = ServingConfig(model="cancer", revision=revision, versions=served)
    await gateway.bus.publish([Record(DEPLOYMENTS.name, b"cancer", config.SerializeToString())])

    async def versions() -> list[str]:
        async with httpx.AsyncClient(base_url=gateway.base, headers={"x-api-key": ADMIN}) as client:
            listed: list[str] = (await client.get("/v2/models/cancer")).json()["versions"]
            return listed

    await eventually_of(versions, lambda found: found == [version.version for version in served])


async def labels(gateway: Running) -> list[Any]:
    """Of one row, which has a way of its own, and of two."""
    async with httpx.AsyncClient(
        base_url=gateway.base, headers={"x-api-key": ADMIN}, timeout=PATIENCE_S
    ) as client:
        said = []
        for rows in ([BENIGN], [BENIGN, BENIGN]):
            answer = await client.post("/v1/predict", json={"model": "cancer", "inputs": rows})
            assert answer.status_code == 200, answer.text
            said.append(answer.json()["prediction"])
        assert said[1] == said[0] * 2
        return list(said[0])


def by(version: str) -> Any:
    def answer(request: PredictRequest) -> PredictReply:
        reply = answer_like_a_worker(request)
        reply.version = version
        return reply

    return answer


async def test_a_version_not_heard_of_is_not_labelled_by_another(gateway: Running) -> None:
    assert await labels(gateway) == ["benign"]
    gateway.router.answer = by("3")
    assert await labels(gateway) == [1]
    await deploy(gateway, 4, v3=["benign", "malignant"])
    assert await labels(gateway) == ["malignant"]


async def test_answers_of_a_version_that_went_keep_its_labels(gateway: Running) -> None:
    await deploy(gateway, 4, v3=["no", "yes"])
    gateway.router.answer = by("2")
    assert await labels(gateway) == ["benign"]
    await deploy(gateway, 5, v2=["0", "1"], v4=["a", "b"])
    assert await labels(gateway) == ["1"]
    gateway.router.answer = by("3")
    assert await labels(gateway) == ["yes"]


@pytest.mark.parametrize("rows", [1, 2])
async def test_an_answer_is_labelled_by_what_was_heard_since_its_request(gateway: Running, rows: int) -> None:
    gateway.router.answer = lambda _: None
    body = {"model": "cancer", "inputs": [BENIGN] * rows}
    async with httpx.AsyncClient(
        base_url=gateway.base, headers={"x-api-key": ADMIN}, timeout=PATIENCE_S
    ) as client:
        asking = asyncio.create_task(client.post("/v1/predict", json=body))
        await eventually(lambda: gateway.router.requests)
        await deploy(gateway, 4, v3=["no", "yes"])
        gateway.router.peers[0].reply(by("3")(gateway.router.requests[0]))
        assert (await asking).json()["prediction"] == ["yes"] * rows
