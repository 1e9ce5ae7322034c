"""Requests of several megabytes on every way through the router that keeps, copies or repeats them: they go
on as views on what arrived, so each of these must carry all of it."""

from __future__ import annotations

import random
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from zlib import crc32

import pytest
from headrace.v1.control_pb2 import Hedging
from headrace.v1.dataplane_pb2 import Origin, PredictReply, PredictRequest
from headrace.v1.events_pb2 import ShadowVerdict
from headrace.v1.tensor_pb2 import Code, DataType
from redis.asyncio import Redis

from services.common.frames import Peer
from tests.fixtures.router import FakeWorker, request, sole
from tests.fixtures.router_platform import BOTH, Platform, platform, soon
from tests.fixtures.servers import *  # noqa: F403 - fixtures
from tests.fixtures.waiting import eventually, eventually_of
from tests.integration.test_router_shadow import comparisons, shadowing

ELEMENTS = 768 << 10


def large(n: int, **fields: str) -> PredictRequest:
    """Two tensors, 3 MB and 64 kB, told apart by their last bytes."""
    made = request(n, **fields)
    made.inputs[0].shape[:] = [1, ELEMENTS]
    made.inputs[0].data = bytes(ELEMENTS * 4 - 4) + n.to_bytes(4, "little")
    noise = random.Random(n).randbytes(64 << 10)
    made.inputs.add(name="z", datatype=DataType.DATA_TYPE_UINT8, shape=[1, len(noise)], data=noise)
    return made


async def ask(p: Platform, n: int, **fields: str) -> PredictReply:
    return await p.calls.predict(large(n, **fields), soon())


def assert_whole(got: PredictRequest | PredictReply, n: int) -> None:
    tensors = got.inputs if isinstance(got, PredictRequest) else got.outputs
    for tensor, wanted in zip(tensors, large(n).inputs, strict=True):
        assert (tensor.name, list(tensor.shape)) == (wanted.name, list(wanted.shape))
        assert tensor.data == wanted.data, "bytes were lost on the way"


async def test_a_lost_worker_costs_a_large_request_nothing(tmp_path: Path) -> None:
    async with platform(tmp_path) as p:
        workers = [await p.worker("w1"), await p.worker("w2")]
        first: list[str] = []

        def behave(worker: FakeWorker, peer: Peer, item: PredictRequest) -> None:
            if not first:
                first.append(worker.worker_id)
                for connection in list(worker.server._connections):
                    connection.abort()
            else:
                worker.echo(peer, item)

        for worker in workers:
            worker.behave = behave
        reply = await ask(p, 7)
        assert reply.code == Code.CODE_OK
        assert_whole(reply, 7)
        repeated = [item for worker in workers for item in worker.seen if item.attempt == 1]
        assert len(repeated) == 1
        assert_whole(repeated[0], 7)
        assert repeated[0].unit_hash


async def test_a_hedge_of_a_large_request_is_all_of_it(tmp_path: Path) -> None:
    async with platform(tmp_path) as p:
        made = sole()
        made.hedging.CopyFrom(Hedging(min_delay_ms=20))
        await p.serve(made)
        workers = [await p.worker("w1"), await p.worker("w2")]
        for n in range(128):  # to know what is usual
            assert (await p.ask(n)).code == Code.CODE_OK
        seen: list[PredictRequest] = []

        def behave(worker: FakeWorker, peer: Peer, item: PredictRequest) -> None:
            seen.append(item)
            if len(seen) > 1:
                worker.echo(peer, item)

        for worker in workers:
            worker.behave = behave
        reply = await ask(p, 8)
        assert reply.code == Code.CODE_OK
        assert_whole(reply, 8)
        assert [item.attempt for item in seen] == [0, 1]
        for item in seen:
            assert_whole(item, 8)
        await eventually(lambda: sum(worker.cancelled for worker in workers) == 1)


