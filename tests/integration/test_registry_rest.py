"""The registry over REST on real PostgreSQL and a real broker."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from headrace.v1.control_pb2 import ServingConfig
from services.common.bus import KafkaBus
from services.common.bus.admin import ensure_topics
from services.common.topics import DEPLOYMENTS, KEYS
from tests.fixtures.onnx_files import linear
from tests.fixtures.registry import Running, registry_settings, running_registry


@pytest.fixture
async def running(database_url: str, kafka_bootstrap: str, tmp_path: Path) -> AsyncIterator[Running]:
    await ensure_topics(kafka_bootstrap, [DEPLOYMENTS, KEYS])
    async with running_registry(registry_settings(database_url, kafka_bootstrap, tmp_path)) as registry:
        yield registry


async def test_upload_deploy_record(running: Running, kafka_bootstrap: str) -> None:
    await running.make("churn", linear(weight=1), linear(weight=2))
    deployed = await running.deploy("churn", {"1": 90, "2": 10})
    assert deployed.status_code == 200, deployed.text
