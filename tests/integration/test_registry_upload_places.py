"""Uploads take places by the key that the gateway names."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from deploy.embedded.tansu import TansuServer
from services.common.bus.admin import ensure_topics
from services.common.topics import DEPLOYMENTS, KEYS
from tests.fixtures.onnx_files import linear
from tests.fixtures.registry import registry_settings, running_registry
from tests.fixtures.waiting import eventually

PATH = "/v1/models/churn/versions"
KIND = "multipart/form-data; boundary=b"
HEAD = b'--b\r\nContent-Disposition: form-data; name="files"; filename="model.onnx"\r\n\r\n'


async def test_one_key_that_uploads_slowly_leaves_a_place_to_others(
    database_url: str, new_tansu: Callable[[], TansuServer], tmp_path: Path
) -> None:
    broker, more = new_tansu().url, asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield HEAD
        await more.wait()
        yield linear(weight=1) + b"\r\n--b--\r\n"

    await ensure_topics(broker, [DEPLOYMENTS, KEYS])
    cfg = registry_settings(database_url, broker, tmp_path, max_uploads=2)
    async with running_registry(cfg) as running:
        await running.make("churn")

        def ask(key_id: str, content: bytes | AsyncIterator[bytes]) -> asyncio.Task[int]:
            headers = {"content-type": KIND, "x-headrace-key-id": key_id}

            async def status() -> int:
                return (await running.rest.post(PATH, content=content, headers=headers)).status_code

            return asyncio.create_task(status())

        first = ask("greedy", slow())
        received = tmp_path / "state" / "registry" / "uploads"
        await eventually(lambda: any(received.iterdir()))
        whole = HEAD + linear(weight=2) + b"\r\n--b--\r\n"
        assert await ask("greedy", whole) == 429
        assert await ask("guest", whole) == 201
        more.set()
        assert await first == 201
