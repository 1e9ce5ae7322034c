"""What one follower of a compacted topic is told of it."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable

from aiokafka import ConsumerRecord

from services.common.errors import Unavailable
from services.common.topics import Topic

log = logging.getLogger(__name__)


class KafkaTable:
    """Table over a Kafka topic. `refused` counts the records `apply` raised on. `apply` runs in the context
    in which the table was made, since others may have begun the task that reads for it."""

    def __init__(self, topic: Topic, apply: Callable[[bytes, bytes | None], None]) -> None:
        self._topic = topic
        self._apply = apply
        self._context = contextvars.copy_context()
        self._caught_up = asyncio.Event()
        # What is old news by the end must not be acted on: only the last value of a key counts.
        self._latest: dict[bytes, ConsumerRecord] | None = {}
        self.refused = 0
        self.readings = 0

    @property
    def caught_up(self) -> bool:
        """See Table."""
        return self._caught_up.is_set()

    @property
    def is_catching_up(self) -> bool:
        """True while the topic is read from its start for this table, the first time or again."""
        return self._latest is not None

    async def ready(self, timeout: float) -> None:
        """See Table."""
        try:
            # Not wait_for: before Python 3.12 it can lose a cancellation.
            async with asyncio.timeout(timeout):
                await self._caught_up.wait()
        except TimeoutError:
            raise Unavailable(f"{self._topic.name} was not read within {timeout:g} s") from None

    def begin_again(self) -> None:
        """The topic is read from its start once more."""
        self._latest = {}

    def take(self, record: ConsumerRecord) -> None:
        """One record that has a key: kept until `catch_up`, afterwards applied."""
        if self._latest is None:
            self._apply_one(record)
        else:
            self._latest.pop(record.key, None)
            self._latest[record.key] = record

    def catch_up(self) -> None:
        """Everything that the topic held was taken: apply it."""
        latest, self._latest = self._latest or {}, None
        self.readings += 1
        for record in latest.values():
            self._apply_one(record)
        self._caught_up.set()

    def _apply_one(self, record: ConsumerRecord) -> None:
        try:
            self._context.run(self._apply, record.key, record.value)
        except Exception:
            self.refused += 1
            log.exception("record of %s at offset %d was refused", record.topic, record.offset)
