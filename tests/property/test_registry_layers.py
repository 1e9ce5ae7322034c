"""Layers: disjoint, exact, and kind to the units that are in an experiment already."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.registry.buckets import BUCKETS
from services.registry.layers import Span, bounded_weights, own, size, split, weights_of

SHARES = st.integers(min_value=1, max_value=BUCKETS)
STARTS = st.integers(min_value=0, max_value=BUCKETS - 1)


def buckets(spans: list[Span]) -> set[int]:
    return {bucket for span in spans for bucket in range(span.first, span.last + 1)}


@given(steps=st.lists(st.tuples(st.integers(0, 3), SHARES, STARTS), min_size=1, max_size=12))
def test_experiments_own_disjoint_buckets_whatever_they_go_through(
    steps: list[tuple[int, int, int]],
) -> None:
    """Each step sets the traffic of one of four experiments; what is not free is refused, the rest exact."""
    layers: dict[int, list[Span]] = {}
    for name, wanted, start in steps:
        taken = [span for other, spans in layers.items() if other != name for span in spans]
        before = buckets(layers.get(name, []))
        if wanted > BUCKETS - size(taken):
            with pytest.raises(ValueError, match="are to be had"):
                own(layers.get(name, []), taken, wanted, start)
            continue
        layers[name] = own(layers.get(name, []), taken, wanted, start)
        after = buckets(layers[name])
        assert len(after) == size(layers[name]) == wanted
        assert not after & buckets(taken)
        # Growing takes nobody out, shrinking brings nobody in
        assert before <= after or after <= before
        assert layers[name] == sorted(layers[name])


@given(first=SHARES, second=SHARES, start=STARTS)
def test_who_shrinks_and_grows_again_has_the_same_units(first: int, second: int, start: int) -> None:
    whole = own([], [], first, start)
    assert own(own(whole, [], min(first, second), start), [], first, start) == whole


@st.composite
def weights(draw: st.DrawFn, count: int, least: int = 1) -> list[int]:
    """`count` weights of at least `least` that add up to 10,000."""
    spare = BUCKETS - count * least
    cuts = sorted(draw(st.lists(st.integers(0, spare), min_size=count - 1, max_size=count - 1)))
    edges = [0, *cuts, spare]
    return [least + after - before for before, after in pairwise(edges)]


@given(data=st.data(), count=st.integers(2, 6))
def test_variants_have_exactly_their_weights_and_who_gains_loses_nobody(
    data: st.DataObject, count: int
) -> None:
    old, new = data.draw(weights(count)), data.draw(weights(count))
    before = split([], old)
    after = split(before, new)
    assert weights_of(before, count) == old
    assert weights_of(after, count) == new

    def members(pieces: list[list[int]]) -> list[set[int]]:
        owned: list[set[int]] = [set() for _ in range(count)]
        for first, last, variant in pieces:
            owned[variant] |= set(range(first, last + 1))
        return owned

    for was, now, has in zip(members(before), members(after), new, strict=True):
        assert was <= now or now <= was
        assert len(now) == has


@given(data=st.data(), count=st.integers(2, 6), most_change=st.integers(1, BUCKETS))
def test_a_bandit_stays_within_its_bounds(data: st.DataObject, count: int, most_change: int) -> None:
    least = data.draw(st.integers(1, BUCKETS // count))
    now = data.draw(weights(count, least))
    wanted = data.draw(weights(count, 0))
    moved = bounded_weights(now, wanted, least, most_change)
    assert sum(moved) == BUCKETS
    assert min(moved) >= least
    assert all(abs(after - before) <= most_change for before, after in zip(now, moved, strict=True))
    # Nothing stands in the way of what obeys the bounds itself
    if min(wanted) >= least and all(abs(w - n) <= most_change for w, n in zip(wanted, now, strict=True)):
        assert moved == wanted
