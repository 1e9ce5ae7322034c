"""What happens next to a job."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import pytest
from headrace.v1.batch_pb2 import BatchChunkResult, BatchJob, InputFormat
from headrace.v1.dataplane_pb2 import Priority
from headrace.v1.tensor_pb2 import Code
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.bus import Record
from services.common.errors import InvalidArgument, MalformedBody
from services.gateway.jobs.consumers import spec_of
from services.gateway.jobs.decisions import (
    CLOCKS_APART,
    GRACE,
    MAX_ATTEMPTS,
    OF_THE_JOB,
    Claim,
    Flying,
    Lost,
    Step,
    allotted,
    is_stale,
    judged,
    lost_chunks,
    next_step,
    window_of,
)
from services.gateway.jobs.progress import rows_per_s, time_left_s, updated_rate
from services.gateway.jobs.specs import JobSpec, rows_as_lines, spec_of_json, validated

NOW = datetime(2026, 1, 1, tzinfo=UTC)
S = timedelta(seconds=1)


@dataclass(frozen=True)
class Facts:
    state: str = "in_progress"
    ending: str | None = None
    is_split: bool = True
    open_chunks: int = 0
    flying_chunks: int = 1
    expires_at: datetime = NOW + S
    cancelling_at: datetime | None = None
    ended_at: datetime | None = None


@pytest.mark.parametrize(
    ("facts", "step"),
    [
        (Facts(), Step()),
        (Facts(open_chunks=2), Step(publish=True)),
        (Facts(is_split=False), Step(cut=True)),
        (Facts(is_split=False, open_chunks=1), Step(cut=True, publish=True)),
        (Facts(flying_chunks=0), Step(end="completed")),
        (Facts(flying_chunks=0, is_split=False), Step(cut=True)),
        (Facts(expires_at=NOW), Step(stop="expired")),
        (Facts(expires_at=NOW, flying_chunks=0), Step(end="completed")),  # done in time is done
        (Facts(cancelling_at=NOW, ending="cancelled"), Step()),
        (Facts(cancelling_at=NOW - GRACE, ending="cancelled"), Step(end="cancelled")),
        (Facts(cancelling_at=NOW + CLOCKS_APART, ending="cancelled"), Step()),  # by another gateway's clock
        # By one that was set back since: what its worker lost would otherwise be waited for as long.
        (Facts(cancelling_at=NOW + timedelta(hours=1), ending="cancelled"), Step(end="cancelled")),
        (Facts(cancelling_at=NOW, ending="failed", flying_chunks=0), Step(end="failed")),
        (Facts(cancelling_at=NOW, ending="failed", flying_chunks=0, expires_at=NOW), Step(end="failed")),
        (Facts(ended_at=NOW, open_chunks=1), Step()),
    ],
)
def test_next_step(facts: Facts, step: Step) -> None:
    assert next_step(facts, NOW) == step


@given(
    st.sampled_from(list(Code.values())),
    st.integers(0, 20),
    st.integers(0, 20),
    st.integers(0, 10),
    st.integers(1, MAX_ATTEMPTS),
    st.booleans(),
)
def test_a_verdict_never_counts_more_rows_than_there_are(
    code: Code, done: int, failed: int, rows: int, attempt: int, cancelling: bool
) -> None:
    told = BatchChunkResult(code=code, rows_done=done, rows_failed=failed)
    verdict = judged(told, rows, attempt, cancelling=cancelling)
    assert 0 <= verdict.done <= rows
    assert 0 <= verdict.failed <= rows - verdict.done
    if verdict.again:
        assert verdict.done == verdict.failed == 0
        assert attempt < MAX_ATTEMPTS
    elif verdict.stop is None and not (
        cancelling and code in (Code.CODE_CANCELLED, Code.CODE_DEADLINE_EXCEEDED)
    ):
        assert verdict.done + verdict.failed == rows  # a job that completes has counted all


def test_a_worker_that_cannot_now_is_asked_again_a_few_times() -> None:
    told = BatchChunkResult(code=Code.CODE_UNAVAILABLE, rows_done=3)
    assert judged(told, 10, 1, cancelling=False).again
    assert judged(told, 10, 9, cancelling=False, refusals=1).again  # lost eight times is not refused
    last = judged(told, 10, 3, cancelling=False, refusals=2)
    assert (last.done, last.failed, last.again) == (3, 7, False)


@pytest.mark.parametrize("code", list(Code.values()))
def test_a_failure_of_an_earlier_attempt_says_nothing_of_this_one(code: Code) -> None:
    late = BatchChunkResult(code=code, attempt=1)
    of_the_attempt = code not in OF_THE_JOB | {Code.CODE_OK, Code.CODE_DEADLINE_EXCEEDED}
    assert is_stale(late, 2, cancelling=False) == of_the_attempt
    assert not is_stale(late, 1, cancelling=False)
    assert is_stale(late, 2, cancelling=True) == (of_the_attempt and code != Code.CODE_CANCELLED)


CLAIMS = st.lists(
    st.builds(
        Claim,
        st.uuids().map(str),
        st.sampled_from([Priority.PRIORITY_HIGH, Priority.PRIORITY_NORMAL, Priority.PRIORITY_LOW]),
        st.integers(0, 30),
        st.integers(0, 30),
    ),
    max_size=8,
)


@given(CLAIMS, st.integers(-5, 64))
def test_a_pool_is_shared_and_nobody_is_kept_out(claims: list[Claim], window: int) -> None:
    given_to = allotted(claims, window)
    for claim in claims:
        assert given_to.get(claim.job_id, 0) <= claim.open
        if claim.open and not claim.flying:
            assert given_to[claim.job_id] >= 1
    flying = sum(claim.flying for claim in claims)
    firsts = sum(1 for claim in claims if claim.open and not claim.flying)
    assert sum(given_to.values()) <= max(firsts, window - flying)
    if sum(claim.open for claim in claims) >= window - flying:
        assert sum(given_to.values()) >= window - flying


def test_shares_follow_priorities() -> None:
    high = Claim("high", Priority.PRIORITY_HIGH, 0, 1000)
    normal = Claim("normal", Priority.PRIORITY_NORMAL, 0, 1000)
    low = Claim("low", Priority.PRIORITY_LOW, 0, 1000)
    assert allotted([high, normal, low], 26) == {"high": 16, "normal": 8, "low": 2}
    # What flies counts: who has much waits.
    assert allotted([replace(normal, flying=10), replace(normal, job_id="new")], 16) == {"new": 6}
    assert window_of(8, 2) == 16
    assert window_of(8, 100) == 400


def test_only_what_an_idle_group_has_left_behind_is_lost() -> None:
    old, new = Flying("j", 0, 1, NOW), Flying("j", 1, 1, NOW + 2 * S)
    assert lost_chunks([old, new], NOW + S, NOW + 2 * S).again == [old]
    assert lost_chunks([old, new], NOW, NOW).again == []
    tired = replace(old, attempt=MAX_ATTEMPTS)
    assert lost_chunks([tired], NOW + S, NOW + S).given_up == [tired]
    # A group that reads on may have it yet: neither published once more nor given up, however old it is.
    for chunk in (old, tired, replace(old, published_at=NOW - timedelta(days=1))):
        assert lost_chunks([chunk, new], None, NOW) == Lost([], [])


def test_what_was_published_before_the_clock_was_set_back_is_lost_too() -> None:
    before = Flying("j", 0, 1, NOW)
    now = NOW - timedelta(hours=1)
    assert lost_chunks([before], now, now + S).again == [before]
    assert lost_chunks([before], None, now).again == []
    assert lost_chunks([before], NOW - CLOCKS_APART, NOW - CLOCKS_APART).again == []  # of another gateway


@dataclass
class Speed:
    completed: int = 0
    failed: int = 0
    rate: float | None = None
    rate_at: datetime | None = None
    in_progress_at: datetime | None = NOW
    ended_at: datetime | None = None


def test_rates_follow_what_happens() -> None:
    job = Speed()
    assert rows_per_s(job, NOW) is None
    for second in range(1, 120):
        at = NOW + second * S
        rows = 100 if second <= 60 else 10
        job.rate = updated_rate(job, rows, at)
        job.rate_at = at
        job.completed += rows
        if second in (5, 60):
            assert job.rate == pytest.approx(100, rel=0.02)
    assert job.rate == pytest.approx(10, rel=0.2)
    shown = rows_per_s(job, NOW + 119 * S)
    assert shown == job.rate
    later = rows_per_s(job, NOW + 300 * S)
    assert later is not None
    assert shown is not None
    assert later < shown / 100
    assert updated_rate(job, 10, NOW - 3600 * S) == job.rate, (
        "the clock was set back: it says nothing of speed"
    )
    job.ended_at = NOW + 100 * S
    assert rows_per_s(job, NOW) == pytest.approx(job.completed / 100)


def test_a_job_that_began_before_the_clock_was_set_back_is_not_a_thousand_times_as_fast() -> None:
    job = Speed(completed=100)
    assert updated_rate(job, 100, NOW - 3600 * S) is None
    job.ended_at = NOW - 3590 * S
    assert rows_per_s(job, NOW - 3580 * S) is None
    assert time_left_s(None, 5, 1.0) is None
    assert time_left_s(10, 5, None) is None
    assert time_left_s(10, 5, 2.5) == 2
    assert time_left_s(10, 15, 2.5) == 0


def test_specs_of_json() -> None:
    spec = spec_of_json(
        b'{"model": "m", "version": 2, "input_uri": "s3://b/x.parquet", "priority": "low",'
        b' "exclude_from": ["drift"], "metadata": {"a": "b"}}'
    )
    assert (spec.version, spec.input_format) == ("2", InputFormat.INPUT_FORMAT_PARQUET)
    assert (spec.exclude_from_drift, spec.exclude_from_experiments) == (True, False)
    assert spec.expires_in_s == 24 * 3600
    with pytest.raises(MalformedBody):
        spec_of_json(b"{")
    for uri, kind in (
        ("store://files/a/x.JSONL", InputFormat.INPUT_FORMAT_JSON_LINES),
        ("file:///a/folder/", InputFormat.INPUT_FORMAT_IMAGES),
        ("file:///a/x.feather", InputFormat.INPUT_FORMAT_ARROW),
    ):
        assert validated(JobSpec("m", input_uri=uri)).input_format == kind
    with pytest.raises(InvalidArgument) as caught:
        validated(JobSpec("m", input_uri="file:///x.bin"))
    assert caught.value.field == "input_format"


@settings(max_examples=30)
@given(st.lists(st.recursive(st.integers() | st.text(), st.lists), min_size=1), st.sampled_from([None, 2]))
def test_rows_become_lines(rows: list[object], indent: int | None) -> None:
    lines, count = rows_as_lines(json.dumps(rows, indent=indent).encode())
    assert count == len(rows)
    assert [json.loads(line) for line in lines.split(b"\n") if line] == rows


def test_a_record_says_what_it_holds() -> None:
    message = BatchJob(job_id="a", model="m", inputs_json=b"[1]", exclude_from_experiments=True)
    assert spec_of(Record("t", None, message.SerializeToString())).exclude_from_experiments
    as_json = b' {"model": "m", "inputs": [1]}'
    assert spec_of(Record("t", b"key", as_json)).job_id == "key"
    assert spec_of(Record("t", None, as_json, (), 2, 7, 99)).job_id == "t-2-7-99"
    odd = spec_of(Record("t", b"\xff/..", as_json)).job_id
    assert len(odd) == 32
    with pytest.raises(InvalidArgument):
        spec_of(Record("t", b"k", as_json, (("content-type", b"text/plain"),)))
    with pytest.raises(InvalidArgument):
        spec_of(Record("t", b"k", as_json, (("content-type", b"application/x-protobuf"),)))
    with pytest.raises(InvalidArgument):
        spec_of(Record("t", b"k", None))
