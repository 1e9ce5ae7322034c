"""Requests that run into their deadline, and requests that kill what runs them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from headrace.v1.dataplane_pb2 import PredictRequest
from headrace.v1.tensor_pb2 import Code

from services.common.frames import Peer
from tests.fixtures.router import FakeWorker, request
from tests.fixtures.router_platform import platform
from tests.fixtures.waiting import eventually


async def test_what_its_caller_saw_as_a_timeout_is_logged_as_one(tmp_path: Path) -> None:
    """The gateway's patience ends just before the router's, and ends with a cancel."""
    async with platform(tmp_path) as p:
        worker = await p.worker("w1")
        worker.behave = lambda *_: None
        loop = asyncio.get_running_loop()
        replies = await asyncio.gather(
            *(p.calls.predict(request(n, version="1"), loop.time() + 1.0) for n in range(10))
        )
        assert {reply.code for reply in replies} == {Code.CODE_DEADLINE_EXCEEDED}
        await eventually(lambda: not p.router.dispatcher.budget.active)
        records = await p.records()
        codes = [code for record in records for code in record.codes]
        assert codes == [Code.CODE_DEADLINE_EXCEEDED] * 10
        (endpoint,) = p.router.dispatcher.endpoints.all()
        assert endpoint.latency.last >= 0.75


async def test_who_leaves_early_is_no_timeout(tmp_path: Path) -> None:
    async with platform(tmp_path) as p:
        worker = await p.worker("w1")
        worker.behave = lambda *_: None
        waiting = asyncio.create_task(p.ask(1, version="1"))
        await eventually(lambda: worker.seen)
        waiting.cancel()
        await eventually(lambda: worker.cancelled == 1)
        assert await p.records() == []


async def test_a_request_that_kills_workers_does_not_kill_them_all(tmp_path: Path) -> None:
    async with platform(tmp_path) as p:
        workers = [await p.worker(f"w{n}") for n in range(4)]
        kills: list[asyncio.Task[None]] = []

        def dies(worker: FakeWorker, _peer: Peer, _item: PredictRequest) -> None:
            kills.append(asyncio.get_running_loop().create_task(worker.kill()))

        for worker in workers:
            worker.behave = dies
        reply = await p.ask(1, version="1")
        assert reply.code == Code.CODE_UNAVAILABLE
        assert sum(len(worker.seen) for worker in workers) == 2
        await asyncio.gather(*kills)
