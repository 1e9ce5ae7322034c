"""A router between a gateway and workers, all on real frames: who answers, what happens when workers die."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from headrace.v1.control_pb2 import Balancing, LoadedVersion, WorkerStatus
from headrace.v1.dataplane_pb2 import PredictRequest
from headrace.v1.dataplane_pb2_grpc import DataPlaneStub
from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import Code
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext, TraceFlags

from services.common.bus import MemoryBus, Record
from services.common.clock import SystemClock
from services.common.eventlog import EventLog, publish_left
from services.common.frames import FrameCalls, Limits, Peer
from services.common.telemetry import from_trace_bytes, setup_tracing, trace_bytes
from services.common.topics import PREDICTIONS, WORKERS
from services.router import app as app_module
from services.router import waiting as waiting_module
from tests.fixtures.router import (
    TOKEN,
    AwayBus,
    FakeWorker,
    beat,
    config,
    deploy,
    gateway,
    request,
    routing,
    sole,
    status,
)
from tests.fixtures.router_platform import BOTH, LOADING, READY, Platform, platform, refuse, soon
from tests.fixtures.waiting import PATIENCE_S, eventually, eventually_of


class TestRouting:
    async def test_each_answer_is_its_own_and_the_split_is_sticky(self, tmp_path: Path) -> None:
        async with platform(tmp_path) as p:
            worker = await p.worker("w1")
            first = await asyncio.gather(*(p.ask(n, unit=f"user-{n}") for n in range(1000)))
            again = await asyncio.gather(*(p.ask(n, unit=f"user-{n}") for n in range(1000)))
            assert [reply.outputs[0].data[:4] for reply in first] == [
                n.to_bytes(4, "little") for n in range(1000)
            ]
            assert [reply.version for reply in first] == [reply.version for reply in again]
            split = Counter((reply.version, reply.variant) for reply in first)
            assert split.keys() == {("1", "control"), ("2", "2")}
            assert 60 < split["2", "2"] < 140  # binomial(1000, 0.1): six sigma
            seen = worker.seen[0]
            assert seen.revision == 1
            assert seen.unit_hash
            assert round(seen.propensity, 3) in {0.9, 0.1}

    async def test_versions_and_aliases_by_name(self, tmp_path: Path) -> None:
        async with platform(tmp_path) as p:
            await p.worker("w1")
            assert (await p.ask(version="2")).version == "2"
            assert (await p.ask(version="champion")).version == "1"
            for name in ("old", "7"):
                reply = await p.ask(version=name)
                assert (reply.code, reply.field) == (Code.CODE_NOT_FOUND, "version")
            reply = await p.ask(model="unheard-of")
            assert (reply.code, reply.field) == (Code.CODE_NOT_FOUND, "model")

    async def test_an_older_revision_is_ignored_and_a_removed_model_is_gone(self, tmp_path: Path) -> None:
        async with platform(tmp_path) as p:
            await p.worker("w1")
            await deploy(p.bus, config(revision=5, default_timeout_ms=100))
            await deploy(p.bus, config(revision=4, default_timeout_ms=200))
            await eventually(lambda: p.router.dispatcher.table.find("cancer").revision == 5)  # type: ignore[union-attr]
            await p.bus.publish([Record("control.deployments.v1", b"cancer", None)])
            await eventually(lambda: p.router.dispatcher.table.find("cancer") is None)
            assert (await p.ask()).code == Code.CODE_NOT_FOUND

    @pytest.mark.parametrize("balancing", Balancing.values())
    async def test_every_balancing_uses_every_worker(self, tmp_path: Path, balancing: Balancing) -> None:
        async with platform(tmp_path) as p:
            await deploy(p.bus, sole("digits", balancing=balancing))
            workers = [await p.worker(f"w{n}", {("digits", "1"): READY}) for n in range(3)]
            await eventually(lambda: p.router.dispatcher.table.find("digits"))
            for start in range(0, 300, 30):
                replies = await asyncio.gather(
                    *(p.ask(n, model="digits", unit=f"u{n}") for n in range(start, start + 30))
                )
                assert {reply.code for reply in replies} == {Code.CODE_OK}
            assert all(len(worker.seen) > 20 for worker in workers)


class TestWorkersLeave:
    async def test_killing_one_of_two_under_load_fails_no_request(self, tmp_path: Path) -> None:
        async with platform(tmp_path) as p:
            first, second = await p.worker("w1"), await p.worker("w2")

            holding: Counter[str] = Counter()

            def slowly(worker: FakeWorker, peer: Peer, item: PredictRequest) -> None:
                holding[worker.worker_id] += 1
                asyncio.get_running_loop().call_later(0.005, answer, worker, peer, item)

            def answer(worker: FakeWorker, peer: Peer, item: PredictRequest) -> None:
                holding[worker.worker_id] -= 1
                worker.echo(peer, item)

            first.behave = second.behave = slowly
            codes: Counter[Code] = Counter()

            async def user(number: int) -> None:
                for turn in range(40):
                    reply = await p.ask(number * 1000 + turn)
                    codes[reply.code] += 1
                    assert reply.outputs[0].data[:4] == (number * 1000 + turn).to_bytes(4, "little")

            async with asyncio.TaskGroup() as users:
                for number in range(64):
                    users.create_task(user(number))
                await asyncio.sleep(0.05)
                # On a busy machine it may have just answered all it had; then its death would go unnoticed.
                await eventually(lambda: holding["w1"])
                await first.kill()
            assert codes == {Code.CODE_OK: 64 * 40}
            assert any(item.attempt == 1 for item in second.seen)
            stats = p.router.dispatcher.stats.versions["cancer", "1"]
            assert stats.retries["lost"] > 0
            assert p.router.dispatcher.budget.active == 0

    async def test_a_frozen_worker_is_given_up_and_its_requests_are_answered_elsewhere(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        quick = Limits(ping_after_s=0.2, ping_timeout_s=0.5, backoff_first_s=0.01)
        monkeypatch.setattr(app_module, "FrameCalls", partial(FrameCalls, limits=quick))
        async with platform(tmp_path) as p:
            frozen, second = await p.worker("w1"), await p.worker("w2")
            frozen.freeze()
            replies = await asyncio.gather(*(p.ask(n) for n in range(100)))
            assert {reply.code for reply in replies} == {Code.CODE_OK}
            stats = p.router.dispatcher.stats.versions["cancer", "1"]
            assert stats.retries["lost"] > 0
            assert len(second.seen) >= 50
            # It is there again as soon as it says something.
            frozen.seen.clear()
            await eventually(lambda: len(p.router.dispatcher.endpoints.group(("cancer", "1")).members) == 2)
            await eventually_of(p.ask, lambda _: frozen.seen)

    async def test_a_draining_worker_gets_nothing_new_and_answers_what_it_has(self, tmp_path: Path) -> None:
        async with platform(tmp_path) as p:
            first = await p.worker("w1")
            held: list[tuple[Peer, PredictRequest]] = []
            first.behave = lambda _, peer, item: held.append((peer, item))
            waiting = asyncio.create_task(p.ask(1))
            await eventually(lambda: held)
            second = await p.worker("w2")
            drain = asyncio.create_task(first.server.drain(5))
            await eventually(lambda: len(p.router.dispatcher.endpoints.group(("cancer", "1")).members) == 1)
            assert (await p.ask(2)).code == Code.CODE_OK
            assert len(second.seen) == 1
            first.echo(*held[0])
            assert (await waiting).code == Code.CODE_OK
            await drain

    async def test_a_worker_that_says_it_drains_or_is_gone(self, tmp_path: Path) -> None:
        async with platform(tmp_path) as p:
            worker = await p.worker("w1")
            leaving = status("w1", worker.address, BOTH, state=WorkerStatus.STATE_DRAINING, sequence=2)
            await beat(p.bus, leaving)
            await eventually(lambda: not p.router.dispatcher.endpoints.group(("cancer", "1")).members)
            assert (await p.ask()).code == Code.CODE_UNAVAILABLE
            await beat(p.bus, status("w1", worker.address, {}, state=WorkerStatus.STATE_GONE, sequence=3))
            await eventually(lambda: not p.router.dispatcher.endpoints.all())

    async def test_the_only_worker_comes_back_within_the_wait(self, tmp_path: Path) -> None:
        async with platform(tmp_path) as p:
            worker = await p.worker("w1")
            held: list[PredictRequest] = []
            worker.behave = lambda _, __, item: held.append(item)
            waiting = asyncio.create_task(p.ask(5))
            await eventually(lambda: held)
            await worker.kill()
            again = FakeWorker("w1")
            await again.start(int(worker.address.rpartition(":")[2]))
            reply = await waiting
            assert reply.code == Code.CODE_OK
            assert again.seen[0].attempt == 1
            await again.server.close()


def _hold(held: list[tuple[Peer, PredictRequest]], _: FakeWorker, peer: Peer, item: PredictRequest) -> None:
    held.append((peer, item))


class TestRetries:
    async def test_a_full_worker_is_not_the_end(self, tmp_path: Path) -> None:
        async with platform(tmp_path) as p:
            full, free = await p.worker("full"), await p.worker("free")
            full.behave = refuse(Code.CODE_RESOURCE_EXHAUSTED)
            replies = [await p.ask(n) for n in range(30)]
            assert {reply.code for reply in replies} == {Code.CODE_OK}
            assert full.seen
            assert {item.attempt for item in free.seen} == {0, 1}

    async def test_the_budget_bounds_retries_in_an_overload(self, tmp_path: Path) -> None:
        async with platform(tmp_path) as p:
            workers = [await p.worker(f"w{n}") for n in range(3)]
            for worker in workers:
                worker.behave = refuse(Code.CODE_RESOURCE_EXHAUSTED)
            replies = await asyncio.gather(*(p.ask(n) for n in range(200)))
            assert {reply.code for reply in replies} == {Code.CODE_RESOURCE_EXHAUSTED}
            seen = sum(len(worker.seen) for worker in workers)
            assert 200 < seen <= 200 + 2 * 40  # 20% of 200, each at most twice more
            assert p.router.dispatcher.budget.retrying == 0

    async def test_a_new_process_that_has_nothing_yet_refuses_nobody(self, tmp_path: Path) -> None:
        """What was heard of is what the process before it had."""
        async with platform(tmp_path) as p:
            new, old = await p.worker("new"), await p.worker("old")
            held: dict[FakeWorker, list[tuple[Peer, PredictRequest]]] = {new: [], old: []}
            for worker, its in held.items():
                worker.behave = partial(_hold, its)
            asked = [asyncio.create_task(p.ask(n)) for n in range(60)]
            await eventually(lambda: len(held[new]) + len(held[old]) == 60)
            old.behave = None
            for peer, item in held[new]:  # a burst that comes back at once
                refuse(Code.CODE_UNAVAILABLE)(new, peer, item)
            for peer, item in held[old]:
                old.echo(peer, item)
            assert {reply.code for reply in await asyncio.gather(*asked)} == {Code.CODE_OK}
            assert len(held[new]) > 12, "no more than the budget allows of 60"
            assert p.router.dispatcher.budget.refused == 0

    async def test_the_only_worker_is_waited_for_where_it_has_nothing_yet(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(waiting_module, "_GRACE_S", PATIENCE_S)
        async with platform(tmp_path, endpoint_wait_s=PATIENCE_S) as p:
            only = await p.worker("w1")
            only.behave = refuse(Code.CODE_UNAVAILABLE)
            asked = asyncio.create_task(p.ask())
            await eventually(lambda: len(p.router.dispatcher.waiting))
            only.behave = None
            await beat(p.bus, status("w1", only.address, BOTH, incarnation="b"))
            assert (await asked).code == Code.CODE_OK

    async def test_errors_of_the_request_are_not_retried(self, tmp_path: Path) -> None:
        async with platform(tmp_path) as p:
            workers = [await p.worker(f"w{n}") for n in range(2)]
            for worker in workers:
                worker.behave = refuse(Code.CODE_INVALID_ARGUMENT)
            assert (await p.ask()).code == Code.CODE_INVALID_ARGUMENT
            assert sum(len(worker.seen) for worker in workers) == 1


class TestOutliers:
    async def test_a_worker_that_fails_is_left_out_until_a_probe_succeeds(self, tmp_path: Path) -> None:
        async with platform(tmp_path, outlier_ejection_s=0.2) as p:
            sick, well = await p.worker("sick"), await p.worker("well")
            sick.behave = refuse(Code.CODE_INTERNAL)
            group = p.router.dispatcher.endpoints.group(("cancer", "1"))
            while len(group.members) == 2:
                await asyncio.gather(*(p.ask(n, version="1") for n in range(8)))
            assert [endpoint.worker_id for endpoint in group.members] == ["well"]
            seen = len(sick.seen)
            assert {(await p.ask(n, version="1")).code for n in range(20)} == {Code.CODE_OK}
            assert len(sick.seen) == seen
            assert 'breaker_open{model="cancer",version="1",worker="sick"} 1.0' in await p.metrics()
            sick.behave = None
            await eventually(lambda: group.outliers.due)
            assert (await p.ask(version="1")).code == Code.CODE_OK
            assert len(sick.seen) == seen + 1
            assert len(group.members) == 2
            assert well.seen

    async def test_the_only_worker_is_never_left_out(self, tmp_path: Path) -> None:
        async with platform(tmp_path) as p:
            only = await p.worker("w1")
            only.behave = refuse(Code.CODE_INTERNAL)
            codes = [(await p.ask(n, version="1")).code for n in range(12)]
            assert set(codes) == {Code.CODE_INTERNAL}
            assert len(only.seen) == 12
            assert p.router.dispatcher.endpoints.group(("cancer", "1")).broken
            assert not p.router.dispatcher.endpoints.group(("cancer", "2")).broken


@asynccontextmanager
async def with_fallback(directory: Path, **settings: object) -> AsyncIterator[Platform]:
    """Version 2 has all the traffic, version 1 answers for it."""
    async with platform(directory, **settings) as p:
        made = sole(version="2")
        made.versions.add(version="1", variant="stable", artifact_digest="sha256:1")
        made.fallback.version = "1"
        await p.serve(made)
        yield p


def only_two(then: Callable[[FakeWorker, Peer, PredictRequest], None]):  # type: ignore[no-untyped-def]
    def behave(worker: FakeWorker, peer: Peer, item: PredictRequest) -> None:
        (then if item.version == "2" else FakeWorker.echo)(worker, peer, item)

    return behave


class TestFallback:
    @pytest.mark.parametrize("code", [Code.CODE_UNAVAILABLE, Code.CODE_INTERNAL, Code.CODE_DEADLINE_EXCEEDED])
    async def test_answers_for_a_version_that_fails(self, tmp_path: Path, code: Code) -> None:
        async with with_fallback(tmp_path) as p:
            worker = await p.worker("w1")
            worker.behave = only_two(refuse(code))
            reply = await p.ask(3)
            # By another version, for the variant that the unit was given.
            assert (reply.code, reply.version, reply.variant) == (Code.CODE_OK, "1", "2")
            assert reply.fallback
            assert reply.outputs[0].data[:4] == b"\3\0\0\0"
            assert [(item.version, item.attempt) for item in worker.seen] == [("2", 0), ("1", 1)]
            assert (worker.seen[1].variant, worker.seen[1].propensity) == ("2", 1.0)
            name = Code.Name(code).removeprefix("CODE_").lower()
            line = f'headrace_router_fallbacks_total{{model="cancer",reason="{name}",version="2"}} 1.0'
            assert line in await p.metrics()

    async def test_is_not_for_the_requests_own_errors_nor_for_versions_asked_for(
        self, tmp_path: Path
    ) -> None:
        async with with_fallback(tmp_path) as p:
            worker = await p.worker("w1")
            worker.behave = only_two(refuse(Code.CODE_INVALID_ARGUMENT))
            reply = await p.ask()
            assert (reply.code, reply.fallback) == (Code.CODE_INVALID_ARGUMENT, False)
            worker.behave = only_two(refuse(Code.CODE_INTERNAL))
            reply = await p.ask(version="2")
            assert (reply.code, reply.version, reply.fallback) == (Code.CODE_INTERNAL, "2", False)

    async def test_answers_where_no_worker_has_the_version(self, tmp_path: Path) -> None:
        async with with_fallback(tmp_path) as p:
            worker = await p.worker("w1", {("cancer", "1"): READY, ("cancer", "2"): LOADING})
            reply = await p.ask()
            assert (reply.code, reply.version, reply.fallback) == (Code.CODE_OK, "1", True)
            assert worker.seen[0].attempt == 0
            await beat(p.bus, status("w1", worker.address, BOTH, sequence=2))
            await eventually(lambda: p.router.dispatcher.endpoints.group(("cancer", "2")).members)
            assert not (await p.ask()).fallback

    async def test_what_both_fail_is_answered_once_with_the_fallbacks_error(self, tmp_path: Path) -> None:
        async with with_fallback(tmp_path) as p:
            worker = await p.worker("w1")
            worker.behave = refuse(Code.CODE_INTERNAL)
            reply = await p.ask()
            assert (reply.code, reply.version, reply.fallback) == (Code.CODE_INTERNAL, "1", True)
            assert [item.version for item in worker.seen] == ["2", "1"]
            assert p.router.dispatcher.budget.active == 0

    async def test_a_broken_version_is_spared_and_found_well_again(self, tmp_path: Path) -> None:
        async with with_fallback(tmp_path, outlier_ejection_s=0.2) as p:
            worker = await p.worker("w1")
            worker.behave = only_two(refuse(Code.CODE_INTERNAL))
            for n in range(5):
                assert (await p.ask(n)).fallback
            group = p.router.dispatcher.endpoints.group(("cancer", "2"))
            assert group.broken
            worker.seen.clear()
            replies = await asyncio.gather(*(p.ask(n) for n in range(20)))
            assert all(reply.fallback and reply.code == Code.CODE_OK for reply in replies)
            assert {item.version for item in worker.seen} == {"1"}
            worker.behave = None
            await eventually(lambda: group.outliers.due)
            assert not (await p.ask()).fallback
            assert not group.broken

    async def test_a_lost_worker_costs_no_request_of_a_version_with_a_fallback(self, tmp_path: Path) -> None:
        async with with_fallback(tmp_path) as p:
            new = await p.worker("new", {("cancer", "2"): READY})
            old = await p.worker("old", {("cancer", "1"): READY})
            new.behave = lambda *_: None
            waiting = [asyncio.create_task(p.ask(n)) for n in range(30)]
            await eventually(lambda: len(new.seen) == 30)
            await new.kill()
            replies = await asyncio.gather(*waiting)
            assert {(reply.code, reply.version, reply.fallback) for reply in replies} == {
                (Code.CODE_OK, "1", True)
            }
            assert len(old.seen) == 30


class TestDeadlinesAndCancels:
    async def test_the_rest_of_the_deadline_travels_and_ends_here(self, tmp_path: Path) -> None:
        async with platform(tmp_path) as p:
            worker = await p.worker("w1")
            worker.behave = lambda *_: None
            loop = asyncio.get_running_loop()
            reply = await p.calls.predict(request(), loop.time() + 1.0)
            assert reply.code == Code.CODE_DEADLINE_EXCEEDED
            assert 0 < worker.seen[0].timeout_us <= 1_000_000
            await eventually(lambda: not p.router.dispatcher.budget.active)

    async def test_the_deployments_timeout_holds_where_the_caller_has_none(self, tmp_path: Path) -> None:
        async with platform(tmp_path) as p:
            await deploy(p.bus, config(revision=2, default_timeout_ms=100))
            await eventually(lambda: p.router.dispatcher.table.find("cancer").revision == 2)  # type: ignore[union-attr]
            worker = await p.worker("w1")
            worker.behave = lambda *_: None
            assert (await p.calls.predict(request(), None)).code == Code.CODE_DEADLINE_EXCEEDED

    async def test_a_cancel_reaches_the_worker(self, tmp_path: Path) -> None:
        async with platform(tmp_path) as p:
            worker = await p.worker("w1")
            worker.behave = lambda *_: None
            waiting = [asyncio.create_task(p.ask(n)) for n in range(3)]
            await eventually(lambda: len(worker.seen) == 3)
            waiting[0].cancel()
            await eventually(lambda: worker.cancelled == 1)
            await p.calls.close()
            await eventually(lambda: worker.cancelled == 3)
            assert p.router.dispatcher.budget.active == 0
            assert [e.in_flight for e in p.router.dispatcher.endpoints.all()] == [0]
            await asyncio.gather(*waiting, return_exceptions=True)


class TestNoEndpoint:
    async def test_unavailable_at_once_where_nobody_is_coming(self, tmp_path: Path) -> None:
        async with platform(tmp_path, endpoint_wait_s=60) as p:
            reply = await p.ask()
            assert reply.code == Code.CODE_UNAVAILABLE
            assert reply.retry_after_ms
            assert "cancer version" in reply.message

    async def test_waits_for_a_version_being_loaded(self, tmp_path: Path) -> None:
        async with platform(tmp_path) as p:
            worker = await p.worker("w1", {("cancer", "1"): LOADING, ("cancer", "2"): LOADING})
            waiting = asyncio.create_task(p.ask())
            await eventually(lambda: len(p.router.dispatcher.waiting) == 1)
            await beat(p.bus, status("w1", worker.address, BOTH, sequence=2))
            assert (await waiting).code == Code.CODE_OK

    async def test_not_for_long_and_not_for_a_failed_load(self, tmp_path: Path) -> None:
        async with platform(tmp_path, endpoint_wait_s=0.5) as p:
            loading = {("cancer", "1"): LOADING, ("cancer", "2"): LOADING}
            worker = await p.worker("w1", loading)
            reply = await p.ask()
            assert reply.code == Code.CODE_UNAVAILABLE
            assert reply.message.endswith("it is still being loaded")
            waiting = asyncio.create_task(p.ask())
            await eventually(lambda: len(p.router.dispatcher.waiting) == 1)
            failed = dict.fromkeys(loading, LoadedVersion.STATE_FAILED)
            await beat(p.bus, status("w1", worker.address, failed, sequence=2))
            reply = await waiting
            assert reply.code == Code.CODE_UNAVAILABLE
            assert "it cannot be loaded" in reply.message
            assert len(p.router.dispatcher.waiting) == 0

    async def test_refusals_are_logged_one_record_for_a_frame(self, tmp_path: Path) -> None:
        async with platform(tmp_path) as p:
            await asyncio.gather(*(p.ask(n, version="1", unit=f"u{n}") for n in range(50)))
            await p.ask(model="unheard-of")
            records = await p.records()
            assert [(r.model, r.version, len(r.codes)) for r in records] == [("cancer", "1", 50)]
            (record,) = records
            assert record.writer == PredictionBatch.WRITER_ROUTER
            assert record.source == "router-0"
            assert set(record.codes) == {Code.CODE_UNAVAILABLE}
            ids = {record.request_ids[at : at + 16] for at in range(0, 50 * 16, 16)}
            assert ids == {n.to_bytes(16, "big") for n in range(50)}
            assert list(record.variant_names) == ["control"]
            assert len(set(record.unit_hashes)) == 50
            assert list(record.rows) == [1] * 50


class TestRestart:
    async def test_serves_from_the_snapshot_while_kafka_is_away(self, tmp_path: Path) -> None:
        async with platform(tmp_path) as p:
            worker = await p.worker("w1")
            assert (await p.ask()).code == Code.CODE_OK
            await eventually((tmp_path / "router-router-0" / "routing.json").exists)
            away = AwayBus()
            async with routing(tmp_path / "other", away, table_wait_s=0.1) as never:
                await asyncio.sleep(0.3)
                assert not never.health.ready
            await p._stack.aclose()
            await worker.start(int(worker.address.rpartition(":")[2]))
            async with routing(tmp_path, away, table_wait_s=0.1) as router, gateway(router) as calls:
                await eventually(lambda: router.health.ready)
                reply = await calls.predict(request(7), soon())
                assert reply.code == Code.CODE_OK
            await worker.server.close()

    async def test_publishes_what_the_router_it_takes_turns_with_has_left(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(publish_left, "__kwdefaults__", {"join": None, "every_s": 0.01})
        away, clock = MemoryBus(), SystemClock()
        away.away = True
        old = EventLog(tmp_path / "router-router-0" / "spool", away, PREDICTIONS.name, clock=clock)
        await old.start()
        old.append(b"cancer/1", PredictionBatch(source="router-0").SerializeToString())
        await old.close(clock.monotonic())
        async with platform(tmp_path, router_id="router-0b", predecessor_id="router-0") as p:
            records = await eventually_of(p.records)
            assert [record.source for record in records] == ["router-0"]

    async def test_drains_what_is_in_flight_when_it_stops(self, tmp_path: Path) -> None:
        bus = MemoryBus()
        await deploy(bus, config())
        async with AsyncExitStack() as stack:
            router = await stack.enter_async_context(routing(tmp_path, bus))
            worker = FakeWorker("w1")
            await worker.start()
            await beat(bus, status("w1", worker.address, BOTH))
            await eventually(lambda: router.dispatcher.endpoints.group(("cancer", "1")).members)
            held: list[tuple[Peer, PredictRequest]] = []
            worker.behave = lambda _, peer, item: held.append((peer, item))
            async with gateway(router) as calls:
                waiting = asyncio.create_task(calls.predict(request(), soon()))
                await eventually(lambda: held)
                stopping = asyncio.create_task(stack.aclose())
                await eventually(lambda: calls.draining)
                worker.echo(*held[0])
                assert (await waiting).code == Code.CODE_OK
                await stopping
            await worker.server.close()


class TestUnary:
    async def test_predict_health_and_credential(self, tmp_path: Path) -> None:
        async with platform(tmp_path) as p:
            await p.worker("w1")
            address = f"127.0.0.1:{p.router.grpc_port}"
            async with grpc.aio.insecure_channel(address) as channel:
                stub = DataPlaneStub(channel)  # type: ignore[no-untyped-call]  # generated
                reply = await stub.Predict(
                    request(3), metadata=(("authorization", f"Bearer {TOKEN}"),), timeout=PATIENCE_S
                )
                assert reply.outputs[0].data[:4] == b"\3\0\0\0"
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.Predict(request(3), timeout=PATIENCE_S)
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
                check = await health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(), timeout=PATIENCE_S
                )
                assert check.status == health_pb2.HealthCheckResponse.SERVING


async def test_workers_that_left_without_a_word_are_forgotten(tmp_path: Path) -> None:
    async with platform(tmp_path, worker_expiry_s=0.1) as p:
        silent = status("ghost", "127.0.0.1:1", BOTH)
        silent.interval_ms = 10

        async def known() -> bool:  # again and again: on a busy machine it is forgotten before anybody looks
            await beat(p.bus, silent)
            return bool(p.router.dispatcher.endpoints.all())

        await eventually(known)
        await eventually(lambda: not p.router.dispatcher.endpoints.all())
        old = status("fossil", "127.0.0.1:1", BOTH, sent_at_us=1)
        await p.bus.publish([Record(WORKERS.name, b"fossil", old.SerializeToString())])
        await asyncio.sleep(0.1)
        assert p.router.dispatcher.endpoints.all() == []


async def test_sampled_requests_leave_a_span_and_the_worker_is_its_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(
        app_module, "setup_tracing", lambda name, _endpoint, ratio: setup_tracing(name, None, ratio, exporter)
    )
    async with platform(tmp_path) as p:
        worker = await p.worker("w1")
        caller = SpanContext(0xABC, 0xDEF, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
        sampled = request(1)
        sampled.trace = trace_bytes(caller)
        await p.calls.predict(sampled, soon())
        await p.ask(2)
        child = from_trace_bytes(worker.seen[0].trace)
        assert worker.seen[1].trace == b""
    spans = exporter.get_finished_spans()
    assert [span.name for span in spans] == ["route cancer"]
    assert child is not None
    assert spans[0].context is not None
    assert child.span_id == spans[0].context.span_id
    assert spans[0].parent is not None
    assert spans[0].parent.span_id == caller.span_id
    assert spans[0].attributes is not None
    assert spans[0].attributes["headrace.code"] == "CODE_OK"


async def test_metrics_tell_what_happened(tmp_path: Path) -> None:
    async with platform(tmp_path) as p:
        await p.worker("w1")
        await asyncio.gather(*(p.ask(n, version="1") for n in range(5)))
        await p.ask(model="a-name-that-must-not-become-a-label")
        text = await p.metrics()
        assert 'headrace_router_requests_total{code="OK",model="cancer",version="1"} 5.0' in text
        assert 'headrace_router_requests_total{code="NOT_FOUND",model="",version=""} 1.0' in text
        assert 'headrace_router_latency_seconds_count{model="cancer",version="1"} 5.0' in text
        assert 'headrace_router_worker_up{worker="w1"} 1.0' in text
        assert 'headrace_router_endpoints{model="cancer",version="2"} 1.0' in text
        assert "must-not-become" not in text
