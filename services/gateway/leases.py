"""The shared part of the rate limits: one trip to Redis per interval, for all keys together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from hashlib import sha1
from typing import Any

import structlog
from redis.asyncio import Redis
from redis.exceptions import NoScriptError, RedisError

from services.common.clock import Clock
from services.common.tasks import stopped
from services.gateway.limiter import Bucket

log = structlog.get_logger(__name__)

_INTERVAL_S = 0.05
#: The same once nothing was spent for a while: what is spent first is reported this much later.
_IDLE_INTERVAL_S, _IDLE_AFTER_S = 0.2, 2.0
_TIMEOUT_S = 0.5
_RETRY_S = 1.0
_BUCKETS_PER_TRIP = 1000
#: Of these, so many in one message: it is written and its answers are read without a pause for requests.
_BUCKETS_AT_ONCE = 50

#: KEYS[1]: hash of one key. ARGV: rate, burst, spent, process, seconds a process counts after its last
#: report. Time is Redis's own, so that clocks of gateways do not matter; where it is set back, nothing is
#: earned meanwhile, and what was reported later than now counts for nobody. Overdraft is kept to one burst.
_SETTLE = """
local t = redis.call('TIME')
local now = t[1] + t[2] / 1e6
local rate, burst, spent = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local state = redis.call('HMGET', KEYS[1], 'tokens', 'at')
local tokens = tonumber(state[1]) or burst
local at = tonumber(state[2]) or now
tokens = math.min(burst, tokens + math.max(0, now - at) * rate) - spent
tokens = math.max(tokens, -burst)
redis.call('HSET', KEYS[1], 'tokens', tostring(tokens), 'at', tostring(now), 'p:' .. ARGV[4], tostring(now))
local sharers = 0
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  if string.sub(all[i], 1, 2) == 'p:' then
    if math.abs(now - tonumber(all[i + 1])) > tonumber(ARGV[5]) then redis.call('HDEL', KEYS[1], all[i])
    else sharers = sharers + 1 end
  end
end
redis.call('EXPIRE', KEYS[1], math.ceil(burst / rate) + 60)
return {tostring(tokens), sharers}
"""
_SHARER_S = 2.0


class Leases:
    """Settles the buckets that were used since the last time."""

    def __init__(self, redis: Redis, clock: Clock, process: str, sharers: int = 1) -> None:
        """`sharers`: processes among which limits are divided until Redis says how many use a key."""
        self._redis = redis
        self._clock = clock
        self._process = process
        self._sharers = sharers
        self._script = sha1(_SETTLE.encode(), usedforsecurity=False).hexdigest()
        self.available = False
        # Where the next trip starts when one cannot take all.
        self._position = 0

    async def settle(self, buckets: Iterable[Bucket]) -> bool:
        """Report what `buckets` spent and take over what their keys have left; where they are too many for
        one trip, in turn. False where nothing was spent. Raises RedisError or TimeoutError; then nothing is
        lost."""
        used = self._chosen(list(buckets))
        failed: Exception | None = None
        for begin in range(0, len(used), _BUCKETS_AT_ONCE):
            failed = await self._settle(used[begin : begin + _BUCKETS_AT_ONCE]) or failed
        if failed is not None:
            raise failed
        return bool(used)

    async def _settle(self, used: list[Bucket]) -> Exception | None:
        """What went wrong with some of the keys alone. Raises what went wrong with all of them."""
        reports = [bucket.report() for bucket in used]
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                answers = await self._asked(used, reports)
                if any(isinstance(answer, NoScriptError) for answer in answers):
                    # The first trip, or a Redis that was started anew; then nobody knew the script.
                    await self._redis.script_load(_SETTLE)
                    answers = await self._asked(used, reports)
        except BaseException:
            for bucket, spent in zip(used, reports, strict=True):
                bucket.unreported(spent)
            raise
        now = self._clock.monotonic()
        failed: Exception | None = None
        for bucket, spent, answer in zip(used, reports, answers, strict=True):
            if isinstance(answer, Exception):  # of this key alone
                bucket.unreported(spent)
                failed = answer
            else:
                left, sharers = answer
                bucket.granted(float(left), int(sharers), now)
        return failed

    async def _asked(self, used: list[Bucket], reports: list[int]) -> list[Any]:
        """One answer, or what went wrong, for each bucket."""
        pipeline = self._redis.pipeline(transaction=False)
        for bucket, spent in zip(used, reports, strict=True):
            # By its digest: redis-py's own scripts ask in every trip whether the server still knows them.
            await pipeline.evalsha(
                self._script,
                1,
                f"headrace:limit:{{{bucket.key_id}}}",
                *(bucket.rate, bucket.burst, spent, self._process, _SHARER_S),
            )
        return await pipeline.execute(raise_on_error=False)

    def _chosen(self, buckets: list[Bucket]) -> list[Bucket]:
        start = self._position
        used = [bucket for bucket in (*buckets[start:], *buckets[:start]) if bucket.spent]
        if len(used) <= _BUCKETS_PER_TRIP:
            self._position = 0
            return used
        chosen = used[:_BUCKETS_PER_TRIP]
        self._position = buckets.index(chosen[-1]) + 1
        return chosen

    def _go_on_alone(self, buckets: Iterable[Bucket]) -> None:
        self.available = False
        for bucket in buckets:
            bucket.alone(self._sharers)

    async def run(self, buckets: Callable[[], Iterable[Bucket]]) -> None:
        """Settle at intervals, for ever. Redis away: local shares."""
        known: list[Bucket] = []
        used_at = self._clock.monotonic()
        while True:
            try:
                known = list(buckets())
                if await self.settle(known):
                    used_at = self._clock.monotonic()
            except (RedisError, TimeoutError, OSError) as error:
                if self.available:
                    log.warning("limits_local", reason=str(error) or type(error).__name__)
                self._go_on_alone(known)
                await asyncio.sleep(_RETRY_S)
            except Exception:
                # A task that ended here would leave every limit to each gateway alone, for ever.
                log.exception("limits_not_settled")
                self._go_on_alone(known)
                await asyncio.sleep(_RETRY_S)
            else:
                self.available = True
                idle = self._clock.monotonic() - used_at >= _IDLE_AFTER_S
                await asyncio.sleep(_IDLE_INTERVAL_S if idle else _INTERVAL_S)


@asynccontextmanager
async def leased(
    redis_url: str, clock: Clock, process: str, buckets: Callable[[], Iterable[Bucket]], sharers: int = 1
) -> AsyncIterator[Leases]:
    """Keep `buckets()` settled while the block runs; without Redis each grants its part of `sharers`."""
    redis = Redis.from_url(redis_url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S)
    leases = Leases(redis, clock, process, sharers)
    task = asyncio.create_task(leases.run(buckets), name="limits")
    try:
        yield leases
    finally:
        await stopped(task)
        await redis.aclose()
