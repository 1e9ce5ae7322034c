"""One call on its connection: how its messages come in pieces, and what is still to be sent of its answer."""

from __future__ import annotations

import struct
from abc import abstractmethod
from typing import TYPE_CHECKING, Final

from headrace.v1.tensor_pb2 import Code

from services.common.frames.in_place import IN_PLACE_BYTES, MOST_IN_PLACE, unwritten
from services.common.native import trait
from services.gateway.codecs.trailers import trailers
from services.gateway.reading import Holder
from services.gateway.rpc.heads import CallHead
from services.gateway.rpc.statuses import LATE

if TYPE_CHECKING:
    from services.gateway.rpc.connection import RpcConnection

#: Before every message: whether it is compressed, and its length.
PREFIX: Final = struct.Struct(">BI")
PREFIX_BYTES: Final = 5
_LONG_PIECE: Final = 4096

_NO_PREFIX: Final = trailers(Code.CODE_INTERNAL, "A message's prefix is not gRPC's.")
_CUT_OFF: Final = trailers(Code.CODE_INTERNAL, "The call ended inside of a message.")
_NOT_ENCODED: Final = trailers(Code.CODE_INTERNAL, "A message is compressed, and no grpc-encoding says how.")


@trait
class Stream:
    """A call: until `complete` its client may send, until `over` we may."""

    connection: RpcConnection
    call_head: CallHead
    stream_id: int
    #: What we may send of messages.
    window: int
    #: What the client has sent beyond the last window that it was given.
    received: int
    complete: bool
    over: bool
    #: The client gave it up, or is gone.
    gone: bool
    headers_sent: bool
    #: Seconds since it began, counted by the sweep while it is not complete.
    ticks: int
    #: What is to be sent once windows allow it, from `sent` on; then `trailers`, where it is the end.
    unsent: memoryview | None
    sent: int
    trailers: bytes
    #: Bytes of `unsent` that are counted as held, and by whom.
    answer_held: int
    answer_holder: Holder

    #: Largest message that is taken.
    max_bytes: int
    #: Of a message that is not whole: the first bytes, until its prefix is; then its pieces, how much of it
    #: is still to come, and whether it is compressed.
    _partial: bytearray | None
    _pieces: list[bytes | bytearray | memoryview]
    #: Where a long one is put together instead, and what fills it.
    _whole: bytes
    _room: memoryview | None
    _missing: int
    _compressed: int

    def open(self, connection: RpcConnection, call_head: CallHead, stream_id: int, max_bytes: int) -> None:
        """Begin. Not by class attributes, which mypyc forgets of a trait."""
        self.connection = connection
        self.call_head = call_head
        self.stream_id = stream_id
        self.max_bytes = max_bytes
        self.window = self.received = self.ticks = self.sent = self.answer_held = 0
        self.complete = self.over = self.gone = self.headers_sent = False
        self.unsent = None
        self.trailers = b""
        self._missing = self._compressed = 0
        self._drop()

    @abstractmethod
    def on_message(self, payload: bytes | bytearray, *, compressed: bool) -> None:
        """A whole message came."""

    @abstractmethod
    def on_end(self) -> None:
        """The client sends nothing more."""

    @abstractmethod
    def on_gone(self) -> None:
        """Nobody waits any more. Called once, unless the call was over."""

    @abstractmethod
    def refuse_size(self, size: int) -> None:
        """A message of `size` bytes was announced, which is too large."""

    def holder(self) -> Holder | None:
        """Whose answers wait, where that is known."""
        return None

    def drain(self) -> None:
        """The server is ending. Calls that end by themselves need not care."""

    def refuse(self, trailers: bytes) -> None:
        """End it with a status, whatever waits."""
        self.connection.refuse(self, trailers)

    def on_piece(self, size: int) -> None:
        """`size` bytes more of a message came that is not whole yet. May refuse the call."""

    def on_opened(self) -> None:
        """The head came without all that follows. May refuse the call."""

    def late(self) -> None:
        """The time for its messages is over."""
        self.refuse(LATE)

    def take(self, data: bytes, start: int, end: int) -> None:
        """Content of the stream: `data[start:end]`."""
        if self._missing:
            taken = min(end - start, self._missing)
            self._keep(data, start, start + taken)
            if self._missing:
                self.on_piece(taken)
                return
            message = self._whole if self._room is not None else b"".join(self._pieces)
            self._drop()
            self._pass_on(message, self._compressed)
            start += taken
            if self.over or start == end:
                return
        partial = self._partial
        if partial is None:
            while end - start >= PREFIX_BYTES:
                compressed, size = PREFIX.unpack_from(data, start)
                stop = start + PREFIX_BYTES + size
                if compressed > 1 or size > self.max_bytes:
                    break
                if stop > end:
                    self._missing, self._compressed = size, compressed
                    if IN_PLACE_BYTES <= size <= MOST_IN_PLACE:
                        self._whole, self._room = unwritten(size)
                    self._keep(data, start + PREFIX_BYTES, end)
                    self.on_piece(end - start)
                    return
                self._pass_on(data[start + PREFIX_BYTES : stop], compressed)
                if self.over:
                    return
                start = stop
            if start == end:
                return
            partial = self._partial = bytearray()
        partial += memoryview(data)[start:end]
        self._take_partial(partial, end - start)

    def _keep(self, data: bytes, start: int, end: int) -> None:
        """Part of a message. Of a long one it is put where it belongs. Else long pieces are copied once, when
        all are joined; short ones now, since a client that sends bytes one by one must not make an object of
        each."""
        if start == end:
            return
        room, missing = self._room, self._missing
        self._missing -= end - start
        piece = memoryview(data)[start:end]
        if room is not None:
            at = len(room) - missing
            room[at : at + end - start] = piece
            return
        if end - start >= _LONG_PIECE:
            # A view keeps all of `data`, which other calls may have most of.
            self._pieces.append(piece if 2 * (end - start) >= len(data) else bytes(piece))
            return
        last = self._pieces[-1] if self._pieces else None
        if isinstance(last, bytearray):
            last += piece
        else:
            self._pieces.append(bytearray(piece))

    def _drop(self) -> None:
        """Forget what came of a message that is not whole."""
        self._partial = None
        self._pieces = []
        self._whole, self._room = b"", None

    def _take_partial(self, partial: bytearray, added: int) -> None:
        while len(partial) >= PREFIX_BYTES:
            compressed, size = PREFIX.unpack_from(partial)
            if compressed > 1:
                self.refuse(_NO_PREFIX)
                return
            if size > self.max_bytes:
                self.refuse_size(size)
                return
            stop = PREFIX_BYTES + size
            if len(partial) < stop:
                break
            if len(partial) == stop:
                self._partial = None
                del partial[:PREFIX_BYTES]
                self._pass_on(partial, compressed)
                return
            self._pass_on(bytes(memoryview(partial)[PREFIX_BYTES:stop]), compressed)
            if self.over:
                return
            del partial[:stop]
        self.on_piece(added)

    def end(self) -> None:
        """The client's half is closed."""
        if self._partial is not None or self._missing:
            self.refuse(_CUT_OFF)
        else:
            self.on_end()

    def _pass_on(self, payload: bytes | bytearray, compressed: int) -> None:
        if compressed and self.call_head.encoding is None:
            self.refuse(_NOT_ENCODED)
        else:
            self.on_message(payload, compressed=bool(compressed))
