"""The result cache on a real Valkey, with a router and workers on real frames."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest
from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import Code
from redis.asyncio import Redis

from deploy.embedded.valkey import ValkeyServer
from services.common.errors import ResourceExhausted
from services.common.frames import Peer
from services.router.result_store import ResultStore, result_store
from tests.fixtures.router import FakeWorker, request, sole
from tests.fixtures.router_platform import BOTH, Platform, platform, refuse, soon
from tests.fixtures.servers import *  # noqa: F403 - fixtures
from tests.fixtures.waiting import PATIENCE_S, eventually, eventually_of, patience


@asynccontextmanager
async def caching(
    directory: Path, url: str, *, logged: bool = True, entry: int = 4096
) -> AsyncIterator[Platform]:
    """One version, cached for a minute, on an empty store that was reached."""
    async with Redis.from_url(url) as redis:
        await redis.flushdb()
    async with platform(directory, redis_url=url, cache_budget_ms=500) as p:
        made = sole()
        made.log_payloads = logged
        made.versions[0].signature.batched = True
        made.versions[0].artifact_digest = f"sha256:{directory.name}"
        made.cache.ttl_ms, made.cache.max_entry_bytes = 60_000, entry
        await p.serve(made)
        await eventually(lambda: p.store.usable)
        yield p


async def test_an_answer_is_given_again_and_logged_as_cached(tmp_path: Path, redis_url: str) -> None:
    async with caching(tmp_path, redis_url) as p:
        worker = await p.worker("w1", BOTH)

        def answer(worker: FakeWorker, peer: Peer, item: PredictRequest) -> None:
            reply = PredictReply(id=item.id, version="1", variant="1", outputs=item.inputs, compute_us=7)
            reply.parameters["note"].string_value = "kept"
            peer.reply(reply)

        worker.behave = answer
        first = await asyncio.gather(*(p.ask(n, unit=f"u{n}") for n in range(20)))
        assert not any(reply.cached for reply in first)
        await until_kept(redis_url, 20)
        again = await asyncio.gather(*(p.ask(n, unit=f"v{n}") for n in range(20)))
        assert len(worker.seen) == 20
        for n, reply in enumerate(again):
            assert (reply.code, reply.cached, reply.version, reply.compute_us) == (Code.CODE_OK, True, "1", 0)
            assert reply.outputs[0].data[:4] == n.to_bytes(4, "little")
            assert reply.parameters["note"].string_value == "kept"
        records = await p.records()
        assert {record.writer for record in records} == {PredictionBatch.WRITER_ROUTER}
        assert sum(len(record.codes) for record in records) == 20
        assert all(all(record.cached) for record in records)
        for record in records:
            count = len(record.codes)
            assert list(record.inputs[0].shape) == [count, 30]
            assert record.inputs[0].data == record.outputs[0].data
            assert len(record.inputs[0].data) == count * 120
            assert set(record.codes) == {Code.CODE_OK}
            assert record.variant_names == ["1"]
        text = await p.metrics()
        assert 'cache_requests_total{model="cancer",result="hit",version="1"} 20.0' in text
        assert 'cache_requests_total{model="cancer",result="miss",version="1"} 20.0' in text
        assert "headrace_router_cache_up 1.0" in text


async def until_kept(url: str, count: int) -> None:
    async with Redis.from_url(url) as redis:
        await eventually_of(redis.dbsize, lambda kept: kept >= count)


async def test_what_comes_in_one_frame_is_looked_up_in_one_round_trip(tmp_path: Path, redis_url: str) -> None:
    async with caching(tmp_path, redis_url) as p:
        await p.worker("w1", BOTH)
        before = p.store.round_trips
        await asyncio.gather(*(p.ask(n) for n in range(100)))
        assert 1 <= p.store.round_trips - before <= 3


async def test_equal_requests_are_computed_once(tmp_path: Path, redis_url: str) -> None:
    async with caching(tmp_path, redis_url) as p:
        worker = await p.worker("w1", BOTH)
        held: list[tuple[Peer, PredictRequest]] = []
        worker.behave = lambda _, peer, item: held.append((peer, item))
        waiting = [asyncio.create_task(p.ask(5)) for _ in range(50)]
        await eventually(lambda: held)
        late = asyncio.create_task(p.calls.predict(request(5), soon(0.05)))
        assert (await late).code == Code.CODE_DEADLINE_EXCEEDED
        worker.echo(*held[0])
        replies = await asyncio.gather(*waiting)
        assert [reply.cached for reply in replies].count(False) == 1
        assert {reply.code for reply in replies} == {Code.CODE_OK}
        assert len(worker.seen) == 1
        assert p.router.dispatcher.budget.active == 0
        assert len(p.cache) == 0


async def test_when_the_first_one_goes_another_takes_its_place(tmp_path: Path, redis_url: str) -> None:
    async with caching(tmp_path, redis_url) as p:
        worker = await p.worker("w1", BOTH)
        worker.behave = lambda *_: None
        first = asyncio.create_task(p.ask(5))
        await eventually(lambda: worker.seen)
        others = [asyncio.create_task(p.ask(5)) for _ in range(3)]
        await asyncio.sleep(0.05)
        worker.behave = None
        first.cancel()
        others.pop().cancel()
        replies = await asyncio.gather(*others)
        assert {reply.code for reply in replies} == {Code.CODE_OK}
        assert len(worker.seen) == 2
        assert len(p.cache) == 0


async def test_errors_are_neither_kept_nor_shared(tmp_path: Path, redis_url: str) -> None:
    async with caching(tmp_path, redis_url) as p:
        worker = await p.worker("w1", BOTH)
        worker.behave = refuse(Code.CODE_INVALID_ARGUMENT)
        replies = await asyncio.gather(*(p.ask(1) for _ in range(4)))
        assert {reply.code for reply in replies} == {Code.CODE_INVALID_ARGUMENT}
        assert len(worker.seen) == 4
        worker.behave = None
        reply = await p.ask(1)
        assert (reply.code, reply.cached) == (Code.CODE_OK, False)


async def test_answers_above_the_limit_are_not_kept(tmp_path: Path, redis_url: str) -> None:
    async with caching(tmp_path, redis_url, entry=64) as p:
        await p.worker("w1", BOTH)
        for _ in range(2):
            assert not (await p.ask(1)).cached
        async with Redis.from_url(redis_url) as redis:
            assert await redis.dbsize() == 0


async def test_no_tensors_in_the_log_where_the_deployment_says_so(tmp_path: Path, redis_url: str) -> None:
    async with caching(tmp_path, redis_url, logged=False) as p:
        await p.worker("w1", BOTH)
        await p.ask(1)
        await until_kept(redis_url, 1)
        assert (await p.ask(1)).cached
        (record,) = await p.records()
        assert (list(record.cached), list(record.rows), len(record.inputs)) == ([True], [1], 0)


async def test_rubbish_in_the_store_is_a_miss(tmp_path: Path, redis_url: str) -> None:
    async with caching(tmp_path, redis_url) as p:
        worker = await p.worker("w1", BOTH)
        await p.ask(1)
        await until_kept(redis_url, 1)
        async with Redis.from_url(redis_url) as redis:
            (key,) = await redis.keys()
            await redis.set(key, b"\xff\xff\xff")
        reply = await p.ask(1)
        assert (reply.code, reply.cached) == (Code.CODE_OK, False)
        assert len(worker.seen) == 2


async def test_what_cannot_be_logged_is_computed(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with caching(tmp_path, redis_url) as p:
        worker = await p.worker("w1", BOTH)
        await p.ask(1)
        await until_kept(redis_url, 1)

        def full(*_: object) -> None:
            raise ResourceExhausted("full")

        monkeypatch.setattr(p.router.log, "append", full)
        reply = await p.ask(1)
        assert (reply.code, reply.cached) == (Code.CODE_OK, False)
        assert len(worker.seen) == 2


async def test_the_store_dies_under_load_and_comes_back(tmp_path: Path) -> None:
    server = ValkeyServer(tmp_path / "valkey")
    await asyncio.to_thread(server.prepare)
    server.launch()
    await asyncio.to_thread(server.wait_ready, PATIENCE_S)
    try:
        async with caching(tmp_path, server.url) as p:
            await p.worker("w1", BOTH)
            codes: set[Code] = set()
            stop = False

            async def user(number: int) -> None:
                turn = 0
                while not stop:
                    turn += 1
                    reply = await p.ask(number * 10 + turn % 10)
                    codes.add(reply.code)
                    assert reply.outputs[0].data[:4] == (number * 10 + turn % 10).to_bytes(4, "little")

            async with asyncio.TaskGroup() as users:
                for number in range(16):
                    users.create_task(user(number))
                await asyncio.sleep(0.2)
                server.kill()
                await eventually(lambda: not p.store.usable)
                assert (await p.ask(9999)).code == Code.CODE_OK
                assert "headrace_router_cache_up 0.0" in await p.metrics()
                server.launch()
                await asyncio.to_thread(server.wait_ready, PATIENCE_S)
                await eventually(lambda: p.store.usable)
                stop = True
            assert codes == {Code.CODE_OK}
            assert p.router.dispatcher.budget.active == 0
    finally:
        server.kill()


async def test_a_store_that_does_not_answer_in_time_is_a_miss() -> None:
    async def silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)

    connections: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with Redis.from_url(f"redis://127.0.0.1:{port}") as redis:
        store = ResultStore(redis, 0.02)
        store.usable = True
        answers: list[bytes | None] = []
        reading = asyncio.create_task(store.read())
        for count in (1, 2, 3):
            assert store.ask(b"k", answers.append)
            await eventually(lambda: len(answers) == count)  # noqa: B023 - waited for here
        assert answers == [None] * 3
        assert not store.ask(b"k", answers.append)
        store.keep(b"k", b"v", 1)
        assert (store.failures, store.dropped) == (3, 1)
        reading.cancel()
        await asyncio.wait({reading})
    for writer in connections:
        writer.close()
    server.close()


@pytest.mark.parametrize("turns", range(7))
async def test_a_store_ends_whatever_it_is_just_sending(redis_url: str, turns: int) -> None:
    """redis-py loses a cancellation that comes while it sends."""
    async with patience("the store's end"), result_store(redis_url, 0.5) as store:
        await eventually(lambda: store.usable)
        store.keep(b"headrace:ends", b"value", 1000)
        store.ask(b"headrace:ends", lambda _value: None)
        for _ in range(turns):
            await asyncio.sleep(0)
