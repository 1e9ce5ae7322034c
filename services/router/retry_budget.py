"""How many retries may be under way, so that retries never become the load that brings everything down."""

from __future__ import annotations


class RetryBudget:
    """Retries at once: a share of the requests in flight, with a floor for quiet hours (as in Envoy).

    A request whose worker died is not counted here: its work is done once more, not once too often, and what
    one death can add is bounded by what that worker held. Nor is one whose worker does not have its version,
    and so did nothing for it.
    """

    __slots__ = ("_floor", "_share", "active", "refused", "retrying")

    def __init__(self, share: float, floor: int) -> None:
        self._share = share
        self._floor = floor
        self.active = 0  # requests in flight, retries included
        self.retrying = 0
        self.refused = 0

    def take(self) -> bool:
        """Start a retry, if one more is allowed; `give_back` ends it."""
        if self.retrying >= max(self._floor, self._share * self.active):
            self.refused += 1
            return False
        self.retrying += 1
        return True

    def give_back(self) -> None:
        """A retry ended, however."""
        self.retrying -= 1
