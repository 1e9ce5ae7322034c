"""FrameCalls and FrameServer as their users see them: one reply each, deadlines, cancels, draining."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Callable

import pytest
from headrace.v1.dataplane_pb2 import Hello, PredictReply, PredictRequest, ReplyFrame
from headrace.v1.tensor_pb2 import Code, Tensor
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from services.common.errors import Unavailable
from services.common.frames import FrameCalls, FrameServer, Limits, lost
from services.common.frames.wire import frame, settings
from tests.fixtures.frames import (
    LOOPS,
    PREFACE,
    QUICK,
    TOKEN,
    Echoes,
    Serving,
    calling,
    message,
    run_on,
    serving,
    serving_here,
)
from tests.fixtures.waiting import PATIENCE_S, eventually

Loop = Callable[[], asyncio.AbstractEventLoop]


def now() -> float:
    return asyncio.get_running_loop().time()


@pytest.fixture(params=[serving, serving_here], ids=["over-a-socket", "in-one-process"])
def serves(request: pytest.FixtureRequest) -> Serving:
    """How the two reach each other: what they may expect of each other is the same."""
    way: Serving = request.param
    return way


class TestCoalescing:
    async def test_one_loop_turn_is_one_frame_each_way(self, serves: Serving) -> None:
        echoes = Echoes()
        async with serves(echoes) as (_, address), calling(address) as calls:
            await asyncio.gather(*(calls.predict(PredictRequest(version=str(n)), None) for n in range(100)))
            assert [len(frame.items) for frame in echoes.made[0].frames if frame.items] == [100]

    async def test_a_lone_request_does_not_wait_for_others(self, serves: Serving) -> None:
        echoes = Echoes()
        async with serves(echoes) as (_, address), calling(address) as calls:
            for _ in range(3):
                await calls.predict(PredictRequest(), None)
            assert [len(frame.items) for frame in echoes.made[0].frames if frame.items] == [1, 1, 1]

    async def test_large_items_leave_in_frames_of_about_the_target(self, serves: Serving) -> None:
        echoes = Echoes()
        limits = Limits(frame_target_bytes=100_000, linger_s=0.1)
        async with serves(echoes, limits) as (_, address), calling(address, limits) as calls:
            item = PredictRequest(inputs=[Tensor(data=b"x" * 25_000)])
            replies = await asyncio.gather(*(calls.predict(item, now() + 20) for _ in range(10)))
            assert all(reply.code == Code.CODE_OK for reply in replies)
            assert [len(frame.items) for frame in echoes.made[0].frames if frame.items] == [4, 4, 2]

    async def test_items_that_are_not_copied_leave_alone(self, serves: Serving) -> None:
        echoes = Echoes()
        async with serves(echoes) as (_, address), calling(address) as calls:
            data = bytes(range(256)) * 400
            small = PredictRequest(model="small")
            large = PredictRequest(inputs=[Tensor(data=data)])
            replies = await asyncio.gather(
                *(calls.predict(item, now() + 20) for item in (large, small, large, small))
            )
            assert all(reply.code == Code.CODE_OK for reply in replies)
            frames = [frame for frame in echoes.made[0].frames if frame.items]
            assert sorted(len(frame.items) for frame in frames) == [1, 1, 2]
            assert [item.inputs[0].data for f in frames for item in f.items if item.inputs] == [data] * 2


class TestRefusedHere:
    async def test_not_connected(self) -> None:
        async with calling("127.0.0.1:1", connect=False) as calls:
            got: list[PredictReply] = []
            local_id = calls.submit(PredictRequest(), None, got.append)
            assert got == []  # never before submit returned
            await eventually(lambda: got)
            assert lost(got[0])
            assert got[0].id == local_id
            with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1 cannot be reached"):
                await calls.wait_connected(0.05)

    @pytest.mark.parametrize("new_loop", LOOPS)
    @pytest.mark.parametrize("host", ["worker..svc", f"{'w' * 64}.svc"])
    def test_a_host_of_no_possible_name_is_said_and_tried_again(self, new_loop: Loop, host: str) -> None:
        """The resolver raises UnicodeError, which is no OSError."""

        async def scenario() -> None:
            async with calling(f"{host}:9000", connect=False) as calls:
                await eventually(lambda: "idna" in calls.last_error)
                with pytest.raises(Unavailable, match=r"cannot be reached: .*idna"):
                    await calls.wait_connected(0.05)

        run_on(new_loop, scenario())

    async def test_deadline_already_over(self, serves: Serving) -> None:
        async with serves(Echoes()) as (_, address), calling(address) as calls:
            reply = await calls.predict(PredictRequest(), now() - 1)
            assert reply.code == Code.CODE_DEADLINE_EXCEEDED

    async def test_too_large_an_item(self, serves: Serving) -> None:
        small = Limits(max_message_bytes=100_000, linger_s=0.1)
        async with serves(Echoes()) as (_, address), calling(address, small) as calls:
            reply = await calls.predict(PredictRequest(unit="u" * 100_001), None)
            assert reply.code == Code.CODE_INVALID_ARGUMENT

    async def test_a_full_buffer(self, serves: Serving) -> None:
        small = Limits(max_message_bytes=1 << 20, max_buffer_bytes=1 << 20, linger_s=0.1)
        async with serves(Echoes()) as (_, address), calling(address, small) as calls:
            item = PredictRequest(unit="u" * 400_000)
            replies = await asyncio.gather(*(calls.predict(item, None) for _ in range(5)))
            codes = Counter(reply.code for reply in replies)
            assert codes == {Code.CODE_OK: 2, Code.CODE_RESOURCE_EXHAUSTED: 3}

    async def test_cancel_before_the_refusal_is_delivered(self) -> None:
        async with calling("127.0.0.1:1", connect=False) as calls:
            got: list[PredictReply] = []
            calls.cancel(calls.submit(PredictRequest(), None, got.append))
            await asyncio.sleep(0.02)
            assert got == []
            assert calls.in_flight == 0


class TestDeadlinesAndCancels:
    async def test_deadline_passes_and_the_peer_hears_of_it(self, serves: Serving) -> None:
        echoes = Echoes()
        async with serves(echoes) as (_, address), calling(address) as calls:
            reply = await calls.predict(PredictRequest(version="hold"), now() + 0.3)
            assert reply.code == Code.CODE_DEADLINE_EXCEEDED
            await eventually(lambda: echoes.made[0].cancelled)
            assert echoes.made[0].peer.in_flight == 0
            echoes.made[0].release()  # late answers go nowhere
            assert (await calls.predict(PredictRequest(version="x"), None)).version == "x"

    async def test_the_timeout_travels(self, serves: Serving) -> None:
        async with serves(Echoes()) as (_, address), calling(address) as calls:
            reply = await calls.predict(PredictRequest(), now() + 60)
            assert 30_000_000 < reply.queue_us <= 60_000_000
            assert (await calls.predict(PredictRequest(timeout_us=77), None)).queue_us == 0

    async def test_an_earlier_deadline_is_not_missed_behind_a_later_one(self, serves: Serving) -> None:
        async with serves(Echoes()) as (_, address), calling(address) as calls:
            late = asyncio.create_task(calls.predict(PredictRequest(version="hold"), now() + 60))
            await asyncio.sleep(0.01)
            early = await calls.predict(PredictRequest(version="hold"), now() + 0.05)
            assert early.code == Code.CODE_DEADLINE_EXCEEDED
            assert not late.done()
            late.cancel()

    async def test_cancelled_items_never_disturb_their_frame(self, serves: Serving) -> None:
        echoes = Echoes()
        async with serves(echoes) as (_, address), calling(address) as calls:
            tasks = [
                asyncio.create_task(calls.predict(PredictRequest(version="hold"), None)) for _ in range(6)
            ]
            await eventually(lambda: echoes.made and len(echoes.made[0].held) == 6)
            for task in tasks[::2]:
                task.cancel()
            await eventually(lambda: len(echoes.made[0].cancelled) == 3)
            echoes.made[0].release()
            replies = await asyncio.gather(*tasks[1::2])
            assert [reply.code for reply in replies] == [Code.CODE_OK] * 3
            assert calls.in_flight == 0

    async def test_cancel_in_the_same_turn_sends_nothing(self, serves: Serving) -> None:
        echoes = Echoes()
        async with serves(echoes) as (_, address), calling(address) as calls:
            got: list[PredictReply] = []
            calls.cancel(calls.submit(PredictRequest(), None, got.append))
            await calls.predict(PredictRequest(version="after"), None)
            assert [len(frame.items) for frame in echoes.made[0].frames if frame.items] == [1]
            assert got == []

    async def test_an_idle_channel_holds_no_timer(self, serves: Serving) -> None:
        async with serves(Echoes()) as (_, address), calling(address) as calls:
            await calls.predict(PredictRequest(), now() + 0.02)
            await asyncio.sleep(0.05)
            assert calls._deadlines._timer is None


class TestEnds:
    async def test_a_lost_connection_answers_everything_and_comes_back(self, serves: Serving) -> None:
        echoes = Echoes()
        states: list[bool] = []
        async with serves(echoes) as (server, address):
            calls = FrameCalls(
                address, credential=TOKEN, role="router", instance="r", limits=QUICK, on_state=states.append
            )
            calls.start()
            await calls.wait_connected(PATIENCE_S)
            assert calls.peer is not None
            assert calls.peer.instance == "server-1"
            waiting = [
                asyncio.create_task(calls.predict(PredictRequest(version="hold"), None)) for _ in range(3)
            ]
            await eventually(lambda: echoes.made and len(echoes.made[0].held) == 3)
            await server.close()
            assert all(lost(reply) for reply in await asyncio.gather(*waiting))
            assert echoes.made[0].closed == 1
        port = address.rpartition(":")[2]
        again = serving(Echoes(), port=int(port)) if port.isdigit() else serving_here(Echoes(), name=port)
        async with again:
            await calls.wait_connected(PATIENCE_S)
            assert (await calls.predict(PredictRequest(version="again"), None)).version == "again"
            await calls.close()
        assert states == [True, False, True, False]

    async def test_drain_answers_what_is_open_and_takes_nothing_new(self, serves: Serving) -> None:
        echoes = Echoes()
        async with serves(echoes) as (server, address), calling(address) as calls:
            waiting = asyncio.create_task(calls.predict(PredictRequest(version="hold"), None))
            await eventually(lambda: echoes.made and echoes.made[0].held)
            drain = asyncio.create_task(server.drain(5))
            await eventually(lambda: calls.draining)
            assert not calls.usable
            assert lost(await calls.predict(PredictRequest(), None))
            assert not drain.done()
            echoes.made[0].release()
            assert (await waiting).code == Code.CODE_OK
            await drain
            assert server.connections == 0

    async def test_drain_ends_after_its_grace(self, serves: Serving) -> None:
        echoes = Echoes()
        async with serves(echoes) as (server, address), calling(address) as calls:
            waiting = asyncio.create_task(calls.predict(PredictRequest(version="hold"), None))
            await eventually(lambda: echoes.made and echoes.made[0].held)
            await server.drain(0.05)
            assert lost(await waiting)

    async def test_close_answers_what_is_pending(self, serves: Serving) -> None:
        async with serves(Echoes()) as (_, address), calling(address) as calls:
            waiting = asyncio.create_task(calls.predict(PredictRequest(version="hold"), None))
            await asyncio.sleep(0.01)
            await calls.close()
            assert lost(await waiting)

    async def test_a_failing_handler_answers_internal_and_the_stream_goes_on(self, serves: Serving) -> None:
        async with serves(Echoes()) as (_, address), calling(address) as calls:
            reply = await calls.predict(PredictRequest(version="raise"), None)
            assert reply.code == Code.CODE_INTERNAL
            assert "fault" not in reply.message
            assert (await calls.predict(PredictRequest(version="x"), None)).version == "x"

    async def test_a_failing_callback_harms_nobody_else(self, serves: Serving) -> None:
        async with serves(Echoes()) as (_, address), calling(address) as calls:

            def fail(_: PredictReply) -> None:
                raise RuntimeError("a caller's fault")

            calls.submit(PredictRequest(), None, fail)
            assert (await calls.predict(PredictRequest(version="x"), None)).version == "x"

    async def test_repeated_and_unknown_replies_are_dropped(self, serves: Serving) -> None:
        echoes = Echoes()
        async with serves(echoes) as (_, address), calling(address) as calls:
            waiting = asyncio.create_task(calls.predict(PredictRequest(version="hold"), None))
            await eventually(lambda: echoes.made and echoes.made[0].held)
            echo = echoes.made[0]
            echo.peer.reply(PredictReply(id=12345))
            echo.answer(echo.held[0])
            echo.answer(echo.held[0])
            await waiting
            assert calls.in_flight == 0
            assert echo.peer.in_flight == 0

    def test_a_server_without_a_credential_is_refused(self) -> None:
        with pytest.raises(ValueError, match="credential"):
            FrameServer(Echoes(), credential="", instance="x", role="worker")

    async def test_addresses_are_checked(self) -> None:
        for address in ("", "host", "host:", ":80", "host:0", "host:70000", "host:x"):
            with pytest.raises(ValueError, match="none of host:port"):
                FrameCalls(address, credential="t", role="r", instance="i")


class TestExactlyOnce:
    """Whatever happens to the connection: one reply for every submit, none for a cancelled one."""

    @staticmethod
    async def storm(serves: Serving, seed: int, steps: int) -> None:
        rng = random.Random(seed)
        echoes = Echoes()
        limits = Limits(
            linger_s=0.05,
            backoff_first_s=0.001,
            backoff_max_s=0.005,
            max_in_flight=50,
            frame_target_bytes=2000,
        )
        replies: Counter[int] = Counter()
        cancelled: set[int] = set()
        submitted: list[int] = []
        async with serves(echoes, limits) as (_, address), calling(address, limits) as calls:
            for _ in range(steps):
                act = rng.random()
                if act < 0.6:
                    for _ in range(rng.randrange(1, 12)):
                        key = len(submitted)
                        version = rng.choice(["hold", "x", "x", "raise"])
                        deadline = rng.choice([None, now() + rng.random() * 0.03, now() - 1, now() + 60])
                        request = PredictRequest(version=version, unit="u" * rng.choice([0, 10, 900]))
                        submitted.append(
                            calls.submit(request, deadline, lambda _, key=key: replies.update([key]))
                        )
                elif act < 0.75 and submitted:
                    key = rng.randrange(len(submitted))
                    if not replies[key]:
                        cancelled.add(key)
                    calls.cancel(submitted[key])
                elif act < 0.85:
                    for echo in echoes.made:
                        echo.release()
                elif act < 0.9 and calls._connection is not None:
                    calls._connection.abort()
                await asyncio.sleep(rng.choice([0, 0, 0.001, 0.004]))
        assert all(replies[key] == (0 if key in cancelled else 1) for key in range(len(submitted)))
        assert calls.in_flight == 0
        assert not calls._outbox
        assert calls._outbox.nbytes == 0

    @hypothesis_settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(LOOPS), st.integers(0, 1 << 32), st.integers(5, 60))
    def test_under_random_drops_cancels_and_deadlines(
        self, serves: Serving, loop: Loop, seed: int, steps: int
    ) -> None:
        run_on(loop, self.storm(serves, seed, steps))


class TestBadServers:
    """A server that says anything at all harms no caller: every call is answered, the client tries again."""

    @staticmethod
    async def against(script: bytes) -> None:
        failures: list[dict[str, object]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))

        async def bad(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):  # the client may hang up at any byte
                await reader.read(24)
                writer.write(script)
                writer.write_eof()
                while await reader.read(65536):
                    pass
            writer.close()

        server = await asyncio.start_server(bad, "127.0.0.1", 0)
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        limits = Limits(handshake_s=0.2, linger_s=0.05, backoff_first_s=0.001, backoff_max_s=0.002)
        async with calling(address, limits, connect=False) as calls:
            for _ in range(5):
                await asyncio.sleep(0.002)
                reply = await calls.predict(PredictRequest(), now() + 0.2)
                assert reply.code in {Code.CODE_OK, Code.CODE_UNAVAILABLE, Code.CODE_DEADLINE_EXCEEDED}
        server.close()
        await server.wait_closed()
        await asyncio.sleep(0.01)
        assert failures == []

    @hypothesis_settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.sampled_from(LOOPS),
        st.booleans(),
        st.lists(
            st.tuples(
                st.integers(0, 11),
                st.integers(0, 255),
                st.sampled_from([0, 1, 1, 1, 2, 3]),
                st.one_of(
                    st.binary(max_size=30),
                    st.binary(max_size=20).map(message),
                    st.just(message(ReplyFrame(items=[PredictReply(id=1)]).SerializeToString())),
                ),
            ),
            max_size=8,
        ),
        st.binary(max_size=10),
    )
    def test_says_anything(
        self, loop: Loop, good_start: bool, frames: list[tuple[int, int, int, bytes]], tail: bytes
    ) -> None:
        hello = message(ReplyFrame(hello=Hello(protocol=1)).SerializeToString())
        start = settings({}) + frame(1, 4, 1, b"\x88\x5f\x10application/grpc") + frame(0, 0, 1, hello)
        said = b"".join(frame(kind, flags, sid, payload) for kind, flags, sid, payload in frames)
        run_on(loop, self.against((start if good_start else b"") + said + tail))

    async def test_another_protocol_version_is_not_used(self) -> None:
        async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readexactly(len(PREFACE))
            hello = message(ReplyFrame(hello=Hello(protocol=2)).SerializeToString())
            writer.write(
                settings({}) + frame(1, 4, 1, b"\x88\x5f\x10application/grpc") + frame(0, 0, 1, hello)
            )
            await reader.read()
            writer.close()

        server = await asyncio.start_server(other, "127.0.0.1", 0)
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with calling(address, connect=False) as calls:
            await eventually(lambda: "protocol 2" in calls.last_error)
            assert not calls.connected
        server.close()
