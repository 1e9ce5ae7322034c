"""Files and old batches on a real PostgreSQL, without a gateway around them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import update

from services.common.clock import ManualClock
from services.common.db import engine, migrate, transaction
from services.common.errors import NotFound, Unavailable
from services.common.objects import ArtifactStore, InputSources
from services.gateway.jobs.backend import Backend
from services.gateway.jobs.openai_batches import OpenAIBatches, decode_batch
from services.gateway.jobs.openai_files import Files, Reader
from services.gateway.jobs.openai_tables import OpenAIBatchRow

MIGRATIONS = Path("services/gateway/migrations")
OWNER = Reader("owner")


class Failing(ArtifactStore):
    """A store whose writer dies, before or after the object is there, while `dies` says so."""

    dies = ""

    async def put(self, path: str, data: bytes | Path) -> None:
        if self.dies == "before":
            raise Unavailable("killed")
        await super().put(path, data)
        if self.dies == "after":
            raise Unavailable("killed")


@dataclass
class Here:
    files: Files
    batches: OpenAIBatches
    backend: Backend
    store: Failing
    clock: ManualClock
    content: Path

    async def objects(self) -> list[str]:
        return [one.path for one in await self.store.list("files")]


@pytest.fixture
async def here(database_url: str, tmp_path: Path) -> AsyncIterator[Here]:
    await migrate(database_url, "gateway", MIGRATIONS)
    store = Failing((tmp_path / "store").as_uri())
    clock = ManualClock()
    backend = Backend(engine(database_url, "gateway"), store, InputSources(store, ("store://files/",)))
    files = Files(lambda: backend, clock, tmp_path / "work", max_bytes=1 << 20)
    batches = OpenAIBatches(lambda: backend, files, clock, lambda: None)
    content = tmp_path / "content"
    content.write_bytes(b"{}\n")
    yield Here(files, batches, backend, store, clock, content)
    await backend.sources.close()
    await backend.engine.dispose()
    await store.close()


@pytest.mark.parametrize("dies", ["before", "after"])
async def test_a_file_whose_writer_died_is_nobodys_and_is_swept_away(here: Here, dies: str) -> None:
    here.store.dies = dies
    with pytest.raises(Unavailable):
        await here.files.store(here.content, "a.jsonl", "owner", "batch", file_id="file-a")
    with pytest.raises(NotFound):
        await here.files.get("file-a", OWNER)
    assert await here.files.list(OWNER, purpose=None, limit=9, after=None, oldest_first=True) == ([], False)

    await here.files.sweep()  # it may still be on its way
    assert len(await here.objects()) == (dies == "after")
    here.clock.advance(7 * 3600)
    await here.files.sweep()
    assert await here.objects() == []


async def test_a_file_that_is_stored_again_becomes_readable_and_stays_so(here: Here) -> None:
    async def store() -> None:
        await here.files.store(here.content, "a.jsonl", "owner", "batch", file_id="file-a")

    here.store.dies = "after"
    with pytest.raises(Unavailable):
        await store()
    here.store.dies = ""
    await store()
    here.store.dies = "before"
    with pytest.raises(Unavailable):
        await store()

    here.clock.advance(7 * 3600)
    await here.files.sweep()
    file = await here.files.get("file-a", OWNER)
    assert b"".join([piece async for piece in here.files.content(file)]) == b"{}\n"


async def test_batches_are_forgotten_some_time_after_their_end(here: Here) -> None:
    file = await here.files.store(here.content, "a.jsonl", "owner", "batch")
    body = '{"input_file_id": "%s", "endpoint": "/v1/predict", "completion_window": "24h"}'
    request = decode_batch((body % file.file_id).encode())
    old, other = [await here.batches.create(request, OWNER) for _ in range(2)]
    async with transaction(here.backend.engine) as session:
        ended = update(OpenAIBatchRow).where(OpenAIBatchRow.batch_id == old.batch_id)
        await session.execute(ended.values(state="completed", ended_at=here.clock.now()))

    assert await here.batches.forget(here.clock.now()) == 0
    here.clock.advance(10)
    assert await here.batches.forget(here.clock.now() - timedelta(seconds=5)) == 1
    with pytest.raises(NotFound):
        await here.batches.get(old.batch_id, OWNER)
    assert (await here.batches.get(other.batch_id, OWNER)).state == "validating"
