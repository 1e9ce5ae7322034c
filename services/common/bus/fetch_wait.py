"""How long a fetch waits at the broker for news."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition

#: After so long without news a fetch waits longer.
QUIET_AFTER_S = 60.0
#: How often aiokafka's fetcher looks for something to do of which nobody has told it. It is told of answers,
#: records taken, partitions that come, go or go on, and new metadata; by itself it would look every 200 ms.
IDLE_LOOK_MS = 1000
#: A key that is said again within this time is no news: the heartbeats of workers.
_SAID_AGAIN_S = 5.0


class FetchWait:
    """Short while things come, longer once nothing has come for a minute.

    Kafka answers a fetch as soon as there is something, however long it may wait. One broker (Tansu) only
    looks again after half of what is left of the wait: there a longer one costs less, and brings the first
    record after the quiet later, by half of the wait at most.
    """

    def __init__(self, ms: int, quiet_ms: int) -> None:
        """`ms`: the wait while things come, which consumers are made with; `quiet_ms`: the longer one."""
        self.ms = ms
        self._quiet_ms = quiet_ms
        self._heard_at: float | None = None
        #: Whether nothing has come for a minute.
        self.is_quiet = False

    def heard(self, consumer: AIOKafkaConsumer, now: float) -> None:
        """Something came. `now` is the loop's."""
        self._heard_at = now
        self.is_quiet = False
        _set(consumer, self.ms)

    def look(self, consumer: AIOKafkaConsumer, now: float) -> None:
        """Ask now and then: whether it has become quiet."""
        if self._heard_at is None:
            self._heard_at = now
        self.is_quiet = now - self._heard_at >= QUIET_AFTER_S
        _set(consumer, self._quiet_ms if self.is_quiet else self.ms)


def _set(consumer: AIOKafkaConsumer, ms: int) -> None:
    # aiokafka reads it for each fetch that it sends, and has no other way to change it.
    consumer._fetcher._fetch_max_wait_ms = ms  # noqa: SLF001


class News:
    """Tells what is said for the first time in a while from what is said all the time."""

    def __init__(self) -> None:
        self._furthest: dict[TopicPartition, int] = {}
        self._said: dict[tuple[str, bytes], float] = {}

    def is_in(self, batches: Mapping[TopicPartition, Sequence[ConsumerRecord]], now: float) -> bool:
        """Whether `batches` holds a record whose key was silent until `now`. The last record of a partition
        that is read once more is none."""
        self._said = {key: at for key, at in self._said.items() if now - at < _SAID_AGAIN_S}
        said: set[tuple[str, bytes]] = set()
        for partition, records in batches.items():
            furthest = self._furthest.get(partition)
            said |= {(record.topic, record.key) for record in records if record.offset != furthest}
            self._furthest[partition] = records[-1].offset
        is_news = not said <= self._said.keys()
        self._said |= dict.fromkeys(said, now)
        return is_news
