"""OpenAI batches whose steps are cut short or held up, on a real PostgreSQL; the worker stands in."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import cast

import pytest

from services.common.clock import ManualClock
from services.common.db import engine, migrate, transaction
from services.common.errors import Aborted, InvalidArgument, NotFound, ResourceExhausted, Unavailable
from services.common.objects import ArtifactStore, InputSources
from services.gateway.catalogue import Catalogue
from services.gateway.jobs import openai_batches, openai_steps
from services.gateway.jobs.backend import Backend
from services.gateway.jobs.controller import Controller
from services.gateway.jobs.openai_files import Files, StoredFile
from services.gateway.jobs.openai_steps import Change, OpenAISteps
from services.gateway.jobs.openai_tables import OpenAIBatchRow
from services.gateway.jobs.service import JobService
from services.gateway.jobs.specs import JobSpec
from services.gateway.jobs.tables import JobRow
from services.gateway.jobs.views import Job
from services.gateway.keys import Key, KeyRing
from tests.fixtures.gateway import configs
from tests.fixtures.gateway_jobs import jobs
from tests.fixtures.waiting import eventually
from tests.integration.test_gateway_openai_batches import (
    benign_below_15,
    ended,
    lines,
    reaches,
    request,
    started,
)

MIGRATIONS = Path("services/gateway/migrations")


async def test_a_batch_whose_end_was_not_written_ends_as_it_should(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, lost = OpenAISteps._write, list[str]()

    async def lose_the_end(self: OpenAISteps, batch_id: str, change: Change) -> None:
        if change.values.get("state") == "completed" and len(lost) < 2:
            lost.append(batch_id)
            await write(self, batch_id, Change({}))  # nobody waits for the lease to run out
            raise ConnectionError("the database went away")
        await write(self, batch_id, change)

    monkeypatch.setattr(OpenAISteps, "_write", lose_the_end)
    async with jobs(database_url, tmp_path) as here:
        here.worker.instead = benign_below_15(here.worker.store)
        batch = await ended(here, await started(here, [request("a", input=[1, 2, 3])]))
        assert (batch["status"], batch["errors"]) == ("completed", None)
        assert len(lost) == 2
        assert [one["custom_id"] for one in await lines(here, batch["output_file_id"])] == ["a"]


async def test_failures_are_counted_in_a_row_and_what_is_away_is_none(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_steps, "_RETRY_S", 0.0)
    monkeypatch.setattr(openai_steps, "_LOOK_S", 0.0)
    monkeypatch.setattr(openai_steps, "_IDLE_S", 0.02)
    most = openai_steps._MAX_ATTEMPTS
    follow, finalize = OpenAISteps._follow, OpenAISteps._finalize
    followed, finalized = list[str](), list[str]()

    async def now_and_then(self: OpenAISteps, row: OpenAIBatchRow) -> Change:
        followed.append(row.batch_id)
        if len(followed) <= 3 * most:
            if len(followed) % 2:
                raise ValueError("nobody foresaw it")
        else:
            here.worker.gate.set()
        return await follow(self, row)

    async def away(self: OpenAISteps, row: OpenAIBatchRow) -> Change:
        finalized.append(row.batch_id)
        if len(finalized) < most:
            raise Unavailable("The store is away.")
        if len(finalized) == most:
            raise ValueError("nobody foresaw it")
        return await finalize(self, row)

    monkeypatch.setattr(OpenAISteps, "_follow", now_and_then)
    monkeypatch.setattr(OpenAISteps, "_finalize", away)
    async with jobs(database_url, tmp_path) as here:
        here.worker.gate.clear()
        here.worker.instead = benign_below_15(here.worker.store)
        batch = await ended(here, await started(here, [request("a", input=[1, 2, 3])]))
        assert (batch["status"], batch["errors"]) == ("completed", None)
        assert len(followed) > 3 * most
        assert len(finalized) == most + 1


async def test_a_batch_waits_while_its_key_has_no_room(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_steps, "_NO_ROOM_S", 0.02)
    monkeypatch.setattr(openai_steps, "_IDLE_S", 0.02)
    submit, refused = JobService.submit, list[JobSpec]()

    async def full(self: JobService, spec: JobSpec, caller: Key) -> Job:
        if len(refused) < 25:
            refused.append(spec)
            kind = ResourceExhausted if len(refused) % 2 else Aborted
            raise kind("This key has 1 jobs under way.")
        return await submit(self, spec, caller)

    monkeypatch.setattr(JobService, "submit", full)
    async with jobs(database_url, tmp_path) as here:
        here.worker.instead = benign_below_15(here.worker.store)
        batch = await ended(here, await started(here, [request("a", input=[1, 2, 3])]))
        assert (batch["status"], batch["errors"], len(refused)) == ("completed", None, 25)


async def test_a_batch_that_never_finds_room_expires(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_batches, "WINDOW_S", 1)
    monkeypatch.setattr(openai_steps, "_NO_ROOM_S", 0.1)

    async def full(self: JobService, spec: JobSpec, caller: Key) -> Job:
        raise ResourceExhausted("This key has 1 jobs under way.")

    monkeypatch.setattr(JobService, "submit", full)
    async with jobs(database_url, tmp_path) as here:
        assert (await ended(here, await started(here, [request("a", input=[1, 2, 3])])))[
            "status"
        ] == "expired"


async def test_a_batch_whose_file_stays_out_of_reach_expires(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_batches, "WINDOW_S", 1)
    monkeypatch.setattr(openai_steps, "_RETRY_S", 0.1)

    async def away(self: Files, file: StoredFile, to: Path) -> None:
        raise Unavailable("The store is away.")

    monkeypatch.setattr(Files, "download", away)
    async with jobs(database_url, tmp_path) as here:
        batch = await ended(here, await started(here, [request("a", input=[1, 2, 3])]))
        assert batch["status"] == "expired"
        assert batch["expired_at"] >= batch["expires_at"]


async def test_progress_stays_while_the_answers_are_written(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finalize, go_on = OpenAISteps._finalize, asyncio.Event()

    async def later(self: OpenAISteps, row: OpenAIBatchRow) -> Change:
        await go_on.wait()
        return await finalize(self, row)

    monkeypatch.setattr(OpenAISteps, "_finalize", later)
    async with jobs(database_url, tmp_path) as here:
        here.worker.instead = benign_below_15(here.worker.store)
        batch_id = await started(
            here, [request("two", inputs=[[1, 2, 3]] * 2), request("fails", input=[1, 2, 3])]
        )
        while_written = await reaches(here, batch_id, {"finalizing"})
        go_on.set()
        counts = (await ended(here, batch_id))["request_counts"]
        assert counts == {"total": 2, "completed": 1, "failed": 1}
        assert while_written["request_counts"]["completed"] == 1


async def test_what_the_job_would_refuse_is_told(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuses(self: JobService, spec: JobSpec, caller: Key) -> Job:
        raise InvalidArgument("The rows are of no use.")

    monkeypatch.setattr(JobService, "submit", refuses)
    async with jobs(database_url, tmp_path) as here:
        batch = await ended(here, await started(here, [request("a", input=[1, 2, 3])]))
        [finding] = batch["errors"]["data"]
        assert (finding["code"], finding["message"]) == ("invalid_request", "The rows are of no use.")


async def test_a_batch_whose_job_was_accepted_and_not_noted_goes_on_with_it(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, cut = OpenAISteps._write, Controller._cut_to_end
    lost, read_again = list[str](), asyncio.Event()

    async def lose_the_job(self: OpenAISteps, batch_id: str, change: Change) -> None:
        if change.values.get("state") == "running":
            if not lost:
                lost.append(batch_id)
                await write(self, batch_id, Change({}))  # nobody waits for the lease to run out
                raise ConnectionError("the database went away")
            read_again.set()
        await write(self, batch_id, change)

    async def cut_later(self: Controller, job: JobRow) -> None:
        await read_again.wait()
        await cut(self, job)

    monkeypatch.setattr(OpenAISteps, "_write", lose_the_job)
    monkeypatch.setattr(Controller, "_cut_to_end", cut_later)
    async with jobs(database_url, tmp_path) as here:
        here.worker.instead = benign_below_15(here.worker.store)
        batch = await ended(here, await started(here, [request("a", input=[1, 2, 3])]))
        assert (batch["status"], batch["errors"], len(lost)) == ("completed", None, 1)
        assert [one["custom_id"] for one in await lines(here, batch["output_file_id"])] == ["a"]


async def test_a_batch_that_is_cancelled_cancels_the_job_that_was_accepted_and_not_noted(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, lost = OpenAISteps._write, list[str]()

    async def lose_the_job(self: OpenAISteps, batch_id: str, change: Change) -> None:
        if change.values.get("state") == "running" and not lost:
            lost.append(batch_id)
            await write(self, batch_id, Change({"cancelling_at": self._clock.now()}))
            raise ConnectionError("the database went away")
        await write(self, batch_id, change)

    monkeypatch.setattr(OpenAISteps, "_write", lose_the_job)
    async with jobs(database_url, tmp_path) as here:
        here.worker.gate.clear()
        batch_id = await started(here, [request("a", input=[1, 2, 3])])
        await eventually(lambda: batch_id in here.worker.stopped)
        here.worker.gate.set()
        assert (await ended(here, batch_id))["status"] == "cancelled"
        assert (await here.rest.get(f"/v1/batch/{batch_id}")).json()["status"] == "cancelled"


async def test_a_deployment_while_the_file_is_read_changes_no_version(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = JobService.submit

    async def deployed_first(self: JobService, spec: JobSpec, caller: Key) -> Job:
        config = configs()[0]
        config.revision += 1
        config.versions[1].weight = 2 * config.versions[0].weight
        config.versions[1].signature.classes[:] = ["benign", "malignant"]
        self._catalogue.apply(b"cancer", config.SerializeToString())
        return await submit(self, spec, caller)

    monkeypatch.setattr(JobService, "submit", deployed_first)
    async with jobs(database_url, tmp_path) as here:
        here.worker.instead = benign_below_15(here.worker.store)
        batch = await ended(here, await started(here, [request("a", input=[1, 2, 3])]))
        [line] = await lines(here, batch["output_file_id"])
        body = line["response"]["body"]
        assert (body["version"], body["prediction"]) == ("1", "benign")
        assert [chunk.version for chunk in here.worker.seen] == ["1"]


class Nothing:
    """Jobs, of which there are none."""

    async def get(self, _job_id: str, _caller: Key) -> Job:
        raise NotFound("There is no such job.")


async def test_a_batch_that_was_put_off_before_the_clock_was_set_back_is_due(
    database_url: str, tmp_path: Path
) -> None:
    await migrate(database_url, "gateway", MIGRATIONS)
    store = ArtifactStore(f"file://{tmp_path}")
    backend = Backend(engine(database_url, "gateway"), store, InputSources(store, ()))
    clock = ManualClock()
    now = clock.now()
    row = OpenAIBatchRow(
        batch_id="b", key_id="key", endpoint="/v1/predict", input_file_id="f", batch_metadata={},
        state="validating", model="", version="", total=0, completed=0, failed=0, rows=0, attempts=0,
        created_at=now, expires_at=now + timedelta(days=1), cancelling_at=now,
        due_at=now + timedelta(seconds=openai_steps._LEASE_S),
    )  # fmt: skip
    async with transaction(backend.engine) as session:
        session.add(row)
    steps = OpenAISteps(
        backend=lambda: backend,
        files=cast("Files", None),
        jobs=cast("JobService", Nothing()),
        catalogue=Catalogue(),
        keys=KeyRing(clock),
        clock=clock,
    )
    assert not await steps.step()
    clock.advance(-3600)
    assert await steps.step()
    async with transaction(backend.engine) as session:
        ended_row = await session.get(OpenAIBatchRow, "b")
    assert ended_row is not None
    assert ended_row.state == "cancelled"
    await backend.engine.dispose()
    await backend.sources.close()
    await store.close()
