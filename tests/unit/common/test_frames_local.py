"""What is particular to a connection within one process: when things happen, and who finds whom. The rest it
has in common with sockets (test_frames_calls, tests/contract/test_frames)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest, SealedReply
from headrace.v1.tensor_pb2 import Code, Tensor

from services.common.frames import FrameCalls, FrameServer, Limits, Peer, lost
from services.common.frames.turn import Turn, turn_of
from tests.fixtures.frames import LOOPS, QUICK, TOKEN, Echo, Echoes, calling, run_on, serving_here
from tests.fixtures.waiting import eventually

Loop = Callable[[], asyncio.AbstractEventLoop]


def server(instance: str = "s", limits: Limits = QUICK) -> FrameServer:
    return FrameServer(Echoes(), credential=TOKEN, instance=instance, role="worker", limits=limits)


@pytest.mark.parametrize("loop", LOOPS)
class TestWhen:
    def test_nothing_happens_inside_submit_and_all_of_it_in_one_turn(self, loop: Loop) -> None:
        async def play() -> None:
            echoes = Echoes()
            async with serving_here(echoes) as (_, address), calling(address) as calls:
                got: list[PredictReply] = []
                handled = len(echoes.made[0].frames)
                for _ in range(5):
                    calls.submit(PredictRequest(), None, got.append)
                assert not got
                assert len(echoes.made[0].frames) == handled
                await asyncio.sleep(0)  # the end of this turn, and no other
                assert len(got) == 5
                assert len(echoes.made[0].frames) == handled + 1

        run_on(loop, play())

    def test_of_a_turn_that_brings_many_the_first_do_not_wait_for_the_last(self, loop: Loop) -> None:
        async def play() -> None:
            echoes, limits = Echoes(), replace(QUICK, turn_items=3)
            async with serving_here(echoes) as (_, address), calling(address, limits=limits) as calls:
                got: list[PredictReply] = []
                handled = len(echoes.made[0].frames)
                seen = []
                for _ in range(8):
                    calls.submit(PredictRequest(), None, got.append)
                    seen.append((len(echoes.made[0].frames) - handled, len(got)))
                # Those before it leave, and may be answered, as the fourth comes; never itself.
                assert seen == [(0, 0)] * 3 + [(1, 3)] * 3 + [(2, 6)] * 2
                await asyncio.sleep(0)
                assert [reply.id for reply in got] == [reply.id for reply in sorted(got, key=lambda r: r.id)]
                assert len(got) == 8
                assert len(echoes.made[0].frames) == handled + 3
                # While bytes are read, whoever reads them ends the turn.
                turn = turn_of(asyncio.get_running_loop())
                turn.reading = True
                for _ in range(8):
                    calls.submit(PredictRequest(), None, got.append)
                assert len(echoes.made[0].frames) == handled + 3
                turn.reading = False
                turn.end()
                assert len(got) == 16

        run_on(loop, play())

    def test_bytes_that_are_read_end_their_turn_with_the_replies(self, loop: Loop) -> None:
        async def play() -> None:
            async with serving_here(Echoes()) as (_, address), calling(address) as calls:
                got: list[PredictReply] = []
                turn = turn_of(asyncio.get_running_loop())
                turn.reading = True
                calls.submit(PredictRequest(), None, got.append)
                turn.reading = False
                turn.end()
                assert len(got) == 1

        run_on(loop, play())

    def test_who_asks_again_at_each_reply_keeps_nobody_else_from_the_loop(self, loop: Loop) -> None:
        async def play() -> None:
            async with serving_here(Echoes()) as (_, address), calling(address) as calls:
                replies = 0

                def again(reply: PredictReply) -> None:
                    nonlocal replies
                    replies += 1
                    if replies < 1000:
                        calls.submit(PredictRequest(), None, again)

                calls.submit(PredictRequest(), None, again)
                await asyncio.sleep(0)
                assert 1 < replies < 100
                await eventually(lambda: replies == 1000)

        run_on(loop, play())

    def test_replies_that_bring_replies_lose_none(self, loop: Loop) -> None:
        async def play() -> None:
            echoes = Echoes()
            async with serving_here(echoes) as (_, address), calling(address) as calls:
                held = [
                    asyncio.create_task(calls.predict(PredictRequest(version="hold"), None)) for _ in range(3)
                ]
                await eventually(lambda: len(echoes.made[0].held) == 3)
                calls.submit(PredictRequest(), None, lambda _: echoes.made[0].release())
                replies = await asyncio.gather(*held)
                assert [reply.code for reply in replies] == [Code.CODE_OK] * 3

        run_on(loop, play())


class TestTurn:
    async def test_goes_on_until_nothing_is_left_in_a_bounded_number_of_rounds(self) -> None:
        turn, flushed = Turn(), 0

        def flush() -> None:
            nonlocal flushed
            flushed += 1
            if flushed < 50:
                turn.at_end(flush)

        turn.reading = True
        turn.at_end(flush)
        turn.end()
        first = flushed
        assert 1 < first < 50
        assert not turn.reading
        await eventually(lambda: flushed == 50)

    async def test_survives_a_flush_that_fails(self) -> None:
        turn = Turn()
        flushed: list[str] = []

        def fail() -> None:
            turn.at_end(lambda: flushed.append("after"))
            raise RuntimeError("a flush's fault")

        turn.at_end(fail)
        turn.at_end(lambda: flushed.append("beside"))
        turn.end()
        assert flushed == ["beside", "after"]
        assert not turn.reading


class TestWho:
    async def test_the_two_know_each_other(self) -> None:
        echoes = Echoes()
        limits = Limits(max_in_flight=7, linger_s=0.1)
        async with serving_here(echoes, limits) as (served, address), calling(address) as calls:
            assert calls.peer is not None
            assert (calls.peer.role, calls.peer.instance, calls.peer.max_in_flight) == (
                "worker",
                "server-1",
                7,
            )
            peer = echoes.made[0].peer
            assert (peer.role, peer.instance, peer.remote) == ("router", "client-1", "this process")
            assert served.connections == 1
        assert echoes.made[0].closed == 1
        assert served.connections == 0

    async def test_a_wrong_credential_is_refused_with_the_reason(self) -> None:
        echoes = Echoes()
        async with (
            serving_here(echoes) as (served, address),
            calling(address, connect=False, credential="wrong") as calls,
        ):
            await eventually(lambda: "UNAUTHENTICATED" in calls.last_error)
            assert not calls.connected
            assert echoes.made == []
            assert served.connections == 0

    async def test_why_nothing_comes_of_connecting_is_logged_once(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        def said(words: str) -> list[str]:
            return [line for line in caplog.messages if words in line]

        async with (
            serving_here(Echoes()) as (_, address),
            calling(address, connect=False, credential="wrong"),
        ):
            await eventually(lambda: len(said("refused: wrong credential")) > 12)
        (why,) = said(f"no frame connection to {address}: ")
        assert why.endswith("UNAUTHENTICATED the credential is missing or wrong")

    async def test_too_many_are_refused(self) -> None:
        limits = Limits(max_connections=1, linger_s=0.1)
        async with (
            serving_here(Echoes(), limits) as (_, address),
            calling(address),
            calling(address, connect=False) as second,
        ):
            await eventually(lambda: "too many connections" in second.last_error)
            assert not second.connected

    async def test_a_server_that_has_no_handler_for_it(self) -> None:
        def fail(_: Peer) -> Echo:
            raise RuntimeError("a server's fault")

        failing = FrameServer(fail, credential=TOKEN, instance="s", role="worker", limits=QUICK)
        async with calling(failing.start_local("failing"), connect=False) as calls:
            await eventually(lambda: "internal error" in calls.last_error)
            assert not calls.connected
            assert failing.connections == 0
        await failing.close()

    async def test_nobody_of_that_name(self) -> None:
        async with calling("local:nobody", connect=False) as calls:
            await eventually(lambda: "nobody serves" in calls.last_error)
            assert lost(await calls.predict(PredictRequest(), None))

    async def test_a_name_belongs_to_one_and_is_free_after_it(self) -> None:
        first, second = server(), server()
        first.start_local("a")
        with pytest.raises(OSError, match="local:a is in use"):
            second.start_local("a")
        await second.close()  # which takes nothing away
        async with calling("local:a"):
            pass
        await first.drain(0.1)
        assert second.start_local("a") == "local:a"
        await second.close()

    async def test_a_name_is_one_that_clients_can_have(self) -> None:
        for name in ("", "8010", "with space", "-x"):
            with pytest.raises(ValueError, match=r"none of host:port|is no name"):
                server().start_local(name)

    def test_loops_share_no_names(self) -> None:
        async def play() -> None:
            async with serving_here(Echoes()) as (_, address), calling(address) as calls:
                assert (await calls.predict(PredictRequest(version="x"), None)).version == "x"

        for loop in LOOPS:
            run_on(loop, play())


class TestTooLarge:
    async def test_for_the_server(self) -> None:
        small = Limits(max_message_bytes=100_000, linger_s=0.1)
        async with serving_here(Echoes(), small) as (_, address), calling(address) as calls:
            reply = await calls.predict(PredictRequest(unit="u" * 200_000), None)
            assert lost(reply)
            assert "larger than this server takes" in reply.message

    async def test_for_the_client(self) -> None:
        small = Limits(max_message_bytes=100_000, linger_s=0.1)

        class Grows(Echo):
            def answer(self, item: PredictRequest) -> None:
                self.peer.reply(PredictReply(id=item.id, message="m" * 200_000))

        grown = FrameServer(Grows, credential=TOKEN, instance="s", role="worker", limits=QUICK)
        address = grown.start_local("grows")
        async with calling(address, small) as calls:
            reply = await calls.predict(PredictRequest(), None)
            assert lost(reply)
            assert "too large" in reply.message
        await grown.close()


async def test_replies_that_are_no_messages_end_the_connection() -> None:
    class Nonsense(Echo):
        def answer(self, item: PredictRequest) -> None:
            self.peer.reply_raw(item.id, b"\xff\xff\xff")

    bad = FrameServer(Nonsense, credential=TOKEN, instance="s", role="worker", limits=QUICK)
    async with calling(bad.start_local("bad")) as calls:
        reply = await calls.predict(PredictRequest(), None)
        assert lost(reply)
        assert "no ReplyFrame" in reply.message
    await bad.close()


async def test_replies_come_sealed_or_with_their_bytes_where_that_was_asked() -> None:
    said = PredictRequest(version="v", inputs=[Tensor(name="x", data=b"1234")])
    async with serving_here(Echoes()) as (_, address):

        def asks(*, sealed: bool = False, forwards: bool = False) -> FrameCalls:
            return FrameCalls(
                address, credential=TOKEN, role="gateway", instance="g", limits=QUICK,
                sealed=sealed, forwards=forwards,
            )  # fmt: skip

        sealing, forwarding = asks(sealed=True), asks(forwards=True)
        for calls in (sealing, forwarding):
            calls.start()
            await calls.wait_connected(5)
        sealed: list[SealedReply] = []
        sealing.submit(said, None, sealed.append)
        forwarded: list[tuple[PredictReply, bytes]] = []
        forwarding.submit(said, None, lambda reply, payload: forwarded.append((reply, payload)))
        await eventually(lambda: sealed and forwarded)
        assert Tensor.FromString(sealed[0].outputs[0]) == said.inputs[0]
        reply, payload = forwarded[0]
        assert PredictReply.FromString(payload) == reply
        await sealing.close()
        await forwarding.close()
