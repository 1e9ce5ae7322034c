"""The ports of the way to the routers. Not where they are used: mypyc forgets the default None of an
attribute that is typed by a protocol which it compiles too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from headrace.v1.dataplane_pb2 import SealedReply

from services.common.frames.detached import Buffer

OnReply = Callable[[SealedReply], None]


class Cancellable(Protocol):
    """Where something waits that its client may give up."""

    def cancel(self, local_id: int, /) -> None: ...


class Channel(Protocol):
    """What `services.common.frames.FrameCalls` with sealed replies gives. `request` is a serialized
    PredictRequest, or what of one is not in `tensors`. `on_reply` is called exactly once, on the loop, never
    before `submit` returned; never after `cancel`."""

    @property
    def usable(self) -> bool: ...

    @property
    def silent(self) -> bool: ...

    @property
    def in_flight(self) -> int: ...

    def submit_raw(
        self,
        request: bytes,
        deadline: float | None,
        on_reply: OnReply,
        tensors: tuple[Buffer, ...] | None = None,
    ) -> int: ...

    def cancel(self, local_id: int, /) -> None: ...
