"""How many answers are sent piece by piece at once."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator

import pytest

from services.common.errors import ResourceExhausted
from services.gateway.jobs.downloads import Downloads
from tests.fixtures.waiting import eventually


async def pieces(count: int = 3) -> AsyncIterator[bytes]:
    for number in range(count):
        yield b"%d" % number


async def test_downloads_are_bounded_and_one_that_ends_makes_room() -> None:
    downloads = Downloads(at_once=2)
    first, second = downloads.bounded(pieces(), "a"), downloads.bounded(pieces(), "b")
    assert [await anext(first), await anext(second)] == [b"0", b"0"]
    with pytest.raises(ResourceExhausted) as refused:
        await anext(downloads.bounded(pieces(), "c"))
    assert refused.value.retry_after_ms
    assert [piece async for piece in first] == [b"1", b"2"]
    third = downloads.bounded(pieces(), "c")
    assert await anext(third) == b"0"
    await second.aclose()
    assert [piece async for piece in downloads.bounded(pieces(0), "a")] == []
    assert await anext(downloads.bounded(pieces(), "a")) == b"0"


async def test_one_key_leaves_as_many_places_as_it_holds() -> None:
    downloads = Downloads(at_once=8)
    greedy = [downloads.bounded(pieces(), "greedy") for _ in range(5)]
    for download in greedy[:4]:
        assert await anext(download) == b"0"
    with pytest.raises(ResourceExhausted, match="of this key are running: 4"):
        await anext(greedy[4])
    others = [downloads.bounded(pieces(), key) for key in ("a", "a", "b", "c")]
    for download in others:
        assert await anext(download) == b"0"
    with pytest.raises(ResourceExhausted, match=r"Too many downloads are running\."):
        await anext(downloads.bounded(pieces(), "d"))
    for download in (*greedy[:3], *others):
        await download.aclose()
    assert await anext(downloads.bounded(pieces(), "greedy")) == b"0"


async def test_one_whose_reader_left_makes_room_though_nobody_closes_it() -> None:
    downloads = Downloads(at_once=1)

    async def answer() -> AsyncIterator[bytes]:
        async for piece in downloads.bounded(pieces(), "a"):
            yield piece

    gone = answer()
    assert await anext(gone) == b"0"
    del gone
    gc.collect()

    async def has_room() -> bool:
        try:
            return await anext(downloads.bounded(pieces(), "a")) == b"0"
        except ResourceExhausted:
            return False

    await eventually(has_room)
