"""Bucket allocation: exact, complete, and no user moved who need not be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.registry.buckets import BUCKETS, Range, allocate, counts, merged

VERSIONS = ["1", "2", "3", "4", "5"]


@st.composite
def weights(draw: st.DrawFn) -> dict[str, int]:
    names = draw(st.permutations(VERSIONS))[: draw(st.integers(1, len(VERSIONS)))]
    cuts = sorted(draw(st.lists(st.integers(0, BUCKETS), min_size=len(names) - 1, max_size=len(names) - 1)))
    return {name: high - low for name, low, high in zip(names, [0, *cuts], [*cuts, BUCKETS], strict=True)}


def history(steps: list[dict[str, int]]) -> list[Range]:
    """Ranges after a sequence of deployments, so that old ranges are as fragmented as they get."""
    ranges: list[Range] = []
    for step in steps:
        ranges = allocate(ranges, step)
    return ranges


def owners(ranges: list[Range]) -> list[str]:
    table: list[str] = []
    for piece in ranges:
        assert piece.first == len(table)
        table += [piece.version] * piece.size
    return table


@given(st.lists(weights(), max_size=6), weights())
def test_every_bucket_is_owned_once_and_every_share_is_exact(
    steps: list[dict[str, int]], new: dict[str, int]
) -> None:
    ranges = allocate(history(steps), new)
    assert len(owners(ranges)) == BUCKETS
    assert counts(ranges) == {version: weight for version, weight in new.items() if weight}
    assert ranges == merged(ranges)


@given(st.lists(weights(), min_size=1, max_size=6), weights())
def test_moves_are_the_fewest_possible(steps: list[dict[str, int]], new: dict[str, int]) -> None:
    before = history(steps)
    after = allocate(before, new)
    had = counts(before)
    moved = [(a, b) for a, b in zip(owners(before), owners(after), strict=True) if a != b]
    assert len(moved) == sum(max(0, weight - had.get(version, 0)) for version, weight in new.items())
    assert not {a for a, _ in moved} & {b for _, b in moved}


@given(st.lists(weights(), min_size=1, max_size=6), st.sampled_from(VERSIONS), st.data())
def test_growing_one_version_moves_units_only_into_it(
    steps: list[dict[str, int]], canary: str, data: st.DataObject
) -> None:
    before = history(steps)
    had = counts(before)
    share = data.draw(st.integers(had.get(canary, 0), BUCKETS))
    others = {version: count for version, count in had.items() if version != canary}
    new = {canary: share}
    left = BUCKETS - share
    for version, count in others.items():
        new[version] = min(count, left)
        left -= new[version]
    new[canary] += left
    moved = [b for a, b in zip(owners(before), owners(allocate(before, new)), strict=True) if a != b]
    assert set(moved) <= {canary}


@given(st.integers(1, 4999), st.integers(1, 4999))
def test_a_rolled_back_canary_returns_the_units_it_took(first: int, more: int) -> None:
    small = {"1": BUCKETS - first, "2": first}
    large = {"1": BUCKETS - first - more, "2": first + more}
    before = allocate([], small)
    assert allocate(allocate(before, large), small) == before


@given(st.lists(weights(), max_size=6))
def test_the_same_steps_give_the_same_ranges(steps: list[dict[str, int]]) -> None:
    assert history(steps) == history(steps)


@pytest.mark.parametrize("bad", [{"1": 9_999}, {"1": 10_001}, {"1": 10_001, "2": -1}])
def test_weights_that_do_not_cover_the_buckets_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="add up"):
        allocate([], bad)
