"""Whether the event loops of child processes turn. The parent asks each of them, a byte at a time, over its
standard input, and the child's loop answers the same way. That costs less than a request to the ops port, and
nobody has a timer but the parent.

Counted are questions and not seconds: what stood still together with the parent (a machine that slept, a
process group that was stopped) was asked nothing meanwhile.
"""

from __future__ import annotations

import enum
import math
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Self

#: On this signal a service writes to its standard error where all of its threads are.
DUMP_SIGNAL = signal.SIGUSR1

_EVERY_S = 1.0
_LEAST_EVERY_S = 0.1
#: A process is not judged by fewer questions than these.
_LEAST_ASKED = 5
#: Parts of the time between two questions by which the second may be late, and count.
_LATE = 0.5
_BYTE = b"."
_MOST_READ = 4096


class Step(enum.Enum):
    """What is to be done about a process."""

    NOTHING = enum.auto()
    #: Show where it is: the next question is the last.
    DUMP = enum.auto()
    KILL = enum.auto()


class Line:
    """The parent's end of a process's standard input; `child_end` is the other."""

    def __init__(self) -> None:
        self._own, self.child_end = socket.socketpair()
        self._own.setblocking(False)
        #: Questions in a row without an answer. None: nothing ever came, so it is starting.
        self.unanswered: int | None = None

    def ask(self) -> None:
        """Wants an answer before the next question."""
        with suppress(OSError):  # it ended, or has read none of hundreds
            self._own.send(_BYTE)

    def answered(self) -> bool:
        """Whether an answer came since this was last asked."""
        try:
            return bool(self._own.recv(_MOST_READ))
        except OSError:
            return False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._own.close()
        self.child_end.close()


class Watchdog:
    """Asks processes, and says which of them stand still. Does nothing about it."""

    def __init__(self, hung_after_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`hung_after_s` is how long a process that stands still is left alone at least."""
        self.every_s = min(_EVERY_S, max(_LEAST_EVERY_S, hung_after_s / _LEAST_ASKED))
        self._most = max(_LEAST_ASKED, math.ceil(hung_after_s / self.every_s))
        self._clock = clock
        self._asked_at = clock()

    def ask(self, lines: Iterable[Line]) -> list[Step]:
        """Hear what each of `lines` answered, and ask again; call it every `every_s`. Where that was late,
        this process did not run either, and no silence counts."""
        now = self._clock()
        late = now - self._asked_at > (1 + _LATE) * self.every_s
        self._asked_at = now
        steps = [self._step(line, late=late) for line in lines]
        for line in lines:
            line.ask()
        return steps

    def silent_s(self, line: Line) -> float:
        """How long it has not answered, at least."""
        return self.every_s * (line.unanswered or 0)

    def _step(self, line: Line, *, late: bool) -> Step:
        if line.answered():
            line.unanswered = 0
        elif line.unanswered is not None and not late:
            line.unanswered += 1
            if line.unanswered == self._most - 1:
                return Step.DUMP
            if line.unanswered == self._most:
                return Step.KILL
        return Step.NOTHING


def hear(descriptor: int, *, answering: bool) -> bool:
    """In a child, once `descriptor` can be read: read what the parent asks, and answer it. False where the
    parent is gone."""
    try:
        asked = os.read(descriptor, _MOST_READ)
    except ConnectionResetError:  # it went and left answers unread
        return False
    if asked and answering:
        tell(descriptor)
    return bool(asked)


def tell(descriptor: int) -> None:
    """In a child: tell the parent that its loop turns."""
    with suppress(OSError):  # it is gone, or its input is something else
        os.write(descriptor, _BYTE)
