"""The end of a turn of the event loop: when what the turn brought is written, in one frame per peer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final
from weakref import WeakKeyDictionary

log = logging.getLogger(__name__)


#: What flushes bring is flushed in the same turn, so often; then sockets have theirs first.
_ROUNDS: Final = 8


class Turn:
    """Flushes asked for in this turn of one event loop.

    While bytes of a frame connection are handled, the turn ends with them, which spares the loop another
    round for what they caused. What anybody else queues leaves when the loop turns. Where both ends are in
    this process, flushing one brings the other something to flush: that belongs to the same turn.
    """

    __slots__ = ("_flushes", "reading")

    def __init__(self) -> None:
        # Not the loop: whatever held it here would keep it for ever.
        self._flushes: list[Callable[[], None]] = []
        #: Whether a connection is handling bytes, and will call `end`, or that is running.
        self.reading = False

    def at_end(self, flush: Callable[[], None]) -> None:
        """Call `flush` once at the end of this turn."""
        self._flushes.append(flush)
        if not self.reading and len(self._flushes) == 1:
            asyncio.get_running_loop().call_soon(self.end)

    def end(self) -> None:
        """The turn is over, now or earlier."""
        if not self._flushes:
            return
        self.reading = True
        try:
            for _ in range(_ROUNDS):
                flushes, self._flushes = self._flushes, []
                for flush in flushes:
                    try:
                        flush()
                    except Exception:
                        # Whoever reads now must not pay for another's fault.
                        log.exception("flushing a frame connection failed")
                if not self._flushes:
                    break
        finally:
            self.reading = False
        if self._flushes:
            asyncio.get_running_loop().call_soon(self.end)


_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, Turn] = WeakKeyDictionary()


def turn_of(loop: asyncio.AbstractEventLoop) -> Turn:
    """The one of `loop`."""
    turn = _turns.get(loop)
    if turn is None:
        turn = _turns[loop] = Turn()
    return turn