async def test_a_shadow_gets_all_of_a_large_request(tmp_path: Path) -> None:
    async with shadowing(tmp_path) as p:
        worker = await p.worker("w1")

        def checksum(_worker: FakeWorker, peer: Peer, item: PredictRequest) -> None:
            reply = PredictReply(id=item.id, version=item.version)
            sums = [crc32(tensor.data) % 1000 for tensor in item.inputs]
            reply.outputs.add(
                name="y", datatype=DataType.DATA_TYPE_FP64, shape=[1, 2], data=struct.pack("<2d", *sums)
            )
            peer.reply(reply)

        worker.behave = checksum
        for n in range(3):
            reply = await ask(p, n)
            assert (reply.code, reply.version) == (Code.CODE_OK, "1")
        found = [verdict for record in await comparisons(p, 3) for verdict in record.verdicts]
        assert found == [ShadowVerdict.SHADOW_VERDICT_EQUAL] * 3
        copies = [item for item in worker.seen if item.origin == Origin.ORIGIN_SHADOW]
        assert len(copies) == 3
        for item in copies:
            assert_whole(item, int.from_bytes(item.request_id, "big"))
        await eventually(
            lambda: p.router.dispatcher.mirror is not None and not p.router.dispatcher.mirror.nbytes
        )


@asynccontextmanager
async def caching(directory: Path, url: str) -> AsyncIterator[Platform]:
    async with Redis.from_url(url) as redis:
        await redis.flushdb()
    async with platform(directory, redis_url=url, cache_budget_ms=1000) as p:
        made = sole()
        made.versions[0].artifact_digest = f"sha256:{directory.name}"
        made.cache.ttl_ms, made.cache.max_entry_bytes = 60_000, 8 << 20
        await p.serve(made)
        await eventually(lambda: p.store.usable)
        yield p


async def test_large_requests_are_told_apart_by_the_cache(tmp_path: Path, redis_url: str) -> None:
    async with caching(tmp_path, redis_url) as p:
        worker = await p.worker("w1", BOTH)
        for n in (1, 2):
            reply = await ask(p, n)
            assert (reply.code, reply.cached) == (Code.CODE_OK, False)
            assert_whole(reply, n)
        async with Redis.from_url(redis_url) as redis:
            await eventually_of(redis.dbsize, lambda kept: kept == 2)
        # A store of this size may take longer than a look-up may; then it is computed again, and right.
        for n in (1, 2):
            reply = await eventually_of(lambda n=n: ask(p, n), lambda reply: reply.cached)  # type: ignore[misc]
            assert reply.code == Code.CODE_OK
            assert_whole(reply, n)
        for item in worker.seen:
            assert_whole(item, int.from_bytes(item.request_id, "big"))


async def test_a_large_request_is_logged_as_what_it_is_where_nobody_answers_it(tmp_path: Path) -> None:
    async with platform(tmp_path, endpoint_wait_s=0) as p:
        reply = await ask(p, 3)
        assert reply.code == Code.CODE_UNAVAILABLE
        records = await p.records()
        assert [list(record.codes) for record in records] == [[Code.CODE_UNAVAILABLE]]
        assert [list(record.rows) for record in records] == [[1]]


@pytest.mark.parametrize("leaves", ["before", "after"])
async def test_a_caller_that_leaves_a_large_request_takes_it_back(tmp_path: Path, leaves: str) -> None:
    async with platform(tmp_path) as p:
        worker = await p.worker("w1")
        worker.behave = lambda _worker, _peer, _item: None
        local_id = p.calls.submit(large(5), soon(), lambda _reply: None)
        if leaves == "after":
            await eventually(lambda: worker.seen)
        p.calls.cancel(local_id)
        await eventually(lambda: not p.router.dispatcher.budget.active)
        await eventually(lambda: worker.cancelled == len(worker.seen))
        worker.behave = None
        reply = await ask(p, 6)
        assert_whole(reply, 6)
