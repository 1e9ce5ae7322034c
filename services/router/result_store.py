"""Kept answers in Redis or Valkey: one MGET for all that a loop turn asks, pipelined SETs, and nothing that
can hold a request up. The store being slow or away is a miss.

Three owned tasks, each with at most one round trip under way: one reads, one writes, one finds out whether
the server is there again. What waits for them is bounded; what finds no room is a miss, or is not kept.

A read that takes too long is a miss; only several in a row say that the server is away, for on a busy machine
it may be us who were late to look. A server that takes no writes, being full or a replica, is still read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import structlog
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from services.common.tasks import stopped

log = structlog.get_logger(__name__)

#: Called once with the value, or with None for a miss.
Found = Callable[[bytes | None], None]

#: Reads in a row that took too long, before the server is taken to be away.
_SLOW: Final = 3
_AWAY: Final = (RedisError, TimeoutError, OSError)
_CONNECTIONS: Final = 3
_MAX_KEYS: Final = 2048
_MAX_ENTRIES: Final = 2048
_MAX_BYTES: Final = 16 << 20
_WRITE_S: Final = 0.5
_PING_S: Final = 1.0
_RETRY_S: Final = 0.5


class ResultStore:
    """Reads and writes; never raises for the server."""

    def __init__(self, redis: Redis, budget_s: float) -> None:
        """`budget_s` is what one read may take."""
        self._redis = redis
        self._budget_s = budget_s
        self._asked: list[tuple[bytes, Found]] = []
        self._kept: list[tuple[bytes, bytes, int]] = []
        self._kept_bytes = 0
        self._asking = asyncio.Event()
        self._keeping = asyncio.Event()
        self._doubtful = asyncio.Event()
        self._doubtful.set()
        #: Whether reads are tried at all; False until the server has been seen, and after every failure.
        self.usable = False
        self._slow = 0
        self._refusing = False
        self.failures = 0
        self.dropped = 0
        self.round_trips = 0

    def ask(self, key: bytes, found: Found) -> bool:
        """Look `key` up; `found` is called later, on the loop. False: a miss, and `found` is never called."""
        if not self.usable or len(self._asked) >= _MAX_KEYS:
            return False
        self._asked.append((key, found))
        self._asking.set()
        return True

    def keep(self, key: bytes, value: bytes, ttl_ms: int) -> None:
        """Store `value` soon, for `ttl_ms`; dropped where too much waits already."""
        if not self.usable or len(self._kept) >= _MAX_ENTRIES or self._kept_bytes + len(value) > _MAX_BYTES:
            self.dropped += 1
            return
        self._kept.append((key, value, ttl_ms))
        self._kept_bytes += len(value)
        self._keeping.set()

    async def read(self) -> None:
        """Answer what is asked, until cancelled; what is still open then is a miss."""
        asked: list[tuple[bytes, Found]] = []
        try:
            while True:
                await self._asking.wait()
                self._asking.clear()
                asked, self._asked = self._asked, []
                values = await self._get([key for key, _ in asked])
                for _, found in asked:
                    found(values.pop() if values else None)
                asked = []
        finally:
            self.usable = False
            left, self._asked = [*asked, *self._asked], []
            for _, found in left:
                found(None)

    async def _get(self, keys: list[bytes]) -> list[bytes | None]:
        """The values, last one first; empty where there is no answer in time."""
        self.round_trips += 1
        try:
            async with asyncio.timeout(self._budget_s):
                values = list(await self._redis.mget(keys))
        except TimeoutError as error:
            self._slow += 1
            if self._slow < _SLOW:
                self.failures += 1
            else:
                self._doubt(error)
            return []
        except Exception as error:  # a task that ended here would leave whoever asks waiting
            self._doubt(error)
            return []
        self._slow = 0
        return [value if isinstance(value, bytes) else None for value in reversed(values)]

    async def write(self) -> None:
        """Store what is kept, until cancelled."""
        while True:
            await self._keeping.wait()
            self._keeping.clear()
            kept, self._kept, self._kept_bytes = self._kept, [], 0
            try:
                async with asyncio.timeout(_WRITE_S):
                    pipeline = self._redis.pipeline(transaction=False)
                    for key, value, ttl_ms in kept:
                        pipeline.set(key, value, px=ttl_ms)
                    said = await pipeline.execute(raise_on_error=False)
                    self._note_refused([one for one in said if isinstance(one, Exception)])
            except Exception as error:  # as above: nothing would be kept any more
                self.dropped += len(kept)
                self._doubt(error)

    def _note_refused(self, errors: list[Exception]) -> None:
        """Of what was written, these were not taken."""
        for error in errors:
            if not isinstance(error, ResponseError):
                raise error
        self.dropped += len(errors)
        if errors and not self._refusing:
            log.warning("result_cache_takes_nothing", reason=str(errors[0]))
        self._refusing = bool(errors)

    async def watch(self) -> None:
        """After a failure, and at first: find out when the server answers, until cancelled."""
        while True:
            await self._doubtful.wait()
            if self.failures:
                await asyncio.sleep(_RETRY_S)
            try:
                async with asyncio.timeout(_PING_S):
                    await self._redis.ping()
            except Exception:  # as above: it would never be tried again
                self.failures += 1
            else:
                self._slow = 0
                self._doubtful.clear()
                self.usable = True
                log.info("result_cache_reached")

    def _doubt(self, error: Exception) -> None:
        self.failures += 1
        if not isinstance(error, _AWAY):
            log.error("result_cache_broke", exc_info=error)
        elif self.usable:
            log.warning("result_cache_away", reason=str(error) or type(error).__name__)
        self.usable = False
        self._doubtful.set()


@asynccontextmanager
async def result_store(redis_url: str, budget_s: float) -> AsyncIterator[ResultStore]:
    """A store at `redis_url` while the block runs."""
    redis = Redis.from_url(
        redis_url,
        max_connections=_CONNECTIONS,
        socket_timeout=_PING_S,
        socket_connect_timeout=_PING_S,
        retry=Retry(NoBackoff(), 0),
    )
    store = ResultStore(redis, budget_s)
    tasks = {
        asyncio.create_task(work, name=f"result cache {name}")
        for name, work in (("read", store.read()), ("write", store.write()), ("watch", store.watch()))
    }
    try:
        yield store
    finally:
        await stopped(*tasks)
        await redis.aclose()
