"""OpenAI batches whose steps are cut short or held up, on a real PostgreSQL; the worker stands in."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.common.errors import Aborted, InvalidArgument, ResourceExhausted
from services.gateway.jobs import openai_batches, openai_steps
from services.gateway.jobs.openai_steps import Change, OpenAISteps
from services.gateway.jobs.service import JobService
from services.gateway.jobs.specs import JobSpec
from services.gateway.jobs.views import Job
from services.gateway.keys import Key
from tests.fixtures.gateway_jobs import jobs
from tests.integration.test_gateway_openai_batches import benign_below_15, ended, lines, request, started


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
