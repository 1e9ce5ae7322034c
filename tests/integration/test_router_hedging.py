"""Late requests are sent to a second worker: the first answer counts, and the loser is told."""

from __future__ import annotations

import asyncio
from pathlib import Path

from headrace.v1.control_pb2 import Hedging
from headrace.v1.dataplane_pb2 import PredictRequest
from headrace.v1.tensor_pb2 import Code

from services.common.frames import Peer
from tests.fixtures.router import FakeWorker, config, deploy
from tests.fixtures.router_platform import Platform, platform, refuse
from tests.fixtures.waiting import eventually

LATE = Hedging(min_delay_ms=20)


def hedged(p: Platform) -> bool:
    route = p.router.dispatcher.find("cancer")
    return route is not None and route.hedging is not None


async def both(p: Platform) -> list[FakeWorker]:
    """Two workers; the router hedges, and knows what is usual."""
    await deploy(p.bus, config(revision=2, hedging=LATE))
    await eventually(lambda: hedged(p))
    workers = [await p.worker(name) for name in ("w1", "w2")]
    replies = await asyncio.gather(*(p.ask(n, version="1") for n in range(128)))
    assert {reply.code for reply in replies} == {Code.CODE_OK}
    return workers


def stuck(workers: list[FakeWorker]) -> list[tuple[str, PredictRequest]]:
    """From here on the first worker that is asked keeps the request, and the second one answers."""
    seen: list[tuple[str, PredictRequest]] = []

    def behave(worker: FakeWorker, peer: Peer, item: PredictRequest) -> None:
        seen.append((worker.worker_id, item))
        if len(seen) > 1:
            worker.echo(peer, item)

    for worker in workers:
        worker.behave = behave
    return seen


async def test_the_second_worker_answers_and_the_first_is_told(tmp_path: Path) -> None:
    async with platform(tmp_path) as p:
        workers = await both(p)
        seen = stuck(workers)
        reply = await p.ask(1000, version="1")
        assert reply.code == Code.CODE_OK
        assert reply.version == "1"
        assert {name for name, _ in seen} == {"w1", "w2"}
        assert [item.attempt for _, item in seen] == [0, 1]
        assert seen[0][1].request_id == seen[1][1].request_id
        await eventually(lambda: sum(worker.cancelled for worker in workers) == 1)
        dispatcher = p.router.dispatcher
        assert dispatcher.budget.retrying == 0
        assert dispatcher.budget.active == 0
        assert [endpoint.in_flight for endpoint in dispatcher.endpoints.all()] == [0, 0]
        metrics = await p.metrics()
        for result in ("sent", "won"):
            name = "headrace_router_hedges_total"
            assert f'{name}{{model="cancer",result="{result}",version="1"}} 1.0' in metrics


async def test_a_failed_hedge_leaves_it_to_the_first(tmp_path: Path) -> None:
    async with platform(tmp_path) as p:
        workers = await both(p)
        held: list[tuple[FakeWorker, Peer, PredictRequest]] = []

        def behave(worker: FakeWorker, peer: Peer, item: PredictRequest) -> None:
            if not held:
                held.append((worker, peer, item))
            else:
                refuse(Code.CODE_UNAVAILABLE)(worker, peer, item)
                asyncio.get_running_loop().call_later(0.05, lambda: held[0][0].echo(held[0][1], held[0][2]))

        for worker in workers:
            worker.behave = behave
        assert (await p.ask(1000, version="1")).code == Code.CODE_OK
        assert [endpoint.in_flight for endpoint in p.router.dispatcher.endpoints.all()] == [0, 0]


async def test_a_first_that_dies_leaves_it_to_the_hedge(tmp_path: Path) -> None:
    async with platform(tmp_path) as p:
        workers = await both(p)
        held: list[FakeWorker] = []
        asked_twice = asyncio.Event()

        def behave(worker: FakeWorker, peer: Peer, item: PredictRequest) -> None:
            held.append(worker)
            if len(held) == 2:
                asked_twice.set()
                asyncio.get_running_loop().call_later(0.1, worker.echo, peer, item)

        for worker in workers:
            worker.behave = behave
        asking = asyncio.create_task(p.ask(1000, version="1"))
        await asked_twice.wait()
        await held[0].kill()
        assert (await asking).code == Code.CODE_OK
        assert len(held) == 2
        assert p.router.dispatcher.budget.active == 0


async def test_a_caller_that_leaves_takes_both_back(tmp_path: Path) -> None:
    async with platform(tmp_path) as p:
        workers = await both(p)
        seen: list[PredictRequest] = []
        for worker in workers:
            worker.behave = lambda _worker, _peer, item: seen.append(item)
        asking = asyncio.create_task(p.ask(1000, version="1"))
        await eventually(lambda: len(seen) == 2)
        asking.cancel()
        await eventually(lambda: sum(worker.cancelled for worker in workers) == 2)
        assert [endpoint.in_flight for endpoint in p.router.dispatcher.endpoints.all()] == [0, 0]
        assert p.router.dispatcher.budget.retrying == 0


async def test_the_retry_budget_bounds_hedges(tmp_path: Path) -> None:
    async with platform(tmp_path, retry_share=0.0, retry_floor=2) as p:
        workers = await both(p)
        seen: list[PredictRequest] = []
        for worker in workers:
            worker.behave = lambda _worker, _peer, item: seen.append(item)
        asking = [asyncio.create_task(p.ask(1000 + n, version="1")) for n in range(10)]
        await eventually(lambda: len(seen) == 12)
        await eventually(lambda: p.router.dispatcher.budget.refused >= 8)
        assert len(seen) == 12
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)


async def test_without_the_setting_nobody_is_asked_twice(tmp_path: Path) -> None:
    async with platform(tmp_path) as p:
        workers = [await p.worker("w1"), await p.worker("w2")]
        await asyncio.gather(*(p.ask(n, version="1") for n in range(128)))
        seen = stuck(workers)
        asking = asyncio.create_task(p.ask(1000, version="1"))
        await asyncio.sleep(0.2)
        assert len(seen) == 1
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
