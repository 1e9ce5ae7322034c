"""One hot request in the pipeline of its connection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from services.common.errors import HeadraceError
from services.gateway.call import Call, Head
from services.gateway.predict import PredictService
from services.gateway.reading import Holder

if TYPE_CHECKING:
    from services.gateway.hot.pipeline import PipelinedProtocol

_CLOSE = b"connection: close\r\n"
_LONG_PIECE = 4096


class _NobodyWaits:
    """Stands for the event by which uvicorn wakes an ASGI application."""

    @staticmethod
    def set() -> None:
        return


class HotExchange(Call):
    """Stands in uvicorn's pipeline where an ASGI request has its cycle, so that both kinds keep their
    order."""

    # What uvicorn reads and sets on a cycle.
    response_complete = False
    disconnected = False
    keep_alive = True
    message_event: ClassVar[type[_NobodyWaits]] = _NobodyWaits

    #: Its turn has come: nothing before it on the connection is unanswered.
    started = False
    #: Its message was read to the end.
    complete = False
    size = 0
    #: Of its body, behind what is in `body`.
    pieces: list[bytes | bytearray] | None = None
    expects_continue = False
    continued = False
    #: Its caller has a key, so its body is waited for; how much of the body is counted as held.
    holder: Holder | None = None
    held = 0
    refusal: HeadraceError | None = None

    def __init__(self, service: PredictService, head: Head, protocol: PipelinedProtocol) -> None:
        # As in Call, without the call.
        self.service = service
        self.head = head
        self.speaker = service.speakers[head.target.dialect]
        self.protocol = protocol

    def take(self, chunk: bytes, limit: int) -> bool:
        """Add a piece of the body; False where it is more than `limit` bytes now. Most bodies are one
        piece."""
        self.size += len(chunk)
        if self.size > limit:
            return False
        if not self.body:
            self.body = chunk
            return True
        pieces = self.pieces
        if pieces is None:
            pieces = self.pieces = []
        if len(chunk) >= _LONG_PIECE:
            pieces.append(chunk)  # copied once, when all are joined
        elif pieces and isinstance(last := pieces[-1], bytearray):
            last += chunk
        else:
            pieces.append(bytearray(chunk))  # bytes that come one by one are no object each
        return True

    def drop(self) -> None:
        """The body is of no use any more."""
        self.body = b""
        self.pieces = None

    def hold(self) -> None:
        """The body goes on after this turn of the loop. Raises where its caller has no key, or where too much
        is held already."""
        holder = self.holder
        if holder is None:
            holder = self.holder = self.service.admit(self).holder
        self.service.bodies.take(self.size - self.held, holder)
        self.held = self.size

    def release(self) -> None:
        """The body is gone."""
        if self.holder is not None:
            self.service.bodies.give(self.held, self.holder)
            self.held = 0

    def run(self) -> None:
        """Its turn has come and it is complete, or refused already."""
        if self.refusal is not None:
            self.service.refuse(self, self.refusal)
            return
        if self.pieces is not None:
            self.body = b"".join((self.body, *self.pieces))
            self.pieces = None
        self.service.begin(self)

    def answer(self, status: int, headers: bytes, body: bytes) -> None:
        protocol = self.protocol
        self.response_complete = True
        self.drop()
        if self.held:
            self.release()
        if self.disconnected or protocol.transport.is_closing():
            return
        keep_alive = self.keep_alive and not protocol.front.draining
        protocol.transport.write(
            b"%b%b%bcontent-length: %d\r\n%b\r\n%b"
            % (
                STATUS_LINE[status],
                protocol.default_lines(),
                headers,
                len(body),
                b"" if keep_alive else _CLOSE,
                body,
            )
        )
        protocol.answered(self, keep_alive=keep_alive)


def refused(exchange: HotExchange, error: HeadraceError) -> HotExchange:
    """`exchange`, to be answered with `error` when its turn comes, and nothing after it."""
    exchange.refusal = error
    exchange.complete = True
    exchange.keep_alive = False
    return exchange


async def no_app(_scope: Any, _receive: Any, _send: Any) -> None:
    """Stands beside a hot exchange in uvicorn's pipeline; never called."""
