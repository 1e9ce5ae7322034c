"""Who makes room, and who stays."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.worker.desired import VersionKey
from services.worker.eviction import Resident, victims


def resident(
    name: str, size: int = 10, *, carries: bool = True, unused: float = 1.0, busy: bool = False
) -> Resident:
    return Resident(VersionKey(name, "1", f"sha256:{name}"), size, carries, unused, busy)


def chosen(*residents: Resident, missing: int = 10, demanded: bool = False) -> list[str]:
    return [key.model for key in victims(residents, missing, demanded=demanded, long_idle=60.0)]


def test_the_longest_unused_without_traffic_goes_first() -> None:
    newer, older = resident("newer", carries=False, unused=5), resident("older", carries=False, unused=9)
    assert chosen(newer, older, resident("a", unused=30)) == ["older"]
    assert chosen(newer, older, missing=11) == ["older", "newer"]


def test_a_version_with_traffic_goes_only_for_demand() -> None:
    a, b = resident("a", unused=3), resident("b", unused=8)
    assert chosen(a, b) == []
    assert chosen(a, b, demanded=True) == ["b"]
    assert chosen(a, b, resident("spare", carries=False), demanded=True) == ["spare"]
    assert chosen(a, b, resident("spare", carries=False), demanded=True, missing=15) == ["spare", "b"]


def test_long_idle_is_as_good_as_no_traffic() -> None:
    assert chosen(resident("a", unused=61), resident("b", unused=59)) == ["a"]


def test_what_is_busy_stays_and_nothing_goes_in_vain() -> None:
    assert chosen(resident("a", carries=False, busy=True), demanded=True) == []
    assert chosen(resident("a", carries=False), resident("b", busy=True), demanded=True, missing=11) == []


@given(
    residents=st.lists(
        st.builds(
            resident,
            st.uuids().map(str),
            st.integers(0, 50),
            carries=st.booleans(),
            unused=st.floats(0, 100),
            busy=st.booleans(),
        ),
        max_size=8,
    ),
    missing=st.integers(1, 120),
    demanded=st.booleans(),
)
def test_enough_and_not_more(residents: list[Resident], missing: int, demanded: bool) -> None:
    by_key = {one.key: one for one in residents}
    out = [by_key[key] for key in victims(residents, missing, demanded=demanded, long_idle=60.0)]
    assert not any(one.busy for one in out)
    spare = [one for one in residents if not one.busy and (not one.carries or one.unused >= 60)]
    needed = [one for one in residents if not one.busy and one not in spare]
    able = sum(one.memory_bytes for one in spare + (needed if demanded else []))
    assert bool(out) == (able >= missing)
    if out:
        assert sum(one.memory_bytes for one in out) >= missing
        assert sum(one.memory_bytes for one in out[:-1]) < missing
        if any(one in needed for one in out):
            assert all(one in out for one in spare if one.memory_bytes)
