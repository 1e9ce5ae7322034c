"""Jobs that producers submit: one record never keeps the others out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from headrace.v1.batch_pb2 import BatchChunkResult, BatchJob

from services.common.bus import Malformed, Record
from services.common.bus.delivery import deliver
from services.common.clock import ManualClock
from services.common.errors import Aborted, HeadraceError, InvalidArgument, ResourceExhausted, Unavailable
from services.gateway.jobs.consumers import MAX_TRIES, SubmittedJobs, result_of, spec_of
from services.gateway.jobs.publishing import output_prefix
from services.gateway.jobs.specs import JobSpec, is_job_id, spec_of_json
from services.gateway.keys import KeyRing


class Service:
    """Takes every job but those named; tells what it took."""

    def __init__(self, refusals: dict[str, Callable[[], Exception]]) -> None:
        self.refusals = refusals
        self.taken: list[str] = []

    async def submit(self, spec: JobSpec, _caller: object) -> None:
        if spec.job_id in self.refusals:
            failure = self.refusals[spec.job_id]()
            raise failure
        self.taken.append(spec.job_id)


RECORDS = [
    Record("batch.jobs.v1", name.encode(), b'{"model": "m", "inputs": [1]}', (), 0, offset)
    for offset, name in enumerate(("a", "refused", "b"))
]


async def rounds(handler: SubmittedJobs, most: int) -> tuple[int, list[tuple[bytes | None, str]]]:
    """Hand the records over until they are accepted, at most so often: how often, and what was buried."""
    buried: list[tuple[bytes | None, str]] = []

    async def bury(record: Record, reason: str) -> None:
        buried.append((record.key, reason))

    for count in range(1, most + 1):
        try:
            await deliver([one for one in RECORDS if one.key not in dict(buried)], handler, bury)
        except Exception:
            continue  # the bus waits, and hands them over again
        return count, buried
    return most + 1, buried


@pytest.mark.parametrize(
    "refusal",
    [
        lambda: ResourceExhausted("This key has 2 jobs under way."),
        lambda: Unavailable("The input store does not answer.", field="input_uri"),
        lambda: Aborted("Somebody else changed it."),
        lambda: HeadraceError("It broke."),
        lambda: RuntimeError("a defect"),
    ],
)
async def test_a_record_that_is_refused_for_now_is_put_aside_in_the_end(
    refusal: Callable[[], Exception],
) -> None:
    service = Service({"refused": refusal})
    anything: Any = service
    handler = SubmittedJobs(anything, KeyRing(ManualClock()), lambda: True)
    count, buried = await rounds(handler, 20)
    assert count == MAX_TRIES + 1
    assert [key for key, _ in buried] == [b"refused"]
    assert set(service.taken) == {"a", "b"}


async def test_a_record_that_is_refused_for_a_while_is_a_job() -> None:
    service = Service({"refused": lambda: ResourceExhausted("Full.")})
    anything: Any = service
    handler = SubmittedJobs(anything, KeyRing(ManualClock()), lambda: True)
    assert (await rounds(handler, MAX_TRIES))[1] == []
    service.refusals.clear()
    assert await rounds(handler, 1) == (1, [])
    assert "refused" in service.taken


async def test_everything_waits_for_the_database() -> None:
    service = Service({"refused": lambda: Unavailable("The database is away.")})
    anything: Any = service
    handler = SubmittedJobs(anything, KeyRing(ManualClock()), lambda: True)
    assert await rounds(handler, 30) == (31, [])


@pytest.mark.parametrize("value", [b'{"model": "m", "inputs": [1]}', BatchJob(model="m", inputs_json=b"[1]")])
def test_a_header_that_is_null_says_nothing(value: bytes | BatchJob) -> None:
    null: Any = None
    content = value if isinstance(value, bytes) else value.SerializeToString()
    spec = spec_of(Record("batch.jobs.v1", b"k", content, (("content-type", null), ("x", null))))
    assert (spec.model, spec.inputs, spec.job_id) == ("m", b"[1]", "k")


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"priority": 99}, "priority"),
        ({"output_format": 99}, "output_format"),
        ({"input_format": -1}, "input_format"),
        ({"version": "\0"}, "version"),
        ({"callback_url": "http://a/\0"}, "callback_url"),
    ],
)
def test_what_is_wrong_with_a_record_is_named(wrong: dict[str, Any], field: str) -> None:
    """A job with a number that means nothing could be shown to nobody, nor any list that it is in."""
    message = BatchJob(model="m", inputs_json=b"[1]", **wrong)
    with pytest.raises(InvalidArgument) as refused:
        spec_of(Record("batch.jobs.v1", b"k", message.SerializeToString()))
    assert refused.value.field == field


@pytest.mark.parametrize("job_id", ["a", "a.", "2026-11-01..07"])
def test_whatever_id_a_producer_may_give_its_results_are_taken(job_id: str) -> None:
    """A job whose results are refused would run until its time is over."""
    assert is_job_id(job_id)

    def told(path: str) -> Record:
        result = BatchChunkResult(job_id=job_id, results_object=f"{output_prefix(job_id)}/{path}")
        return Record("batch.results.v1", b"", result.SerializeToString())

    assert result_of(0, told("results/0")).job_id == job_id
    for path in ("../b/0", "results/..", "/0"):
        with pytest.raises(Malformed):
            result_of(0, told(path))


async def test_a_dead_letter_names_its_field_once() -> None:
    buried: list[str] = []

    async def bury(_record: Record, reason: str) -> None:
        buried.append(reason)

    anything: Any = Service({})
    handler = SubmittedJobs(anything, KeyRing(ManualClock()), lambda: True)
    values = [b'{"model": "m", "rows": [1]}', b'{"model": "m"}']
    records = [Record("batch.jobs.v1", b"k", value, (), 0, number) for number, value in enumerate(values)]
    await deliver(records, handler, bury)
    assert buried[0].count("rows:") == 1
    assert buried[1] == "inputs: Send inputs or input_uri, one of them."


@pytest.mark.parametrize(
    ("wrong", "allowed"),
    [
        ('"priority": "urgent"', "high, normal, low"),
        ('"output_format": "xml"', "jsonl, parquet"),
        ('"input_format": "xml"', "jsonl, csv, parquet, arrow, images"),
        ('"exclude_from": ["drift", "all"]', "drift, experiments"),
    ],
)
def test_a_word_that_is_not_known_is_told_those_that_are(wrong: str, allowed: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        spec_of_json(f'{{"model": "m", "inputs": [1], {wrong}}}'.encode())
    assert refused.value.message.endswith(f"it is one of {allowed}.")
