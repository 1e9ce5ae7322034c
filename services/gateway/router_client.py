"""The way to the routers: one frame stream to each, the request on the one with the least in flight.

While a router restarts and there is no other, requests wait for it for a moment (`WaitingRoom`); where a
connection is lost with requests on it, they are sent once more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from headrace.v1.dataplane_pb2 import SealedReply
from headrace.v1.tensor_pb2 import Code

from services.common.errors import HeadraceError, Unavailable, error_of
from services.common.frames import lost
from services.gateway.admission import Admission
from services.gateway.channel import Cancellable, Channel

#: Of the limit on what is in flight, what requests of low priority may fill.
_LOW_SHARE = 0.5


class WaitingRoom:
    """Requests that no router can take just now. They may wait for `hold_s` seconds after a connection was
    lost; in a longer outage they fail at once."""

    def __init__(self, hold_s: float = 2.0, room: int = 1000) -> None:
        self._hold_s = hold_s
        self._room = room
        self._until = 0.0
        self._waiting: dict[int, tuple[Callable[[], None], asyncio.TimerHandle]] = {}
        self._last = 0

    def changed(self, usable: bool) -> None:
        """A channel became usable, or ceased to be."""
        if not usable:
            self._until = asyncio.get_running_loop().time() + self._hold_s
            return
        for ticket in list(self._waiting):
            self._resume(ticket)

    def hold(self, resume: Callable[[], None], deadline: float) -> int:
        """Call `resume` once, when a channel becomes usable or when waiting makes no sense any more; returns
        the ticket for `cancel`. Raises Unavailable where it makes none now."""
        # Without a loop no channel was ever connected.
        loop = asyncio.get_running_loop() if self._until else None
        if loop is None or loop.time() >= min(self._until, deadline) or len(self._waiting) >= self._room:
            raise Unavailable("No router can be reached.", retry_after_ms=1000)
        self._last = ticket = self._last + 1
        timer = loop.call_at(min(self._until, deadline), self._resume, ticket)
        self._waiting[ticket] = (resume, timer)
        return ticket

    def cancel(self, ticket: int, /) -> None:
        """`resume` is not called any more."""
        _resume, timer = self._waiting.pop(ticket, (None, None))
        if timer is not None:
            timer.cancel()

    def _resume(self, ticket: int) -> None:
        if ticket in self._waiting:
            resume, timer = self._waiting.pop(ticket)
            timer.cancel()
            resume()


class RouterClient:
    """Picks a channel per request."""

    def __init__(
        self,
        channels: Sequence[Channel],
        waiting: WaitingRoom | None = None,
        admission: Admission | None = None,
    ) -> None:
        if not channels:
            raise ValueError("at least one router is needed")
        self.waiting = waiting or WaitingRoom()
        self.admission = admission or Admission()
        self._channels = tuple(channels)
        self._only = self._channels[0] if len(self._channels) == 1 else None

    def pick(self, tried: Cancellable | None = None) -> Channel:
        """The usable channel with the least in flight, other than `tried`; a silent one only where all
        are. Raises Unavailable."""
        only = self._only
        if only is not None and tried is None and only.usable:
            return only
        usable = [channel for channel in self._channels if channel.usable and channel is not tried]
        if not usable:
            raise Unavailable("No router can be reached.", retry_after_ms=1000)
        return min(usable, key=_load)

    @property
    def usable(self) -> bool:
        """Whether any router takes requests now."""
        return any(channel.usable for channel in self._channels)

    @property
    def in_flight(self) -> int:
        """Requests that no router has answered yet."""
        if self._only is not None:
            return self._only.in_flight
        return sum(channel.in_flight for channel in self._channels)

    def admit(self) -> None:
        """Raises Unavailable where the platform has as many requests as it can answer."""
        if self.in_flight >= self.admission.limit:
            raise self.admission.refusal()

    def admit_low(self) -> None:
        """The same for what can wait: it is refused first."""
        if self.in_flight >= self.admission.limit * _LOW_SHARE:
            raise self.admission.refusal()

    def answered(self, reply: SealedReply, took_s: float, now: float) -> None:
        """A request was answered after `took_s`; model and queue are told apart from the way there."""
        way_s = took_s - (reply.queue_us + reply.compute_us) * 1e-6
        self.admission.observe(way_s, self.in_flight, now)

    async def predict(self, request: bytes, deadline: float) -> SealedReply:
        """For callers that have one request, serialized, and can wait: held and sent again as the others are.
        Cancelling the await cancels the item."""
        channel = await self._picked(deadline)
        reply = await self._asked(channel, request, deadline)
        if not lost(reply):
            return reply
        try:
            channel = await self._picked(deadline, channel)
        except Unavailable:
            return reply
        return await self._asked(channel, request, deadline)

    async def _picked(self, deadline: float, tried: Channel | None = None) -> Channel:
        try:
            return self.pick(tried)
        except Unavailable:
            resumed = asyncio.Event()
            ticket = self.waiting.hold(resumed.set, deadline)
        try:
            await resumed.wait()
        finally:
            self.waiting.cancel(ticket)
        return self.pick()

    async def _asked(self, channel: Channel, request: bytes, deadline: float) -> SealedReply:
        answered: asyncio.Future[SealedReply] = asyncio.get_running_loop().create_future()

        def settle(reply: SealedReply) -> None:
            if not answered.done():
                answered.set_result(reply)

        local_id = channel.submit_raw(request, deadline, settle)
        try:
            return await answered
        except asyncio.CancelledError:
            channel.cancel(local_id)
            raise


def failure(reply: SealedReply) -> HeadraceError:
    """What a reply without an answer means to a client."""
    retry_ms = reply.retry_after_ms
    if not retry_ms and reply.code in (Code.CODE_UNAVAILABLE, Code.CODE_RESOURCE_EXHAUSTED):
        retry_ms = 1000
    if lost(reply):
        return Unavailable("The router cannot be reached.", retry_after_ms=retry_ms)
    message = reply.message or "The request failed."
    return error_of(reply.code, message, field=reply.field, retry_after_ms=retry_ms)


def _load(channel: Channel) -> tuple[bool, int]:
    return channel.silent, channel.in_flight
