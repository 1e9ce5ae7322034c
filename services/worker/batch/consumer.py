"""Takes chunks from the pool's group, a few at a time, and goes on until told to stop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog
from google.protobuf.message import DecodeError
from headrace.v1.batch_pb2 import BatchChunk

from services.common.bus import Record
from services.common.bus.delivery import Backoff, dead_letter
from services.common.errors import HeadraceError, InvalidArgument
from services.common.tasks import ended
from services.common.topics import Topic
from services.worker.batch.metrics import BatchStats
from services.worker.batch.port import Chunks, Delivery

log = structlog.get_logger(__name__)

# One is read, one runs, two are being written.
_IN_HAND = 4
#: Rows of a chunk, at most: its tensors are held in memory.
MAX_ROWS = 1 << 20


class ChunkConsumer:
    """Gives each chunk to `do`, whose order of beginning is that of the group, and settles it when `do` has
    returned. A record that is no chunk goes to the dead-letter queue of `group`."""

    def __init__(
        self,
        chunks: Chunks,
        topic: Topic,
        group: str,
        do: Callable[[BatchChunk], Awaitable[None]],
        stats: BatchStats,
    ) -> None:
        self._chunks = chunks
        self._topic = topic
        self._group = group
        self._do = do
        self._stats = stats
        self._hands = asyncio.Semaphore(_IN_HAND)
        self._tasks: set[asyncio.Task[None]] = set()
        self._taking: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to take chunks."""
        self._taking = asyncio.create_task(self._take(), name="batch chunks")

    async def stop(self, seconds: float) -> None:
        """Take nothing more, finish what is in work within `seconds`, abandon the rest: it comes again."""
        taking, self._taking = self._taking, None
        if taking is not None:
            await ended(taking)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=max(0.0, seconds))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _take(self) -> None:
        while True:
            await self._hands.acquire()
            try:
                delivery = await self._chunks.next()
            except BaseException:
                self._hands.release()
                raise
            task = asyncio.create_task(self._handle(delivery), name="batch chunk")
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._hands.release()
        if not task.cancelled() and task.exception() is not None:
            log.error("chunk_task_failed", exc_info=task.exception())

    async def _handle(self, delivery: Delivery) -> None:
        """Until it is settled: nothing behind it in its partition could be, and nothing is skipped."""
        backoff = Backoff(0.2, 10.0)
        self._stats.in_work += 1
        try:
            while True:
                try:
                    try:
                        await self._do(_chunk(delivery.record))
                    except _Malformed as error:
                        await self._bury(delivery.record, error.message)
                except HeadraceError as error:
                    wait = backoff.next()
                    log.warning("chunk_not_done", again_in_s=round(wait, 2), reason=error.message)
                except Exception:
                    wait = backoff.next()
                    log.exception("chunk_not_done", again_in_s=round(wait, 2))
                else:
                    self._chunks.settle(delivery)
                    return
                self._stats.retries += 1
                await asyncio.sleep(wait)
        finally:
            self._stats.in_work -= 1

    async def _bury(self, record: Record, reason: str) -> None:
        self._stats.malformed += 1
        log.error("chunk_malformed", partition=record.partition, offset=record.offset, reason=reason)
        await self._chunks.publish([dead_letter(record, self._topic, self._group, reason)])


class _Malformed(InvalidArgument):
    """The record is no chunk and will never be one."""


def _chunk(record: Record) -> BatchChunk:
    try:
        chunk = BatchChunk.FromString(record.value or b"")
    except DecodeError as error:
        raise _Malformed(f"not a BatchChunk: {error}") from None
    if not chunk.job_id or not chunk.model or not chunk.version or not 0 < chunk.rows <= MAX_ROWS:
        raise _Malformed("job, model, version or rows are missing, or too many rows")
    names = [name for name in chunk.output_prefix.split("/") if name]
    if not names or ".." in names or not (chunk.input.uri or chunk.input.inline or chunk.input.names):
        raise _Malformed("it names no input or no place for its results")
    return chunk
