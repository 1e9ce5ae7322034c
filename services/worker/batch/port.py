"""Where chunks come from and where what they came to goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from services.common.bus import Record


@dataclass(frozen=True, slots=True, eq=False)
class Delivery:
    """One record of the pool's chunks in this worker's hands."""

    record: Record


class Chunks(Protocol):
    """A member of the pool's consumer group, and a producer. At least once: a delivery that is not settled,
    or whose partition goes to another member meanwhile, comes again, here or there.

    A member while the context is open; entering waits for nothing."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @property
    def partitions(self) -> int:
        """How many partitions are ours."""
        ...

    async def next(self) -> Delivery:
        """The next record; waits for it. No more are fetched than a few ahead of this call."""
        ...

    def settle(self, delivery: Delivery) -> None:
        """Done for good: the group goes on behind it once all before it in its partition are settled."""
        ...

    async def publish(self, records: Sequence[Record]) -> None:
        """Return once the broker has acknowledged all. Raises Unavailable, InvalidArgument."""
        ...
