"""Which router a request goes to, and what happens when its connection is lost."""

from __future__ import annotations

import asyncio

import pytest
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest, SealedReply
from headrace.v1.tensor_pb2 import Code
from prometheus_client import CollectorRegistry

from services.common.clock import SystemClock
from services.common.errors import Unavailable
from services.common.frames.detached import Buffer
from services.common.telemetry import setup_tracing
from services.gateway.admission import Admission
from services.gateway.call import Call, Head
from services.gateway.catalogue import Catalogue
from services.gateway.channel import OnReply
from services.gateway.keys import KeyRing
from services.gateway.metrics import GatewayMetrics
from services.gateway.predict import PredictLimits, PredictService
from services.gateway.router_client import RouterClient, WaitingRoom, failure
from services.gateway.targets import Dialect, Target, target_of
from tests.fixtures.gateway import PREDICT_ONLY, answer_like_a_worker, api_key, configs
from tests.fixtures.waiting import PATIENCE_S


class Channel:
    """A router whose replies are given by hand."""

    def __init__(self, in_flight: int = 0, *, usable: bool = True) -> None:
        self.in_flight = in_flight
        self.usable = usable
        self.silent = False
        self.callbacks: dict[int, OnReply] = {}
        self.requests: list[PredictRequest] = []

    def submit_raw(
        self,
        request: bytes,
        deadline: float | None,
        on_reply: OnReply,
        tensors: tuple[Buffer, ...] | None = None,
    ) -> int:
        self.requests.append(PredictRequest.FromString(request))
        self.callbacks[len(self.requests)] = on_reply
        return len(self.requests)

    def cancel(self, local_id: int) -> None:
        del self.callbacks[local_id]

    def answer(self, reply: SealedReply | PredictReply) -> None:
        _id, on_reply = self.callbacks.popitem()
        on_reply(SealedReply.FromString(reply.SerializeToString()))


class Answered(Call):
    """Keeps its answer."""

    got: tuple[int, bytes] | None = None

    def answer(self, status: int, headers: bytes, body: bytes) -> None:
        assert self.got is None
        self.got = (status, body)


LOST = SealedReply(code=Code.CODE_UNAVAILABLE, message="connection lost")


def begun(
    *channels: Channel, waiting: WaitingRoom | None = None, admission: Admission | None = None
) -> Answered:
    clock = SystemClock()
    keys, catalogue = KeyRing(clock), Catalogue()
    key = api_key(PREDICT_ONLY, ["predict"])
    keys.apply(key.key_id.encode(), key.SerializeToString())
    cancer = configs()[0]
    catalogue.apply(b"cancer", cancer.SerializeToString())
    service = PredictService(
        catalogue=catalogue,
        keys=keys,
        router=RouterClient(channels, waiting, admission),
        tracing=setup_tracing("gateway", None),
        metrics=GatewayMetrics(CollectorRegistry()),
        clock=clock,
        limits=PredictLimits(),
    )
    call = Answered(service, Head(Target(Dialect.NATIVE)))
    call.head.api_key = PREDICT_ONLY.encode()
    call.body = b'{"model": "cancer", "inputs": [[1, 2, 3]]}'
    service.begin(call)
    return call


def test_a_silent_router_is_picked_only_where_all_are() -> None:
    frozen, busy = Channel(0), Channel(100)
    client = RouterClient([frozen, busy])
    frozen.silent = True
    assert client.pick() is busy
    assert client.pick(tried=busy) is frozen
    busy.silent = True
    assert client.pick() is frozen


def test_the_least_loaded_usable_router_is_picked() -> None:
    busy, idle, gone = Channel(5), Channel(2), Channel(0, usable=False)
    client = RouterClient([busy, idle, gone])
    assert client.pick() is idle
    assert client.pick(tried=idle) is busy
    assert client.in_flight == 7
    idle.usable = busy.usable = False
    assert not client.usable
    with pytest.raises(Unavailable):
        client.pick()


def test_a_lost_connection_sends_the_request_to_another_router_once() -> None:
    first, second = Channel(), Channel(1)
    call = begun(first, second)
    first.answer(LOST)
    assert call.got is None
    assert second.requests[0].request_id == first.requests[0].request_id
    second.answer(answer_like_a_worker(second.requests[0]))
    assert call.got is not None
    assert call.got[0] == 200
    both = [Channel(), Channel(1)]
    call = begun(*both)
    both[0].answer(LOST)
    both[1].answer(LOST)
    assert call.got is not None
    assert call.got[0] == 503


