"""Places that all keys share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from services.common.errors import ResourceExhausted

_RETRY_MS = 2000


class Places:
    """So many at once. No key takes one that holds as many as are left to others: one key alone gets half,
    two get a third each, and who comes next finds one (dynamic thresholds: Choudhury & Hahne, "Dynamic queue
    length thresholds for shared-memory packet switches", 1998)."""

    def __init__(self, count: int, what: str) -> None:
        """`what` takes them, in the plural."""
        self._free = count
        self._what = what
        self._held: Counter[str] = Counter()

    @contextmanager
    def taken(self, key_id: str) -> Iterator[None]:
        """One place while the block runs. Raises ResourceExhausted where none is free, or none for this
        key."""
        if not self._free:
            raise ResourceExhausted(f"Too many {self._what} are running.", retry_after_ms=_RETRY_MS)
        if self._held[key_id] >= self._free:
            raise ResourceExhausted(
                f"Too many {self._what} of this key are running: {self._held[key_id]}.",
                retry_after_ms=_RETRY_MS,
            )
        self._free -= 1
        self._held[key_id] += 1
        try:
            yield
        finally:
            self._free += 1
            self._held[key_id] -= 1
            if not self._held[key_id]:
                del self._held[key_id]
