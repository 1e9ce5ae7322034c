"""Who owns which buckets of a model's layer, and which variant gets which buckets of an experiment. Pure.

A request is answered by one version, so experiments of one model must not share units: they own disjoint
buckets of one layer. A unit hashes to one bucket for ever, hence what an experiment owns it keeps as long as
it may."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from services.registry.buckets import BUCKETS, Range, allocate


class Span(NamedTuple):
    """Buckets `first` … `last`, both included."""

    first: int
    last: int


def size(spans: Iterable[Span]) -> int:
    """How many buckets there are in `spans`, which do not overlap."""
    return sum(span.last - span.first + 1 for span in spans)


def own(mine: Iterable[Span], taken: Iterable[Span], wanted: int, start: int = 0) -> list[Span]:
    """The spans of an experiment that owned `mine` and shall own `wanted` buckets, none of them in `taken`.

    One that grows keeps every bucket; one that shrinks keeps a part of them, and grows back into the very
    same ones while nobody else has taken them. Buckets are taken from `start` on, so that experiments that
    follow each other do not always meet the same units. Raises ValueError where fewer than `wanted` are to
    be had."""
    others = {bucket for span in taken for bucket in range(span.first, span.last + 1)}
    owned = {bucket for span in mine for bucket in range(span.first, span.last + 1)} - others
    around = [(start + step) % BUCKETS for step in range(BUCKETS)]
    kept = [bucket for bucket in around if bucket in owned][:wanted]
    free = [bucket for bucket in around if bucket not in owned and bucket not in others]
    missing = wanted - len(kept)
    if missing > len(free):
        raise ValueError(f"{wanted} buckets are wanted and {len(kept) + len(free)} are to be had")
    return _spans(sorted(kept + free[:missing]))


def split(old: Sequence[Sequence[int]], weights: Sequence[int]) -> list[list[int]]:
    """[first, last, index of the variant] covering every bucket once, weight by weight in 1/10,000. From
    `old`, which does the same or is empty, as few units change their variant as arithmetic allows."""
    before = [Range(first, last, str(variant)) for first, last, variant in old]
    after = allocate(before, {str(index): weight for index, weight in enumerate(weights)})
    return [[piece.first, piece.last, int(piece.version)] for piece in after]


def weights_of(buckets: Iterable[Sequence[int]], variants: int) -> list[int]:
    """The weights that `buckets`, as `split` makes them, give `variants` variants."""
    weights = [0] * variants
    for first, last, variant in buckets:
        weights[variant] += last - first + 1
    return weights


def bounded_weights(now: Sequence[int], wanted: Sequence[int], least: int, most_change: int) -> list[int]:
    """The weights nearest to `wanted` of which none is below `least` and none differs from `now` by more than
    `most_change`; all in 1/10,000, adding up to 10,000. `now` obeys `least` itself, else its weights below
    may only grow."""
    low = [min(weight, max(least, weight - most_change)) for weight in now]
    high = [min(BUCKETS, weight + most_change) for weight in now]
    weights = [min(max(w, lo), hi) for w, lo, hi in zip(wanted, low, high, strict=True)]
    rest = BUCKETS - sum(weights)
    room = [hi - w if rest > 0 else w - lo for w, lo, hi in zip(weights, low, high, strict=True)]
    # `now` lies within the bounds and adds up, so there is always room for the rest
    given = _shared(abs(rest), room)
    return [weight + (part if rest > 0 else -part) for weight, part in zip(weights, given, strict=True)]


def _shared(amount: int, room: Sequence[int]) -> list[int]:
    """`amount` shared out in proportion to `room`, nobody getting more than that."""
    total = sum(room)
    if total == 0:
        return [0] * len(room)
    given = [amount * part // total for part in room]
    left = amount - sum(given)
    for index, part in enumerate(room):
        extra = min(left, part - given[index], 1)
        given[index] += extra
        left -= extra
    return given


def _spans(buckets: Iterable[int]) -> list[Span]:
    """Ascending buckets as spans, neighbours joined."""
    spans: list[Span] = []
    for bucket in buckets:
        if spans and spans[-1].last + 1 == bucket:
            spans[-1] = Span(spans[-1].first, bucket)
        else:
            spans.append(Span(bucket, bucket))
    return spans


def owners(layers: Mapping[str, Sequence[Span]]) -> str:
    """Who has how much of a layer, in words: "exp_a has 0.5, exp_b has 0.25"."""
    return ", ".join(f"{name} has {size(spans) / BUCKETS:g}" for name, spans in layers.items())
