"""The store's tasks go on whatever the server says: nobody is left waiting, and nothing is off for good."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.exceptions import BusyLoadingError, OutOfMemoryError, ReadOnlyError

from services.router.result_store import ResultStore
from tests.fixtures.waiting import eventually


class FakeRedis:
    """Gives what it is told to, or raises it."""

    def __init__(self) -> None:
        self.read: Any = [b"v"]
        self.written: list[Any] = []

    async def mget(self, keys: list[bytes]) -> Any:
        if isinstance(self.read, Exception):
            raise self.read
        return self.read

    def pipeline(self, *, transaction: bool) -> FakeRedis:
        return self

    def set(self, key: bytes, value: bytes, *, px: int) -> None:
        pass

    async def execute(self, *, raise_on_error: bool) -> list[Any]:
        assert not raise_on_error
        return self.written

    async def ping(self) -> None:
        pass


@asynccontextmanager
async def running(redis: FakeRedis) -> AsyncIterator[ResultStore]:
    """A store that was reached; one that was left once is seen again soon."""
    store = ResultStore(redis, 5.0)  # type: ignore[arg-type]  # the part of it that is used
    tasks = [asyncio.create_task(work) for work in (store.read(), store.write(), store.watch())]
    await eventually(lambda: store.usable)
    try:
        yield store
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def look_up(store: ResultStore) -> list[bytes | None]:
    found: list[bytes | None] = []
    assert store.ask(b"k", found.append)
    await eventually(lambda: found)
    return found


@pytest.mark.parametrize(
    "nonsense", [ValueError("no number"), BusyLoadingError("loading"), OSError("reset"), 7, None]
)
async def test_nonsense_is_a_miss_and_the_store_is_asked_again_later(nonsense: object) -> None:
    redis = FakeRedis()
    async with running(redis) as store:
        redis.read = nonsense
        assert await look_up(store) == [None]
        assert not store.usable
        redis.read = [b"v"]
        await eventually(lambda: store.usable)
        assert await look_up(store) == [b"v"]


async def test_too_few_values_are_misses_for_the_others() -> None:
    redis = FakeRedis()
    async with running(redis) as store:
        found: list[bytes | None] = []
        for _ in range(3):
            store.ask(b"k", found.append)
        await eventually(lambda: len(found) == 3)
        assert found == [b"v", None, None]


@pytest.mark.parametrize("refusal", [OutOfMemoryError("OOM"), ReadOnlyError("READONLY")])
async def test_a_server_that_takes_nothing_is_read_all_the_same(refusal: Exception) -> None:
    redis = FakeRedis()
    async with running(redis) as store:
        redis.written = [refusal, True]
        store.keep(b"k", b"v", 1000)
        store.keep(b"l", b"v", 1000)
        await eventually(lambda: store.dropped)
        assert (store.dropped, store.failures, store.usable) == (1, 0, True)
        assert await look_up(store) == [b"v"]


async def test_writes_that_break_leave_the_store_for_a_while() -> None:
    redis = FakeRedis()
    async with running(redis) as store:
        redis.written = [BusyLoadingError("loading")]
        store.keep(b"k", b"v", 1000)
        await eventually(lambda: store.dropped)
        redis.written = [True]
        await eventually(lambda: store.usable)
        store.keep(b"k", b"v", 1000)
        await asyncio.sleep(0)
        assert store.dropped == 1
