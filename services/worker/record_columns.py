"""The columns of a record of the prediction log: what each request of a batch says of itself, and what
clocks say."""

from __future__ import annotations

from collections.abc import Sequence
from struct import pack
from typing import Final

from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import Code

from services.common.ids import new_id
from services.worker.item import Item
from services.worker.tensors import Buffer
from services.worker.wire import Kept, tag, varint

_BATCH_ID: Final = tag(PredictionBatch.BATCH_ID_FIELD_NUMBER, 2) + varint(16)
_ANSWERED_AT: Final = tag(PredictionBatch.ANSWERED_AT_US_FIELD_NUMBER, 1)
_REQUEST_IDS: Final = tag(PredictionBatch.REQUEST_IDS_FIELD_NUMBER, 2)
_UNIT_HASHES: Final = tag(PredictionBatch.UNIT_HASHES_FIELD_NUMBER, 2)
_VARIANTS: Final = tag(PredictionBatch.VARIANTS_FIELD_NUMBER, 2)
_VARIANT_NAMES: Final = tag(PredictionBatch.VARIANT_NAMES_FIELD_NUMBER, 2)
_PROPENSITIES: Final = tag(PredictionBatch.PROPENSITIES_FIELD_NUMBER, 2)
_REVISIONS: Final = tag(PredictionBatch.REVISIONS_FIELD_NUMBER, 2)
_CODES: Final = tag(PredictionBatch.CODES_FIELD_NUMBER, 2)
_ORIGINS: Final = tag(PredictionBatch.ORIGINS_FIELD_NUMBER, 2)
_ATTEMPTS: Final = tag(PredictionBatch.ATTEMPTS_FIELD_NUMBER, 2)
_CACHED: Final = tag(PredictionBatch.CACHED_FIELD_NUMBER, 2)
_LATENCY_US: Final = tag(PredictionBatch.LATENCY_US_FIELD_NUMBER, 2)
_QUEUE_US: Final = tag(PredictionBatch.QUEUE_US_FIELD_NUMBER, 2)
_COMPUTE_US: Final = tag(PredictionBatch.COMPUTE_US_FIELD_NUMBER, 2)
_ROWS: Final = tag(PredictionBatch.ROWS_FIELD_NUMBER, 2)
_EXPERIMENTS: Final = tag(PredictionBatch.EXPERIMENTS_FIELD_NUMBER, 2)
_EXPERIMENT_IDS: Final = tag(PredictionBatch.EXPERIMENT_IDS_FIELD_NUMBER, 2)
_US_MAX: Final = (1 << 32) - 1
_MOST_KEPT: Final = 1024

#: What a request says of itself: variant, propensity, revision, origin, attempt, rows, experiment.
Said = tuple[str, float, int, int, int, int, str]
NOBODY: Final[Said] = ("", 0.0, 0, 0, 0, -1, "")


class Answered:
    """When a batch started to run and was answered: on the event loop's scale, and in Unix microseconds."""

    __slots__ = ("compute_us", "finished", "started", "unix_us")

    def __init__(self, started: float, finished: float, unix_us: int, compute_us: int) -> None:
        self.started = started
        self.finished = finished
        self.unix_us = unix_us
        self.compute_us = compute_us


class Alike:
    """What all requests of a batch said of themselves, and by their number what a record begins with then."""

    __slots__ = ("begins", "said")

    def __init__(self, said: Said) -> None:
        self.said = said
        self.begins: Kept[int, bytes] = Kept(_MOST_KEPT)

    def holds(self, items: Sequence[Item]) -> bool:
        """Whether all of `items` say this. No tuple is made of each: that costs more than to read it."""
        variant, propensity, revision, origin, attempt, rows, experiment = self.said
        for item in items:
            request = item.request
            if (
                item.rows != rows
                or item.origin != origin
                or request.variant != variant
                or request.propensity != propensity
                or request.revision != revision
                or request.attempt != attempt
                or request.experiment != experiment
            ):
                return False
        return True