def test_without_another_router_it_is_503_without_internals() -> None:
    only = Channel()
    call = begun(only)
    only.answer(LOST)
    assert call.got is not None
    assert call.got[0] == 503
    assert b"connection lost" not in call.got[1]
    assert begun(Channel(usable=False)).got is not None


async def test_a_restarting_router_is_waited_for() -> None:
    only, waiting = Channel(), WaitingRoom()
    call = begun(only, waiting=waiting)
    only.usable = False
    waiting.changed(False)
    only.answer(LOST)
    other = begun(only, waiting=waiting)
    assert (call.got, other.got) == (None, None)
    given_up = begun(only, waiting=waiting)
    given_up.service.abandon(given_up)
    only.usable = True
    waiting.changed(True)
    assert len(only.requests) == 3
    for one in (call, other):
        only.answer(answer_like_a_worker(only.requests[0]))
        assert one.got is None or one.got[0] == 200
    assert call.got is not None
    assert other.got is not None
    assert given_up.got is None


async def test_waiting_for_a_router_is_bounded_in_time_and_number() -> None:
    only, waiting = Channel(usable=False), WaitingRoom(hold_s=0.5, room=1)
    waiting.changed(False)
    held, refused = begun(only, waiting=waiting), begun(only, waiting=waiting)
    assert held.got is None
    assert refused.got is not None
    async with asyncio.timeout(PATIENCE_S):
        while held.got is None:  # noqa: ASYNC110 - the call tells nobody
            await asyncio.sleep(0.005)
    assert held.got[0] == refused.got[0] == 503
    late = begun(only, waiting=waiting)
    assert late.got is not None


async def test_a_wait_survives_a_lost_connection_too() -> None:
    deadline = asyncio.get_running_loop().time() + 5
    first, second = Channel(), Channel(1)
    waiting = WaitingRoom()
    client = RouterClient([first, second], waiting)
    asked = asyncio.create_task(client.predict(PredictRequest(model="cancer").SerializeToString(), deadline))
    await asyncio.sleep(0)
    first.answer(LOST)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    first.usable = second.usable = False
    waiting.changed(False)
    second.answer(SealedReply(version="1"))
    assert (await asked).version == "1"
    held = asyncio.create_task(client.predict(PredictRequest().SerializeToString(), deadline))
    await asyncio.sleep(0)
    second.usable = True
    waiting.changed(True)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    second.answer(SealedReply(version="2"))
    assert (await held).version == "2"


def test_a_lost_connection_is_told_without_internals() -> None:
    told = failure(LOST)
    assert (told.message, told.retry_after_ms) == ("The router cannot be reached.", 1000)


async def test_cancelling_a_wait_cancels_the_item() -> None:
    channel = Channel()
    waiting = asyncio.create_task(RouterClient([channel]).predict(PredictRequest().SerializeToString(), 1.0))
    await asyncio.sleep(0)
    assert channel.callbacks
    waiting.cancel()
    await asyncio.wait({waiting})
    assert channel.callbacks == {}


@pytest.mark.parametrize(
    ("path", "target"),
    [
        (b"/v1/predict", Target(Dialect.NATIVE)),
        (b"/api/v1/models/a.b-c_1/predict", Target(Dialect.NATIVE, "a.b-c_1")),
        (b"/v2/models/m/versions/1/infer", Target(Dialect.V2, "m", "1")),
        (b"/v1/embed", Target(Dialect.EMBED)),
        (b"/v1/models//predict", None),
        (b"/v1/models/a/b/predict", None),
        (b"/v1/models/%61/predict", None),
        (b"/v1/predict?x=1", None),
        (b"/v1/models/m", None),
        (b"/v1/predict/", None),
    ],
)
def test_hot_paths(path: bytes, target: Target | None) -> None:
    assert target_of(path) == target
    assert target_of(path) == target


@pytest.mark.parametrize(
    ("reply", "counts"),
    [
        (SealedReply(version="1"), True),
        (SealedReply(version="1", code=Code.CODE_RESOURCE_EXHAUSTED), True),
        # Made by the channel itself, so it went nowhere.
        (SealedReply(code=Code.CODE_RESOURCE_EXHAUSTED), False),
        # It may have been the model that took so long.
        (SealedReply(version="1", code=Code.CODE_DEADLINE_EXCEEDED), False),
    ],
)
async def test_refusals_that_came_all_the_way_say_how_long_it_is(reply: SealedReply, counts: bool) -> None:
    admission = Admission(1e9)  # which no answer is too late for: the limit grows with any that counts
    admission.limit = 100
    channel = Channel()
    call = begun(channel, admission=admission)
    channel.answer(reply)
    assert call.got is not None
    assert (admission.limit > 100) is counts
