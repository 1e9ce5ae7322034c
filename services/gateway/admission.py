"""How many requests may be under way at once: as many as the platform takes on without standing still itself.

What a model and its queue take is the worker's business, and bounded there. What is left of an answer's time
was spent between the processes: reading, routing, passing on. Where even the quickest answer of a tenth of a
second spent long there, the machines are busy beyond what they can do, and every further request would only
make all of them wait. So the signal is CoDel's (Nichols and Jacobson, 2012: the least delay in an interval,
so that bursts do not count), and what it steers is a limit on what is in flight, cut by a factor and grown
again by another. The limit has a floor, for a refusal costs the gateway a third of an answer: below it,
refusing more would make room for nothing but refusals.
"""

from __future__ import annotations

from math import inf

from services.common.errors import Unavailable

#: Answers that a window needs to say anything.
_FEW = 32
#: Windows in a row with too long a delay, before requests are refused.
_WINDOWS = 2
_CUT = 0.8
_GROWTH = 1.25


class Admission:
    """The limit of one gateway. Durations are seconds; `now` is monotonic."""

    def __init__(
        self, target_s: float = 0.5, *, window_s: float = 0.1, least: int = 1024, most: int = 16_000
    ) -> None:
        """`target_s` is the delay that is too long, 0: none is. The limit stays in `least` … `most`."""
        self._target_s = target_s or inf
        self._window_s = window_s
        self._least, self._most = least, most
        self.limit = most
        self.refused = 0
        self._ends = 0.0
        self._quickest = inf
        self._answers = 0
        self._late_windows = 0

    def refusal(self) -> Unavailable:
        """What a request is told that comes beyond the limit."""
        self.refused += 1
        return Unavailable("The platform has more requests than it can answer.", retry_after_ms=1000)

    def observe(self, delay_s: float, in_flight: int, now: float) -> None:
        """An answer came whose way, model and queue left out, took `delay_s`; `in_flight` are still on it."""
        self._answers += 1
        if delay_s < self._quickest:  # noqa: PLR1730 - runs for every answer; a call costs more
            self._quickest = delay_s
        if now >= self._ends:
            self._judge(in_flight, now)

    def _judge(self, in_flight: int, now: float) -> None:
        if self._answers >= _FEW or self._quickest < self._target_s:
            late = self._quickest >= self._target_s
            self._late_windows = self._late_windows + 1 if late else 0
            if self._late_windows >= _WINDOWS:
                self.limit = max(self._least, int(min(self.limit, in_flight) * _CUT))
            elif not late:
                self.limit = min(self._most, int(self.limit * _GROWTH))
        self._quickest, self._answers = inf, 0
        self._ends = now + self._window_s
