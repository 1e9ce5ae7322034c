"""What is left of a deleted model: the names of its versions stay taken."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from deploy.embedded.tansu import TansuServer
from services.common.bus.admin import ensure_topics
from services.common.topics import DEPLOYMENTS, KEYS
from tests.fixtures.onnx_files import linear
from tests.fixtures.registry import Running, registry_settings, running_registry


@pytest.fixture
async def running(
    database_url: str, new_tansu: Callable[[], TansuServer], tmp_path: Path
) -> AsyncIterator[Running]:
    broker = new_tansu().url
    await ensure_topics(broker, [DEPLOYMENTS, KEYS])
    async with running_registry(registry_settings(database_url, broker, tmp_path)) as registry:
        yield registry


async def test_a_model_made_again_gives_no_version_name_twice(running: Running) -> None:
    """Analytics and drift count by (model, version): another artifact must not go on with the old counts."""
    await running.make("churn", linear(weight=1), linear(weight=2))
    await running.upload("churn", {"model.onnx": linear(weight=3)}, version="spring")
    assert (await running.rest.delete("/v1/models/churn")).status_code == 204
    await running.make("churn")
    made = await running.upload("churn", {"model.onnx": linear(weight=4)})
    assert (made.status_code, made.json()["version"]) == (201, "3"), made.text
    for name in ("1", "spring"):
        refused = await running.upload("churn", {"model.onnx": linear(weight=1)}, version=name)
        assert (refused.status_code, refused.json()["code"]) == (409, "ALREADY_EXISTS"), refused.text
        assert refused.json()["field"] == "version"
    listed = (await running.rest.get("/v1/models/churn/versions")).json()["versions"]
    assert [version["version"] for version in listed] == ["3"]
    # Another model's names are its own.
    await running.make("fraud", linear(weight=1))
