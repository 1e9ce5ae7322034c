from __future__ import annotations

import os
import time
import uuid

import pytest

from services.common.errors import InvalidArgument
from services.common.ids import id_text, id_unix_ms, new_id, parse_id


def test_an_id_is_a_uuid_of_version_7_made_now() -> None:
    before = time.time_ns() // 1_000_000
    identifier = new_id()
    after = time.time_ns() // 1_000_000
    as_uuid = uuid.UUID(bytes=identifier)
    assert (as_uuid.version, as_uuid.variant) == (7, uuid.RFC_4122)
    assert before <= id_unix_ms(identifier) <= after


def test_ids_are_unique_and_sort_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [new_id() for _ in range(20_000)]
    assert len(set(made)) == len(made)
    start = 1_750_000_000_000_000_000
    ticks = iter(range(start, start + 1_000_000, 500))
    monkeypatch.setattr(time, "time_ns", lambda: next(ticks))
    ordered = [new_id() for _ in range(2_000)]
    assert ordered == sorted(ordered)


def test_a_forked_child_makes_other_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1_750_000_000_000_000_000)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, new_id())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 16) != new_id()
    os.close(read)
    os.close(write)


def test_text_both_ways() -> None:
    identifier = new_id()
    text = id_text(identifier)
    assert len(text) == 32
    assert parse_id(text) == identifier
    assert parse_id(str(uuid.UUID(bytes=identifier))) == identifier


@pytest.mark.parametrize("text", ["", "x" * 32, "ab", "0" * 31, "0" * 33, "é" * 32])
def test_other_text_is_refused_with_its_field(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_id(text, "outcomes[0].request_id")
    assert caught.value.field == "outcomes[0].request_id"