def said_by(item: Item) -> Said:
    """What the request says of itself."""
    request = item.request
    return (
        request.variant,
        request.propensity,
        request.revision,
        item.origin,
        request.attempt,
        item.rows,
        request.experiment,
    )


def said_columns(said: Sequence[Said], codes: Sequence[Code]) -> bytes:
    """What does not come from a clock, nor names the request."""
    count = len(said)
    variants, propensities, revisions, origins, attempts, rows, experiments = zip(*said, strict=True)
    names = list(dict.fromkeys(variants))
    return b"".join(
        (
            *[_VARIANT_NAMES + varint(len(name)) + name for name in map(str.encode, names)],
            _VARIANTS, _varints([names.index(variant) for variant in variants]),
            _PROPENSITIES, varint(4 * count), pack(f"<{count}f", *propensities),
            _REVISIONS, _varints(revisions),
            _CODES, _varints(codes),
            # An origin that this build does not know may be any number.
            _ORIGINS, _varints([max(0, origin) for origin in origins]),
            _ATTEMPTS, _varints(attempts),
            _CACHED, _varints([0] * count),
            _ROWS, _varints(rows),
            _assigned(experiments),
        )
    )  # fmt: skip


def add_clock_columns(pieces: list[Buffer], items: Sequence[Item], times: Answered) -> None:
    """What comes from clocks, or names the request."""
    count = len(items)
    ids: list[bytes] = []
    hashes: list[int] = []
    latencies: list[bytes] = []
    queued: list[bytes] = []
    alike = True
    queue_us = items[0].queue_us
    unix_us, finished = times.unix_us, times.finished
    for item in items:
        request = item.request
        identifier = request.request_id
        ids.append(identifier if len(identifier) == 16 else bytes(16))
        hashes.append(request.unit_hash)
        # From the gateway's receipt to the answer; from the arrival here where the caller did not say.
        at = request.received_at_us
        latency = unix_us - at if at else int((finished - item.queued_at) * 1e6)
        latencies.append(varint(min(max(0, latency), _US_MAX)))
        if item.queue_us != queue_us:
            alike = False
    if not alike:
        queued = [varint(item.queue_us) for item in items]
    waited = varint(queue_us) * count if alike else b"".join(queued)
    took = latencies[0] if count == 1 else b"".join(latencies)
    computed = varint(times.compute_us) * count
    pieces += [
        _BATCH_ID, new_id(),
        _ANSWERED_AT, times.unix_us.to_bytes(8, "little"),
        _REQUEST_IDS, varint(16 * count), *ids,
        _UNIT_HASHES, varint(8 * count),
        hashes[0].to_bytes(8, "little") if count == 1 else pack(f"<{count}Q", *hashes),
        _LATENCY_US, varint(len(took)), took,
        _QUEUE_US, varint(len(waited)), waited,
        _COMPUTE_US, varint(len(computed)), computed,
    ]  # fmt: skip


def _assigned(experiments: Sequence[str]) -> bytes:
    """Which experiment assigned each; nothing where none assigned any."""
    ids = [name for name in dict.fromkeys(experiments) if name]
    if not ids:
        return b""
    places = {name: place for place, name in enumerate(ids, 1)}
    named = [_EXPERIMENT_IDS + varint(len(name)) + name for name in map(str.encode, ids)]
    return b"".join([*named, _EXPERIMENTS, _varints([places.get(name, 0) for name in experiments])])


def _varints(numbers: Sequence[int]) -> bytes:
    """Length and contents of a packed column."""
    if len(numbers) == 1:
        data = varint(numbers[0])
    elif numbers.count(numbers[0]) == len(numbers):
        data = varint(numbers[0]) * len(numbers)
    else:
        data = b"".join([varint(number) for number in numbers])
    return varint(len(data)) + data
