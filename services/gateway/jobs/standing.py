"""What a pool's topic tells of its chunks: whether some of them are gone. Pure: it is told what the broker
says, and when."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from services.common.bus import Standing

#: A group counts as idle after this time without anything left to read.
IDLE = timedelta(seconds=3)
#: A group counts as stuck after this time without a commit or a result; each time in a row after twice the
#: time, so that chunks that merely take long are not begun again and again.
STUCK, STUCK_AT_MOST = timedelta(seconds=10), timedelta(minutes=10)


class PoolStanding:
    """One pool, looked at again and again. Three things tell that chunks are gone:

    - The topic was given fewer records than there are chunks on their way, or than it once had: the broker
      came back empty.
    - The group has nothing left to read, and every result was taken: since workers publish a result before
      they commit, what has none by then never arrives.
    - The group has something to read and does not: no commit and no result for long. One broker (Tansu)
      counts records that it refused, and nobody can read what is not there.
    """

    def __init__(self) -> None:
        self._end = 0
        self._asked_at = datetime.min.replace(tzinfo=UTC)
        self._idle_since: datetime | None = None
        self._reached = (-1, -1)
        self._reached_at: datetime | None = None
        self._patience = STUCK

    def gone_before(
        self, asked_at: datetime, chunks: Standing, results: Standing, flying: int
    ) -> datetime | None:
        """Whatever was published before this time and has no result is gone; None: nothing is known to be.

        `flying` chunks were on their way when the broker was asked at `asked_at`."""
        if asked_at < self._asked_at:  # the clock was set back: what was timed by it is timed anew
            self._begin(asked_at)
        self._asked_at = asked_at
        lost_its_log = chunks.end < max(self._end, flying)
        self._end = chunks.end
        if lost_its_log:
            self._begin(asked_at)
            return asked_at
        reached = (chunks.end - chunks.lag, results.end - results.lag)
        if self._reached_at is None or reached != self._reached:
            self._reached, self._reached_at, self._patience = reached, asked_at, STUCK
        if chunks.lag or results.lag:
            self._idle_since = None
            return self._stuck(asked_at, self._reached_at)
        self._idle_since = self._idle_since or asked_at
        return self._idle_since if asked_at - self._idle_since >= IDLE else None

    def unknown(self) -> None:
        """The broker did not say."""
        self._idle_since = None

    def published_again(self) -> None:
        """What was gone is on its way once more."""
        self._idle_since = None

    def _begin(self, now: datetime) -> None:
        self._idle_since, self._reached_at, self._patience = None, now, STUCK

    def _stuck(self, now: datetime, since: datetime) -> datetime | None:
        if now - since < self._patience:
            return None
        self._reached_at, self._patience = now, min(2 * self._patience, STUCK_AT_MOST)
        return now
