"""One compacted topic as it is read: what was read of it, and for which tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition

from services.common.bus.table import KafkaTable
from services.common.topics import Topic


class Lost(Exception):
    """The broker no longer has what was read from it."""


class TopicLog:
    """All partitions of one topic read in order, and checked to be the log that was read before.

    A memory-only broker that restarts has new records under old offsets. So the last record of a partition
    is read once more before anything behind it is believed, and whenever `check` says so: another record in
    its place, or an end before it, is Lost. A table that comes late has the topic read once more from its
    start; those that had caught up are given only what they have not seen.
    """

    def __init__(self, topic: Topic) -> None:
        self.topic = topic
        #: Empty until the broker has said how many there are.
        self.partitions: list[TopicPartition] = []
        self.tables: list[KafkaTable] = []
        # The last record of this reading, and the furthest of all readings: what caught-up tables know.
        self._last: dict[TopicPartition, ConsumerRecord] = {}
        self._known: dict[TopicPartition, ConsumerRecord] = {}
        self._rewound: set[TopicPartition] = set()

    @property
    def is_catching_up(self) -> bool:
        """True while a table has yet to be told how things stand."""
        return any(table.is_catching_up for table in self.tables)

    def join(self, table: KafkaTable) -> None:
        """Read for `table`, too, from the start."""
        self.tables.append(table)
        self._last.clear()
        self._rewound.clear()

    def begin_again(self) -> None:
        """Forget everything, the number of partitions included: the broker has another log now."""
        self.partitions = []
        self._last.clear()
        self._known.clear()
        self._rewound.clear()
        for table in self.tables:
            table.begin_again()

    def unread(self) -> list[TopicPartition]:
        """The partitions of which this reading has nothing yet."""
        return [partition for partition in self.partitions if partition not in self._last]

    def seek(self, consumer: AIOKafkaConsumer, starts: Mapping[TopicPartition, int]) -> None:
        """Go to where this reading is, in partitions that `consumer` was just assigned; to `starts` where it
        has read nothing."""
        for partition in self.partitions:
            if partition in self._last:
                self._back_to_last(consumer, partition)
            elif partition in starts:
                consumer.seek(partition, starts[partition])

    def check(self, consumer: AIOKafkaConsumer) -> None:
        """Have the last record of every partition read once more."""
        for partition in self._last:
            self._back_to_last(consumer, partition)

    def read(
        self, consumer: AIOKafkaConsumer, batches: Mapping[TopicPartition, Sequence[ConsumerRecord]]
    ) -> None:
        """Give the tables what is new to them in `batches`. Raises Lost.

        Behind a caught-up reading nothing is believed before the record in front of it was read again;
        without that, a long log is read at full speed.
        """
        checked = not self.is_catching_up
        for partition in self.partitions:
            records = batches.get(partition)
            if not records:
                continue
            if partition in self._last:
                if not self._follows(partition, records[0], checked=checked):
                    self._back_to_last(consumer, partition)  # and these records come again behind it
                    continue
                if records[0].offset == self._last[partition].offset:
                    records = records[1:]
            self._rewound.discard(partition)
            for record in records:
                self._give(partition, record)
            if records:
                self._last[partition] = records[-1]
        for partition, known in self._known.items():
            end = consumer.highwater(partition)
            if end is not None and end <= known.offset:
                raise Lost

    async def settle(self, consumer: AIOKafkaConsumer) -> None:
        """Tell the tables that are catching up that they have, once everything was read."""
        if not self.partitions or not self.is_catching_up or not await self._at_end(consumer):
            return
        for table in self.tables:
            if table.is_catching_up:
                table.catch_up()

    async def _at_end(self, consumer: AIOKafkaConsumer) -> bool:
        """True when the last fetch of every partition left nothing behind."""
        for partition in self.partitions:
            # The mark comes with fetches; ListOffsets is short by up to a batch on one broker (Tansu).
            end = consumer.highwater(partition)
            if end is None or await consumer.position(partition) < end:
                return False
        return True

    def _follows(self, partition: TopicPartition, first: ConsumerRecord, *, checked: bool) -> bool:
        """Whether a batch that begins with `first` is known to continue what was read. Raises Lost."""
        last = self._last[partition]
        if first.offset < last.offset:  # the client went to the beginning: its position no longer existed
            raise Lost
        if first.offset > last.offset:  # after going back to it, this means that compaction took the last one
            return not checked or partition in self._rewound
        if not _same(first, last):
            raise Lost
        return True

    def _give(self, partition: TopicPartition, record: ConsumerRecord) -> None:
        known = self._known.get(partition)
        is_new = known is None or record.offset > known.offset
        if is_new:
            self._known[partition] = record
        elif known is not None and record.offset == known.offset and not _same(record, known):
            raise Lost
        if record.key is None:
            return
        for table in self.tables:
            if is_new or table.is_catching_up:
                table.take(record)

    def _back_to_last(self, consumer: AIOKafkaConsumer, partition: TopicPartition) -> None:
        consumer.seek(partition, self._last[partition].offset)
        self._rewound.add(partition)


def _same(one: ConsumerRecord, other: ConsumerRecord) -> bool:
    return (one.timestamp, one.key, one.value) == (other.timestamp, other.key, other.value)
