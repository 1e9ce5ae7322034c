"""Rate limits per key without a round trip per request.

Each process admits from a local token bucket and keeps count. `leases.py` reports the counts to Redis in the
background and learns what the key has left over all processes; between two reports the local bucket refills
at this process's share. So the sum over all processes follows the key's rate, and a process that cannot reach
Redis goes on with the share it had, or with what `alone` was told where it never had one.
"""

from __future__ import annotations

import math

from services.common.errors import ResourceExhausted


class Bucket:
    """The local part of one key's limit: `rate` tokens per second, `burst` at most at once (0: one
    second's)."""

    __slots__ = ("_burst", "_cap", "_limit", "_rate", "_shared", "_tokens", "_updated", "key_id", "spent")

    def __init__(self, key_id: str, rate: float, burst: int) -> None:
        self.key_id = key_id
        self._limit = (rate, burst)
        self._burst = float(max(1.0, burst or math.ceil(rate)))
        self._cap = self._burst  # what may be saved up here
        self._rate = rate
        self._tokens = self._burst
        self._updated = 0.0
        #: Whether it has a share: as Redis said, or as was guessed without it.
        self._shared = False
        #: Admitted since the last report.
        self.spent = 0

    @property
    def rate(self) -> float:
        """Tokens per second of the key, over all processes."""
        return self._limit[0]

    @property
    def burst(self) -> float:
        """Tokens at most at once, over all processes."""
        return self._burst

    def has_limit(self, rate: float, burst: int) -> bool:
        """Whether the bucket was made for this limit."""
        return self._limit == (rate, burst)

    def admit(self, now: float) -> None:
        """Take one token. Raises ResourceExhausted with the time until there is one. `now` is monotonic."""
        tokens = self._tokens + (now - self._updated) * self._rate
        tokens = min(tokens, self._cap)
        self._updated = now
        if tokens < 1.0:
            self._tokens = tokens
            wait_ms = math.ceil((1.0 - tokens) / self._rate * 1000)
            raise ResourceExhausted(
                f"This key's limit of {self._limit[0]:g} requests per second is used up.",
                retry_after_ms=wait_ms,
            )
        self._tokens = tokens - 1.0
        self.spent += 1

    def report(self) -> int:
        """Tokens spent since the last report; counting starts anew."""
        spent, self.spent = self.spent, 0
        return spent

    def unreported(self, spent: int) -> None:
        """Put `spent` back: the report did not arrive."""
        self.spent += spent

    def alone(self, sharers: int) -> None:
        """Redis cannot be asked, and `sharers` processes are known to grant this key: grant a part of it,
        unless Redis has said before what this one's part is."""
        if not self._shared:
            self._shared = True
            self._rate = self._limit[0] / sharers
            self._cap = max(1.0, self._burst / sharers)
            self._tokens = min(self._tokens, self._cap)

    def granted(self, left: float, sharers: int, now: float) -> None:
        """What the key has left over all processes (negative: overdrawn), and how many processes use it."""
        self._shared = True
        self._cap = self._burst
        self._rate = self._limit[0] / max(1, sharers)
        # Spent since the report was sent, which `left` does not know of.
        self._tokens = left / max(1, sharers) - self.spent
        self._updated = now
