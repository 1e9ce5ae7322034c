"""Rate limits shared by several gateways, on a real server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import RedisError, ResponseError

from deploy.embedded.valkey import ValkeyServer
from services.common.clock import ManualClock, SystemClock
from services.common.errors import ResourceExhausted
from services.gateway.leases import Leases, leased
from services.gateway.limiter import Bucket
from tests.fixtures.servers import *  # noqa: F403 - fixtures
from tests.fixtures.waiting import eventually


def admitted(bucket: Bucket, now: float, tries: int) -> int:
    count = 0
    for _ in range(tries):
        try:
            bucket.admit(now)
        except ResourceExhausted:
            break
        count += 1
    return count


async def test_two_gateways_share_one_limit(redis_url: str) -> None:
    clock = ManualClock()
    async with Redis.from_url(redis_url) as redis:
        await redis.flushdb()
        buckets = [Bucket("shared", 0.1, 100) for _ in range(2)]
        leases = [Leases(redis, clock, f"gateway-{index}") for index in range(2)]
        total = 0
        for _round in range(6):
            for bucket, lease in zip(buckets, leases, strict=True):
                total += admitted(bucket, clock.monotonic(), 20)
                await lease.settle([bucket])
        # Both started with the whole burst; what they overdrew is not given again.
        assert 100 <= total <= 121
        assert admitted(buckets[0], clock.monotonic(), 20) == 0
        clock.advance(1.0)
        with pytest.raises(ResourceExhausted):
            buckets[0].admit(clock.monotonic())


async def test_a_lone_gateway_gets_the_whole_rate(redis_url: str) -> None:
    clock = ManualClock()
    async with Redis.from_url(redis_url) as redis:
        await redis.flushdb()
        bucket = Bucket("lone", 50.0, 10)
        lease = Leases(redis, clock, "gateway")
        assert admitted(bucket, 0.0, 99) == 10
        await lease.settle([bucket])
        clock.advance(0.1)
        assert admitted(bucket, clock.monotonic(), 99) in (5, 6)  # the server's clock moved a little too


async def test_who_reported_before_the_clock_was_set_back_shares_no_limit(redis_url: str) -> None:
    clock = ManualClock()
    async with Redis.from_url(redis_url) as redis:
        await redis.flushdb()
        seconds, _ = await redis.time()
        await redis.hset("headrace:limit:{set-back}", "p:dead", str(seconds + 3600))
        bucket = Bucket("set-back", 50.0, 10)
        bucket.admit(0.0)
        await Leases(redis, clock, "gateway").settle([bucket])
        assert bucket._rate == 50.0
        assert not await redis.hexists("headrace:limit:{set-back}", "p:dead")


async def test_redis_away_leaves_the_local_share(new_valkey: Callable[[], ValkeyServer]) -> None:
    server = new_valkey()
    bucket = Bucket("away", 1000.0, 5)
    clock = SystemClock()
    async with leased(server.url, clock, "gateway", lambda: [bucket]) as leases:
        bucket.admit(clock.monotonic())
        await eventually(lambda: leases.available and bucket.spent == 0)
        server.kill()
        bucket.admit(clock.monotonic())
        await eventually(lambda: not leases.available)
        assert bucket.spent == 1
        assert admitted(bucket, clock.monotonic() + 1, 99) == 5


async def test_a_failed_report_loses_nothing() -> None:
    redis = Redis.from_url("redis://127.0.0.1:1/0")
    bucket = Bucket("k", 10.0, 5)
    bucket.admit(1.0)
    with pytest.raises((RedisError, OSError)):
        await Leases(redis, ManualClock(), "gateway").settle([bucket])
    assert bucket.spent == 1
    await redis.aclose()


async def test_a_redis_that_forgot_the_script_is_told_again(redis_url: str) -> None:
    clock = ManualClock()
    async with Redis.from_url(redis_url) as redis:
        await redis.flushdb()
        lease = Leases(redis, clock, "gateway")
        bucket = Bucket("forgetful", 0.01, 10)  # nothing comes back while this runs
        for spent in (1, 2):
            await redis.script_flush()
            bucket.admit(clock.monotonic())
            await lease.settle([bucket])
            left = await redis.hget("headrace:limit:{forgetful}", "tokens")
            assert left is not None
            assert 10 - spent <= float(left) < 10 - spent + 1


async def test_many_keys_are_settled_a_few_at_a_time(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests wait meanwhile; and what is wrong with one key is not the others' affair."""
    sent: list[int] = []

    class Counting(Redis):
        def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:
            pipeline = super().pipeline(transaction, shard_hint)
            execute = pipeline.execute

            async def counted(raise_on_error: bool = True) -> list[Any]:
                sent.append(len(pipeline))
                return await execute(raise_on_error)

            monkeypatch.setattr(pipeline, "execute", counted)
            return pipeline

    clock = ManualClock()
    async with Counting.from_url(redis_url) as redis:
        await redis.flushdb()
        lease = Leases(redis, clock, "gateway")
        buckets = [Bucket(f"many-{number}", 10.0, 10) for number in range(230)]
        for bucket in buckets:
            bucket.admit(clock.monotonic())
        await lease.settle(buckets)
        assert max(sent) <= 50
        assert all(bucket.spent == 0 for bucket in buckets)
        assert len(await redis.keys("headrace:limit:*")) == 230

        await redis.set("headrace:limit:{many-3}", "of another kind")
        for bucket in buckets:
            bucket.admit(clock.monotonic())
        with pytest.raises(ResponseError):
            await lease.settle(buckets)
        assert [bucket.key_id for bucket in buckets if bucket.spent] == ["many-3"]


async def test_settling_says_whether_something_was_spent(redis_url: str) -> None:
    clock = ManualClock()
    async with Redis.from_url(redis_url) as redis:
        await redis.flushdb()
        lease, bucket = Leases(redis, clock, "gateway"), Bucket("told", 10.0, 10)
        assert not await lease.settle([bucket])
        bucket.admit(clock.monotonic())
        assert await lease.settle([bucket])
        assert not await lease.settle([bucket])


async def test_what_is_spent_after_a_while_without_requests_is_reported(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody wakes the task: it looks four times less often then, and does look."""
    monkeypatch.setattr("services.gateway.leases._IDLE_AFTER_S", 0.0)
    bucket, clock = Bucket("rested", 10.0, 10), SystemClock()
    looks = 0

    def buckets() -> list[Bucket]:
        nonlocal looks
        looks += 1
        return [bucket]

    async with leased(redis_url, clock, "gateway", buckets) as leases:
        await eventually(lambda: leases.available)
        began, before = clock.monotonic(), looks
        await eventually(lambda: looks >= before + 3)
        assert clock.monotonic() - began > 0.25
        bucket.admit(clock.monotonic())
        await eventually(lambda: bucket.spent == 0)
