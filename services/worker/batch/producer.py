"""Publishing by librdkafka: the prediction log of a chunk is too much for the event loop to send."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from services.common.bus import Record
from services.common.bus.port import MAX_RECORD_BYTES, check_size
from services.common.errors import InvalidArgument, Unavailable
from services.worker.batch import outages

_PUBLISH_S = 30.0
_CLOSE_S = 5.0
_QUEUE_BYTES = 64 << 20
_FULL_PAUSE_S = 0.005

Acknowledged = Callable[[KafkaError | None, Message], None]


class AckedProducer:
    """Publishes and waits for all acknowledgements, as a context manager; entering waits for nothing."""

    def __init__(self, bootstrap: str, client_id: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._options: dict[str, Any] = {
            "bootstrap.servers": bootstrap,
            "client.id": client_id,
            "acks": "all",
            "linger.ms": 2,
            "message.max.bytes": MAX_RECORD_BYTES + (1 << 20),
            "queue.buffering.max.kbytes": _QUEUE_BYTES >> 10,
            "message.timeout.ms": int(_PUBLISH_S * 1000),
            "reconnect.backoff.max.ms": 1000,
        }
        self._producer: Producer | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="batch-acks", daemon=True)

    async def __aenter__(self) -> Self:
        self._producer = Producer(self._options, logger=outages.log)
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        await asyncio.to_thread(self._thread.join, _CLOSE_S)
        self._producer = None

    async def publish(self, records: Sequence[Record]) -> None:
        """See Chunks."""
        for record in records:
            check_size(record)
        producer, left, failed = self._producer, len(records), None
        if producer is None:
            raise Unavailable("the producer is closed")
        if not records:
            return
        done: asyncio.Future[KafkaError | None] = self._loop.create_future()

        def acknowledged(error: KafkaError | None, _message: Message) -> None:
            """Called in the polling thread, for one record after another."""
            nonlocal left, failed
            left, failed = left - 1, failed or error
            if not left:
                with suppress(RuntimeError):  # the loop has been closed
                    self._loop.call_soon_threadsafe(_settle, done, failed)

        try:
            await asyncio.to_thread(self._produce, producer, records, acknowledged)
            async with asyncio.timeout(_PUBLISH_S + _CLOSE_S):
                error = await done
        except TimeoutError:
            raise Unavailable("the event broker did not acknowledge in time") from None
        except KafkaException as raised:
            raise Unavailable(f"the event broker did not take it: {raised}") from raised
        if error is not None:
            if error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
                raise InvalidArgument(f"a record is larger than {MAX_RECORD_BYTES} bytes")
            raise Unavailable(f"the event broker did not acknowledge: {error.str()}")

    def _produce(self, producer: Producer, records: Sequence[Record], acknowledged: Acknowledged) -> None:
        """Hand over; waits while the producer's queue is full, at most until records in it expire."""
        for record in records:
            while True:
                try:
                    producer.produce(
                        record.topic,
                        record.value,
                        record.key,
                        on_delivery=acknowledged,
                        headers=list(record.headers),
                    )
                    break
                except BufferError:
                    if self._stopping.is_set():
                        raise Unavailable("the worker is leaving") from None
                    time.sleep(_FULL_PAUSE_S)

    def _poll(self) -> None:
        while self._producer is not None and not self._stopping.is_set():
            self._producer.poll(0.1)


def _settle(done: asyncio.Future[KafkaError | None], error: KafkaError | None) -> None:
    if not done.done():
        done.set_result(error)
