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
    first, second = downloads.bounded(pieces()), downloads.bounded(pieces())
    assert [await anext(first), await anext(second)] == [b"0", b"0"]
    with pytest.raises(ResourceExhausted) as refused:
        await anext(downloads.bounded(pieces()))
    assert refused.value.retry_after_ms
    assert [piece async for piece in first] == [b"1", b"2"]
    third = downloads.bounded(pieces())
    assert await anext(third) == b"0"
    await second.aclose()
    assert [piece async for piece in downloads.bounded(pieces(0))] == []
    assert await anext(downloads.bounded(pieces())) == b"0"


async def test_one_whose_reader_left_makes_room_though_nobody_closes_it() -> None:
    downloads = Downloads(at_once=1)

    async def answer() -> AsyncIterator[bytes]:
        async for piece in downloads.bounded(pieces()):
            yield piece

    gone = answer()
    assert await anext(gone) == b"0"
    del gone
    gc.collect()

    async def has_room() -> bool:
        try:
            return await anext(downloads.bounded(pieces())) == b"0"
        except ResourceExhausted:
            return False

    await eventually(has_room)
