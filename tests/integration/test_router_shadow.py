"""Shadows: copies after the answer, and comparisons on the topic."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from headrace.v1.dataplane_pb2 import Origin, PredictReply, PredictRequest, Priority
from headrace.v1.events_pb2 import PredictionBatch, ShadowComparison, ShadowVerdict
from headrace.v1.tensor_pb2 import Code

from services.common.bus import Record
from services.common.frames import Peer
from services.common.topics import SHADOWS
from tests.fixtures.router import FakeWorker, request, sole
from tests.fixtures.router_platform import BOTH, READY, Platform, platform, refuse
from tests.fixtures.waiting import eventually


@asynccontextmanager
async def shadowing(directory: Path, share: int = 10_000, **settings: object) -> AsyncIterator[Platform]:
    """Version 1 answers everybody, version 2 is its shadow."""
    async with platform(directory, **settings) as p:
        made = sole()
        made.versions.add(version="2", artifact_digest="sha256:2")
        made.shadow.version, made.shadow.share = "2", share
        await p.serve(made)
        yield p


async def comparisons(p: Platform, requests: int) -> list[ShadowComparison]:
    """The records that hold `requests` comparisons."""
    got: list[ShadowComparison] = []

    async def take(records: list[Record] | tuple[Record, ...]) -> None:
        got.extend(ShadowComparison.FromString(record.value or b"") for record in records)

    async with p.bus.consume(SHADOWS, "test", take):  # type: ignore[arg-type]
        await eventually(lambda: sum(len(record.codes) for record in got) >= requests)
    return got


def under_way(p: Platform) -> int:
    assert p.router.dispatcher.mirror is not None
    return p.router.dispatcher.mirror.under_way


async def test_answers_come_from_production_and_are_compared(tmp_path: Path) -> None:
    async with shadowing(tmp_path) as p:
        worker = await p.worker("w1")

        def behave(worker: FakeWorker, peer: Peer, item: PredictRequest) -> None:
            if item.version == "2" and int.from_bytes(item.request_id, "big") % 5 == 0:
                item.inputs[0].data = b"\x00\x00\x80\x3f" * 30
            worker.echo(peer, item)

        worker.behave = behave
        replies = await asyncio.gather(*(p.ask(n, unit=f"u{n}") for n in range(1, 21)))
        assert {(reply.code, reply.version) for reply in replies} == {(Code.CODE_OK, "1")}
        records = await comparisons(p, 20)
        assert sum(len(record.codes) for record in records) == 20
        found = {
            record.request_ids[16 * i : 16 * i + 16]: verdict
            for record in records
            for i, verdict in enumerate(record.verdicts)
        }
        different = ShadowVerdict.SHADOW_VERDICT_DIFFERENT
        assert {int.from_bytes(key, "big") for key, said in found.items() if said == different} == {
            5, 10, 15, 20,
        }  # fmt: skip
        copies = [item for item in worker.seen if item.origin == Origin.ORIGIN_SHADOW]
        assert len(copies) == 20
        assert {(c.version, c.priority) for c in copies} == {("2", Priority.PRIORITY_LOW)}
        assert all(item.version == "1" for item in worker.seen if not item.origin)
        await eventually(lambda: not under_way(p))
        assert 'shadows_total{model="cancer",result="different",version="2"} 4.0' in await p.metrics()
        assert [e.in_flight for e in p.router.dispatcher.endpoints.all()] == [0]


async def test_only_the_share_and_never_versions_asked_for(tmp_path: Path) -> None:
    async with shadowing(tmp_path, share=10) as p:
        worker = await p.worker("w1")
        await asyncio.gather(*(p.ask(n) for n in range(0, 40, 2)))
        await asyncio.gather(*(p.ask(n, version="1") for n in range(10)))
        await comparisons(p, 5)
        copies = [item for item in worker.seen if item.origin == Origin.ORIGIN_SHADOW]
        assert [int.from_bytes(c.request_id, "big") for c in copies] == [0, 2, 4, 6, 8]


async def test_a_shadow_that_fails_or_hangs_costs_nobody_anything(tmp_path: Path) -> None:
    async with shadowing(tmp_path, shadow_limit=8) as p:
        held: list[tuple[Peer, PredictRequest]] = []
        good = await p.worker("good", {("cancer", "1"): READY})
        bad = await p.worker("bad", {("cancer", "2"): READY})
        bad.behave = lambda _, peer, item: held.append((peer, item))
        replies = await asyncio.gather(*(p.ask(n) for n in range(40)))
        assert {(reply.code, reply.version) for reply in replies} == {(Code.CODE_OK, "1")}
        await eventually(lambda: len(held) == 8)
        assert under_way(p) == 8
        assert 'shadows_total{model="cancer",result="dropped",version="2"} 32.0' in await p.metrics()
        for peer, item in held:
            peer.reply(PredictReply(id=item.id, code=Code.CODE_INTERNAL, version="2"))
        records = await comparisons(p, 8)
        assert {v for record in records for v in record.verdicts} == {ShadowVerdict.SHADOW_VERDICT_FAILED}
        await eventually(lambda: not under_way(p))
        held.clear()
        waiting = await p.ask(1)
        await eventually(lambda: held)
        await bad.kill()
        await eventually(lambda: not under_way(p))
        assert waiting.code == Code.CODE_OK
        assert (await p.ask(2)).code == Code.CODE_OK
        await eventually(lambda: not under_way(p))
        assert len(good.seen) == 42


async def test_copies_are_bounded_in_bytes(tmp_path: Path) -> None:
    async with shadowing(tmp_path) as p:
        mirror = p.router.dispatcher.mirror
        assert mirror is not None
        mirror._limit_bytes = 3000  # each copy has about 600, of itself and two answers
        held: list[tuple[Peer, PredictRequest]] = []
        await p.worker("good", {("cancer", "1"): READY})
        shadow = await p.worker("shadow", {("cancer", "2"): READY})
        shadow.behave = lambda _, peer, item: held.append((peer, item))
        await asyncio.gather(*(p.ask(n) for n in range(40)))
        await eventually(lambda: under_way(p) == len(held))
        assert 1 <= len(held) <= 10
        assert 1500 < mirror.nbytes <= 3000
        for peer, item in held:
            shadow.echo(peer, item)
        await eventually(lambda: not under_way(p))
        assert mirror.nbytes == 0


async def test_errors_of_production_are_compared_and_refusals_are_not(tmp_path: Path) -> None:
    async with shadowing(tmp_path) as p:
        worker = await p.worker("w1", BOTH)
        failing = refuse(Code.CODE_INTERNAL)

        def behave(worker: FakeWorker, peer: Peer, item: PredictRequest) -> None:
            if item.version == "1":
                failing(worker, peer, item)
            else:
                worker.echo(peer, item)

        worker.behave = behave
        assert (await p.ask(1)).code == Code.CODE_INTERNAL
        (logged,) = [one for one in await p.records() if one.writer == PredictionBatch.WRITER_ROUTER]
        assert (logged.version, list(logged.origins)) == ("1", [Origin.ORIGIN_UNSPECIFIED])
        (record,) = await comparisons(p, 1)
        assert (list(record.codes), list(record.shadow_codes)) == ([Code.CODE_INTERNAL], [Code.CODE_OK])
        failing = refuse(Code.CODE_INVALID_ARGUMENT)
        seen = len(worker.seen)
        assert (await p.ask(2)).code == Code.CODE_INVALID_ARGUMENT
        assert (await p.calls.predict(request(3), None)).code == Code.CODE_INVALID_ARGUMENT
        assert len(worker.seen) == seen + 2


async def test_without_kafka_comparisons_are_lost_and_counted(tmp_path: Path) -> None:
    async with shadowing(tmp_path) as p:
        await p.worker("w1")
        p.bus.away = True
        assert (await p.ask(1)).code == Code.CODE_OK
        await eventually(lambda: p.router.dispatcher.stats.unpublished_shadows == 1)
        assert under_way(p) == 0
        p.bus.away = False
        assert (await p.ask(2)).code == Code.CODE_OK
        assert len(await comparisons(p, 1)) == 1
