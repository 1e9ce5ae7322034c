"""One ModelInfer call: a hot call that came over gRPC."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from headrace.v1.tensor_pb2 import Code

from services.common.errors import BodyTooLarge, DeadlineExceeded, HeadraceError
from services.gateway.call import Call, Head
from services.gateway.codecs.trailers import trailers
from services.gateway.predict import PredictService
from services.gateway.reading import Holder
from services.gateway.rpc.heads import CallHead
from services.gateway.rpc.streams import Stream

if TYPE_CHECKING:
    from services.gateway.rpc.connection import RpcConnection

_ONE_MESSAGE: Final = trailers(Code.CODE_INTERNAL, "A unary call has exactly one message.")
_GOOD: Final = 200


class InferExchange(Call, Stream):
    """A stream that is a call of `PredictService`. No task and no future is made for it."""

    held = 0
    _holder: Holder | None = None
    _admitted = False
    _came = False

    def __init__(
        self,
        service: PredictService,
        connection: RpcConnection,
        call_head: CallHead,
        head: Head,
        stream_id: int,
    ) -> None:
        # As in Call, without the call.
        self.service = service
        self.head = head
        self.speaker = service.speakers[head.target.dialect]
        self.open(connection, call_head, stream_id, connection.limits.max_message_bytes)

    @property
    def span_name(self) -> str:
        return "ModelInfer"

    # The stream's part.

    def on_message(self, payload: bytes | bytearray, *, compressed: bool) -> None:
        if self._came:
            self.refuse(_ONE_MESSAGE)
            return
        self._came = True
        if compressed:
            self.head = self.head.copy()
            self.head.content_encoding = self.call_head.encoding
        small = len(payload) <= self.service.limits.inline_bytes
        self.body = bytes(payload) if small and type(payload) is bytearray else payload

    def on_end(self) -> None:
        if self._came:
            if self.ticks and self.head.timeout_s:  # the deadline counts from the head on
                self.head = self.head.copy()
                self.head.timeout_s = max(self.head.timeout_s - self.ticks, 1e-9)
            self.service.begin(self)
        else:
            self.refuse(_ONE_MESSAGE)

    def on_opened(self) -> None:
        """The message goes on after this turn of the loop: wait for it only where its caller has a key."""
        if self._admitted:
            return
        self._admitted = True
        try:
            self._holder = self.service.admit(self).holder
        except HeadraceError as error:
            self.service.refuse(self, error)

    def refuse(self, trailers: bytes) -> None:
        self._release()
        super().refuse(trailers)

    def on_piece(self, size: int) -> None:
        self.on_opened()
        if self.over or self._holder is None:
            return
        try:
            self.service.bodies.take(size, self._holder)
        except HeadraceError as error:
            self.service.refuse(self, error)
            return
        self.held += size

    def refuse_size(self, size: int) -> None:
        self.on_opened()
        if not self.over:
            limit = self.service.limits.max_body_bytes
            self.service.refuse(self, BodyTooLarge(f"The message has {size} bytes; {limit} are taken."))

    def late(self) -> None:
        self.service.refuse(self, DeadlineExceeded("The message did not arrive in time."))

    def holder(self) -> Holder | None:
        key = self.head.key
        return key.holder if key is not None else None

    def on_gone(self) -> None:
        self._release()
        self.service.abandon(self)

    def _release(self) -> None:
        self.body = b""
        self._drop()
        if self._holder is not None:
            self.service.bodies.give(self.held, self._holder)
            self.held = 0

    # The call's part.

    def answer(self, status: int, headers: bytes, body: bytes) -> None:
        """`body` is the message of a good answer, the trailers of another; gRPC has no use for `headers`."""
        if self.held:
            self._release()
        if self.gone:
            return
        if status == _GOOD:
            self.connection.answer(self, body)
        else:
            self.connection.refuse(self, body)
