"""Which versions give their memory to another one. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from services.common.errors import Unavailable
from services.worker.desired import VersionKey


class NoRoom(Unavailable):
    """There is no memory for the version now; there may be when others fall idle."""


@dataclass(frozen=True, slots=True)
class Resident:
    """A loaded version: bytes it was measured to take, whether it carries traffic, seconds since it last ran,
    and whether requests wait or run."""

    key: VersionKey
    memory_bytes: int
    carries: bool
    unused: float
    busy: bool


def victims(
    residents: Iterable[Resident], missing: int, *, demanded: bool, long_idle: float
) -> list[VersionKey]:
    """The versions to evict so that `missing` bytes become free, in order; empty where that cannot be had.

    A busy version stays. Those that carry no traffic and those unused for `long_idle` seconds go
    first, the longest unused before the others. A version that carries traffic goes only for one that is
    `demanded`, for which a request waits. Nothing is evicted in vain, and no more than is needed."""
    able = [resident for resident in residents if not resident.busy and resident.memory_bytes > 0]
    spare: list[Resident] = []
    needed: list[Resident] = []
    for resident in able:
        is_spare = not resident.carries or resident.unused >= long_idle
        (spare if is_spare else needed).append(resident)
    chosen: list[VersionKey] = []
    for resident in sorted(spare, key=_unused) + (sorted(needed, key=_unused) if demanded else []):
        if missing <= 0:
            break
        chosen.append(resident.key)
        missing -= resident.memory_bytes
    return chosen if missing <= 0 else []


def _unused(resident: Resident) -> float:
    return -resident.unused
