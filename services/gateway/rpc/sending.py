"""The lower half of a connection: its socket, what is sent on its streams and how much may be, and its end.

What a turn of the event loop brings leaves in one write. Answers that windows or the socket do not take at
once wait on their streams, counted as held, and leave in turns of a frame each.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import struct
from typing import Final, Protocol, cast

from headrace.v1.tensor_pb2 import Code

from services.common.errors import HeadraceError
from services.common.frames import wire
from services.common.frames.outbound import keep_alive
from services.common.frames.turn import turn_of
from services.common.frames.wire import ErrorCode
from services.gateway.codecs.trailers import trailers
from services.gateway.reading import BodyBudget
from services.gateway.rpc.limits import RpcLimits
from services.gateway.rpc.statuses import HEAD, OK
from services.gateway.rpc.streams import PREFIX_BYTES, Stream

log = logging.getLogger(__name__)

#: What an answer begins with: the frame with its head, then the frame with its message up to the message;
#: each frame's length in two parts, kind, flags, stream.
_BEGIN: Final = struct.Struct(f">HBBBI{len(HEAD)}sHBBBIBI")
_HEAD_HIGH, _HEAD_LOW = len(HEAD) >> 8, len(HEAD) & 255
_END: Final = struct.Struct(f">HBBBI{len(OK)}s")
_OK_HIGH, _OK_LOW = len(OK) >> 8, len(OK) & 255
_LAST: Final = wire.END_HEADERS | wire.END_STREAM
_WRITE_BYTES: Final = 256 << 10

_TOO_MUCH: Final = trailers(Code.CODE_UNAVAILABLE, "The gateway holds too many unread answers.")


class Around(Protocol):
    """What a connection needs of the server it belongs to."""

    limits: RpcLimits

    @property
    def bodies(self) -> BodyBudget:
        """Counts bytes that are held for clients."""
        ...


class Sending(asyncio.Protocol):
    """The socket of one connection, and its streams as far as sending and ending go."""

    def __init__(self, around: Around, loop: asyncio.AbstractEventLoop) -> None:
        self._around = around
        self._limits = around.limits
        self._loop = loop
        self._turn = turn_of(loop)
        self._transport: asyncio.Transport | None = None
        #: Done when the socket is gone.
        self.lost: asyncio.Future[None] = loop.create_future()
        self._streams: dict[int, Stream] = {}
        self._last_stream_id = 0
        self._out: list[bytes | memoryview] = []
        self._out_scheduled = False
        self._window = wire.DEFAULT_WINDOW  # what we may still send on all streams together
        self._peer_initial_window = wire.DEFAULT_WINDOW
        self._peer_max_frame = wire.DEFAULT_MAX_FRAME
        self._sending: dict[
            Stream, None
        ] = {}  # those that wait for the socket or everybody's window, in turn
        self._blocked: dict[Stream, None] = {}  # those that wait for their own windows
        self._paused = False  # the socket takes nothing more
        self._pumping = False
        self._unread_ticks = 0
        self._answered = 0  # calls that went well and messages of streams, since the sweep came by
        self._draining = False
        self._ending = False  # nothing is read or sent any more
        self._linger: asyncio.TimerHandle | None = None

    @property
    def limits(self) -> RpcLimits:
        """The bounds it keeps."""
        return self._limits

    @property
    def streams(self) -> int:
        """Calls that are open."""
        return len(self._streams)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        limits = self._limits
        keep_alive(transport.get_extra_info("socket"), limits.ping_after_s, limits.ping_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        self._ending = True
        self._drop_streams()
        if not self.lost.done():
            self.lost.set_result(None)

    def pause_writing(self) -> None:
        self._paused = True
        self._unread_ticks = 0
        # Were both sides to wait for the other, both would for ever; clients read on, so we may wait.
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._paused = False
        self._unread_ticks = 0
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()
        self._pump()

    def eof_received(self) -> bool:
        return False

    # Writing

    def _queue(self, *parts: bytes | memoryview) -> None:
        """Send `parts` at the end of the turn."""
        if self._ending:
            return
        self._out += parts
        if not self._out_scheduled:
            self._out_scheduled = True
            self._turn.at_end(self._flush)

    def _flush(self) -> None:
        self._out_scheduled = False
        out = self._out
        if out:
            self._out = []
            if self._transport is not None:
                self._transport.write(b"".join(out))

    def answer(self, stream: Stream, message: bytes) -> None:
        """The one message of a call, and that all is well."""
        self._answered += 1
        size = len(message)
        total = size + PREFIX_BYTES
        if (
            total > self._window
            or total > stream.window
            or total > self._peer_max_frame
            or self._paused
            or stream.headers_sent
            or not stream.complete
        ):
            self.send(stream, message, OK)
            return
        self._window -= total
        number = stream.stream_id
        stream.over = True
        del self._streams[number]
        begin = _BEGIN.pack(
            _HEAD_HIGH, _HEAD_LOW, wire.HEADERS, wire.END_HEADERS, number, HEAD,
            total >> 8, total & 255, wire.DATA, 0, number, 0, size,
        )  # fmt: skip
        end = _END.pack(_OK_HIGH, _OK_LOW, wire.HEADERS, _LAST, number, OK)
        if not self._ending:
            self._out += (begin, message, end)
            if not self._out_scheduled:
                self._out_scheduled = True
                self._turn.at_end(self._flush)
        if self._draining and not self._streams:
            self._on_idle()

    def send(self, stream: Stream, message: bytes, trailers: bytes = b"") -> None:
        """A message of a call that has none under way; with `trailers` the last."""
        if self._ending or stream.over or stream.gone:
            return
        bodies = self._around.bodies
        holder = stream.holder() or bodies.strangers
        try:
            bodies.take(len(message), holder)
        except HeadraceError:
            self.refuse(stream, _TOO_MUCH)
            return
        stream.answer_held, stream.answer_holder = len(message), holder
        if not stream.headers_sent:
            stream.headers_sent = True
            self._queue(wire.frame(wire.HEADERS, wire.END_HEADERS, stream.stream_id, HEAD))
        stream.unsent = memoryview(b"\0" + len(message).to_bytes(4, "big") + message)
        stream.sent = 0
        stream.trailers = trailers
        if trailers:
            stream.over = True
        if not self._sending and not self._blocked:
            self._unread_ticks = 0
        self._sending[stream] = None
        self._pump()

    def finish(self, stream: Stream, trailers: bytes = OK) -> None:
        """The end of a call whose messages have left."""
        if not self._ending and not stream.over and not stream.gone:
            self._end_stream(stream, trailers)

    def refuse(self, stream: Stream, trailers: bytes) -> None:
        """End a call with a status, whatever else of it waits."""
        if stream.over or stream.gone:
            return
        if stream.unsent is not None:  # part of a message went: only a reset can follow
            self._forget(stream)
            self._queue(wire.reset(stream.stream_id, ErrorCode.CANCEL))
        else:
            self._end_stream(stream, trailers)

    def _refuse_http(self, stream_id: int, block: bytes) -> None:
        self._queue(wire.header_block(stream_id, block, self._peer_max_frame, end_stream=True))

    def _end_stream(self, stream: Stream, trailers: bytes) -> None:
        block = trailers if stream.headers_sent else HEAD + trailers
        self._queue(wire.header_block(stream.stream_id, block, self._peer_max_frame, end_stream=True))
        if not stream.complete:
            # Or the client would go on sending what nobody reads.
            self._queue(wire.reset(stream.stream_id, ErrorCode.NO_ERROR))
        self._forget(stream)

    def _forget(self, stream: Stream) -> None:
        """The call is over on our side."""
        stream.over = True
        stream.unsent = None
        if stream.answer_held:
            self._around.bodies.give(stream.answer_held, stream.answer_holder)
            stream.answer_held = 0
        self._sending.pop(stream, None)
        self._blocked.pop(stream, None)
        self._streams.pop(stream.stream_id, None)
        if self._draining and not self._streams:
            self._on_idle()

    def _drop_streams(self) -> None:
        """Nobody waits for any answer."""
        streams, self._streams = list(self._streams.values()), {}
        self._out.clear()
        for stream in streams:
            self._lose(stream)

    def _lose(self, stream: Stream) -> None:
        """The client gave `stream` up."""
        was_over = stream.over
        stream.gone = True
        self._forget(stream)
        if not was_over:
            try:
                stream.on_gone()
            except Exception:
                log.exception("giving up a gRPC call failed")

    def _on_idle(self) -> None:
        """The last call is over, and the server is draining."""

    def _on_sent(self, stream: Stream) -> None:
        """All of a message that was not the last has left."""

    def _pump(self) -> None:
        """Send what waits, as far as windows and socket allow."""
        if self._pumping:
            return  # a message that has left brought the next: its turn comes
        self._pumping = True
        try:
            self._pump_round()
        finally:
            self._pumping = False

    def _pump_round(self) -> None:
        """Nobody is looked at in vain more than once: windows may come a byte at a time, and a thousand calls
        wait."""
        written = 0
        while self._sending and not self._ending and not self._paused and self._window > 0:
            for stream in list(self._sending):
                if self._paused or self._window <= 0:
                    return
                unsent, at = stream.unsent, stream.sent
                if unsent is None:
                    self._sending.pop(stream, None)
                    continue
                size = min(len(unsent) - at, self._peer_max_frame, self._window, stream.window)
                if size <= 0:
                    del self._sending[stream]
                    self._blocked[stream] = None
                    continue
                self._unread_ticks = 0
                self._window -= size
                stream.window -= size
                head = wire.frame_header(size, wire.DATA, 0, stream.stream_id)
                self._queue(head, unsent[at : at + size])
                stream.sent = at + size
                if stream.sent == len(unsent):
                    self._sent(stream)
                written += size
                if written >= _WRITE_BYTES:
                    written = 0
                    self._out_now()

    def _sent(self, stream: Stream) -> None:
        del self._sending[stream]
        stream.unsent = None
        if stream.trailers:
            self._end_stream(stream, stream.trailers)
            return
        self._around.bodies.give(stream.answer_held, stream.answer_holder)
        stream.answer_held = 0
        self._answered += 1
        self._on_sent(stream)

    def _out_now(self) -> None:
        """Write what is queued: only then does the socket say whether it takes more."""
        out, self._out = self._out, []
        if out and self._transport is not None:
            self._transport.write(b"".join(out))

    # Ending

    def _fail(self, code: ErrorCode, reason: str) -> None:
        """Say what went wrong and close."""
        if self._ending:
            return
        if code is not ErrorCode.NO_ERROR:
            # Who connects may be anybody: a warning each would let strangers fill the log.
            log.debug("gRPC connection ended with %s: %s", code.name, reason)
        self._out.append(wire.goaway(self._last_stream_id, code, reason))
        self._out_now()
        self._end()

    def _end(self) -> None:
        """Send nothing more; the socket follows when the client has read, at the latest after `linger_s`.

        Closing at once would reset the connection where bytes of the client are still unread, and the client
        would lose the reason with it.
        """
        if self._ending:
            return
        self._ending = True
        self._drop_streams()
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        self._linger = self._loop.call_later(self._limits.linger_s, transport.abort)
        if self._paused:
            transport.resume_reading()
        with contextlib.suppress(OSError, RuntimeError, NotImplementedError):
            transport.write_eof()

    def abort(self) -> None:
        """Drop the socket now."""
        if self._transport is not None:
            self._transport.abort()
