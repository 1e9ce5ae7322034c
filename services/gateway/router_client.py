"""The way to the routers: one frame stream to each, the request on the one with the least in flight."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest

from services.common.errors import Unavailable

OnReply = Callable[[PredictReply], None]


class Cancellable(Protocol):
    """Where something waits that its client may give up."""

    def cancel(self, local_id: int, /) -> None: ...


class Channel(Protocol):
    """What `services.common.frames.FrameCalls` gives. `on_reply` is called exactly once, on the loop, never
    before `submit` returned; never after `cancel`."""

    @property
    def usable(self) -> bool: ...

    @property
    def in_flight(self) -> int: ...

    def submit(self, request: PredictRequest, deadline: float | None, on_reply: OnReply) -> int: ...

    def cancel(self, local_id: int, /) -> None: ...


class RouterClient:
    """Picks a channel per request."""

    def __init__(self, channels: Sequence[Channel]) -> None:
        if not channels:
            raise ValueError("at least one router is needed")
        self._channels = tuple(channels)
        self._only = self._channels[0] if len(self._channels) == 1 else None

    def pick(self, tried: Cancellable | None = None) -> Channel:
        """The usable channel with the least in flight, other than `tried`. Raises Unavailable."""
        only = self._only
        if only is not None and tried is None and only.usable:
            return only
        usable = [channel for channel in self._channels if channel.usable and channel is not tried]
        if not usable:
            raise Unavailable("No router can be reached.", retry_after_ms=1000)
        return min(usable, key=_in_flight)

    @property
    def usable(self) -> bool:
        """Whether any router takes requests now."""
        return any(channel.usable for channel in self._channels)

    @property
    def in_flight(self) -> int:
        """Requests that no router has answered yet."""
        return sum(channel.in_flight for channel in self._channels)

    async def predict(self, request: PredictRequest, deadline: float) -> PredictReply:
        """For callers that have one request and can wait. Cancelling the await cancels the item."""
        answered: asyncio.Future[PredictReply] = asyncio.get_running_loop().create_future()

        def settle(reply: PredictReply) -> None:
            if not answered.done():
                answered.set_result(reply)

        channel = self.pick()
        local_id = channel.submit(request, deadline, settle)
        try:
            return await answered
        except asyncio.CancelledError:
            channel.cancel(local_id)
            raise


def _in_flight(channel: Channel) -> int:
    return channel.in_flight
