"""How often trials are counted."""

from __future__ import annotations

from collections.abc import Mapping

from services.common.clock import ManualClock
from services.registry.counting import Counting


async def test_what_takes_long_to_count_is_counted_seldom() -> None:
    clock, counted = ManualClock(), 0
    counting, takes_s = Counting(clock), 0.0

    async def count() -> Mapping[str, int]:
        nonlocal counted
        counted += 1
        clock.advance(takes_s)
        return {"running": counted}

    for _ in range(3):
        assert await counting.ask(count) == {"running": counted}
    assert counted == 3, "at every look while it is quick"
    takes_s = 0.1
    assert await counting.ask(count) == {"running": 4}
    for _ in range(9):
        clock.advance(0.5)
        assert await counting.ask(count) is None
    clock.advance(0.5)
    assert await counting.ask(count) == {"running": 5}


async def test_what_once_took_long_is_soon_counted_again() -> None:
    """A database that hung says nothing of how long the next count will take."""
    clock = ManualClock()
    counting = Counting(clock)

    async def hung() -> Mapping[str, int]:
        clock.advance(25.0)
        return {"running": 1}

    async def count() -> Mapping[str, int]:
        return {"running": 0}

    assert await counting.ask(hung) == {"running": 1}
    clock.advance(60.0)
    assert await counting.ask(count) == {"running": 0}
