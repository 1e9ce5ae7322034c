"""What is large is read in threads, some at a time: the loop serves others meanwhile."""

from __future__ import annotations

import threading
from typing import Any

import orjson
import pytest

from services.common.bus import Letter, Record
from services.gateway.catalogue import Catalogue
from services.gateway.jobs.async_requests import AsyncRequests
from services.gateway.jobs.results import PARSED_AT_ONCE, parsed_errors
from services.gateway.jobs.service import _digest
from services.gateway.jobs.specs import JobSpec
from services.gateway.keys import Key, Scope
from services.gateway.rest.dead_letter_routes import letter_json


async def test_errors_are_read_some_at_a_time() -> None:
    rows = 2 * PARSED_AT_ONCE + 5
    # What only str.splitlines takes for the end of a line is part of one.
    lines = b"".join(orjson.dumps({"row": row, "error": "a\u2028b\x0b"}) + b"\n" for row in range(rows))
    pieces = [piece async for piece in parsed_errors(lines)]
    assert [len(piece) for piece in pieces] == [PARSED_AT_ONCE, PARSED_AT_ONCE, 5]
    assert [error["row"] for piece in pieces for error in piece] == list(range(rows))


def test_what_makes_two_requests_the_same() -> None:
    first = JobSpec("m", inputs=b"[1]", metadata={"a": "1", "b": "2"}, job_id="x", idempotency_key="k")
    same = JobSpec("m", inputs=b"[1]", metadata={"b": "2", "a": "1"}, job_id="y", idempotency_key="l")
    assert _digest(first) == _digest(same)
    for other in (JobSpec("m", inputs=b"[2]"), JobSpec("m", inputs=None), JobSpec("n", inputs=b"[1]")):
        assert _digest(other) != _digest(JobSpec("m", inputs=b"[1]"))


@pytest.mark.parametrize(("size", "in_thread"), [(10, False), (1 << 20, True)])
async def test_large_bodies_are_decoded_in_a_thread(
    size: int, in_thread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[threading.Thread] = []

    def spec(_self: object, model: str, _raw: bytes, _key: str) -> JobSpec:
        seen.append(threading.current_thread())
        return JobSpec(model)

    class Jobs:
        async def submit(self, spec: JobSpec, _caller: Key) -> JobSpec:
            return spec

    monkeypatch.setattr(AsyncRequests, "_spec", spec)
    jobs: Any = Jobs()
    caller = Key("k", frozenset({Scope.PREDICT}), frozenset(), 0, b"", None)
    await AsyncRequests(jobs, Catalogue()).submit("m", b" " * size, caller, "")
    assert [thread is not threading.main_thread() for thread in seen] == [in_thread]


def test_api_keys_of_dead_letters_are_not_shown() -> None:
    headers = (("Authorization", b"Bearer secret"), ("X-API-Key", b"secret"), ("content-type", b"text"))
    record = Record("t.g.dlq", b"k", b"{}", headers)
    shown = letter_json(Letter(record, "t", 0, 0, "why"))
    assert shown["headers"] == {"Authorization": "***", "X-API-Key": "***", "content-type": "text"}
    assert b"secret" not in orjson.dumps(shown)
