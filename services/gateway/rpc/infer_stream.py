"""ModelStreamInfer: many requests on one stream, each a hot call like ModelInfer's.

Several are under way at once, so that batches can be made of them, and they are answered in the order in
which they came: so do other servers, and clients that give their requests no ids count on it. What one comes
to is no matter of the stream, which goes on. A stream has so many requests under way and so many answers that
its client has not read; while it has, its client may send a window more, which waits as it came.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final

from headrace.v1.tensor_pb2 import Code

from services.common.errors import BodyTooLarge, DeadlineExceeded, HeadraceError
from services.gateway.call import Call, Head, Speaker
from services.gateway.codecs.streamed import id_in, streamed, streamed_error
from services.gateway.codecs.trailers import trailers
from services.gateway.predict import PredictService
from services.gateway.reading import Holder
from services.gateway.rpc.heads import CallHead
from services.gateway.rpc.statuses import GOING_AWAY, LATE, OK
from services.gateway.rpc.streams import Stream
from services.gateway.targets import Dialect

if TYPE_CHECKING:
    from services.gateway.rpc.connection import RpcConnection

_BUSY: Final = trailers(Code.CODE_RESOURCE_EXHAUSTED, "Too many streams at once.")
_GOOD: Final = 200
#: What a message that waits costs beside its bytes.
_OVERHEAD: Final = 100
#: So much of what waits is looked at at a time.
_PIECE: Final = 4096
#: As a timeout that is over before it begins: 0 stands for none.
_NOW: Final = 1e-9


class InferStreams:
    """How many there are, of all connections."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.open = 0


class StreamRequest(Call):
    """One request of a stream."""

    def __init__(self, stream: InferStream, head: Head, speaker: Speaker) -> None:
        # As in Call, without the call.
        self.service = stream.service
        self.head = head
        self.speaker = speaker
        self.stream = stream
        #: What answers it, once that is known and cannot be sent yet.
        self.said: bytes | None = None
        #: What it counts for: bytes of the stream, bytes of the process, and a thread's work.
        self.size = self.held = 0
        self.large = False

    @property
    def span_name(self) -> str:
        return "ModelStreamInfer"

    def answer(self, status: int, headers: bytes, body: bytes) -> None:
        """`body` is the message of a good answer; of another its words or, where the stream ends with it,
        trailers."""
        self.stream.on_answer(self, status, body)


class StreamOpening(Call):
    """Stands for a stream as a whole where this is refused."""

    def __init__(self, stream: InferStream, head: Head) -> None:
        self.service = stream.service
        self.head = head
        self.speaker = stream.service.speakers[Dialect.GRPC]
        self.stream = stream

    def answer(self, status: int, headers: bytes, body: bytes) -> None:
        """`body` is trailers."""
        self.stream.refuse(body)


class InferStream(Stream):
    """One such call. It begins requests as long as there is room for them, and ends when its client's half is
    closed and all is answered."""

    def __init__(
        self,
        service: PredictService,
        streams: InferStreams,
        connection: RpcConnection,
        call_head: CallHead,
        head: Head,
        stream_id: int,
    ) -> None:
        self.open(connection, call_head, stream_id, connection.limits.max_message_bytes)
        self.service = service
        self._streams = streams
        self._head = head
        dialect = Dialect.GRPC if call_head.error_ends else Dialect.GRPC_STREAM
        self._speaker: Speaker = service.speakers[dialect]
        self._holder = service.bodies.strangers  # until it is known who calls
        self._loop = asyncio.get_running_loop()
        self._ends = 0.0  # by the loop's clock; 0: whenever its client likes
        self._timer: asyncio.TimerHandle | None = None
        self._opened = self._counted = self._going_on = False
        #: Something waits: its client is not asked for more.
        self.full = False
        # In order: requests whose answers are not sent yet; behind them messages that wait, with what of them
        # is counted as held; behind these bytes as they came.
        self._requests: deque[StreamRequest] = deque()
        self._waiting: deque[tuple[bytes | bytearray, bool, int]] = deque()
        self._backlog = bytearray()
        self._bytes = self._large = self._begun = 0
        self._piece_held = 0  # of a message that is not whole
        # The client's half is closed, and all that came before that was looked at.
        self._closing = self._closed = False
        # Nothing more is listened to; something was said nevertheless; nor is what came heard. What it then
        # ends with.
        self._deaf = self._missed = self._failed = False
        self._end_with = b""

    # What the client does.

    def on_opened(self) -> None:
        if self._opened:
            return
        self._opened = True
        if self._streams.open >= self._streams.most:
            self.refuse(_BUSY)
            return
        try:
            self._holder = self.service.admit(StreamOpening(self, self._head)).holder
        except HeadraceError as error:
            self._fail(error)
            return
        self._counted = True
        self._streams.open += 1
        timeout_s = self.call_head.timeout_s
        if timeout_s:
            self._ends = self._loop.time() + timeout_s
            self._timer = self._loop.call_later(timeout_s, self.refuse, LATE)

    def take(self, data: bytes, start: int, end: int) -> None:
        if self._deaf:
            self._missed = True
        elif not self.full:
            super().take(data, start, end)
        elif self._hold(end - start):
            self._backlog += memoryview(data)[start:end]

    def on_message(self, payload: bytes | bytearray, *, compressed: bool) -> None:
        self.ticks = 0
        held, self._piece_held = self._piece_held, 0
        self.on_opened()
        if self.over or self._failed:
            self.service.bodies.give(held, self._holder)
        elif not self.full and self._has_room():
            self._begin(payload, compressed, held)
        else:
            if not held:
                held = len(payload) + _OVERHEAD
                if not self._hold(held):
                    return
            self._waiting.append((payload, compressed, held))
            self.full = True

    def on_piece(self, size: int) -> None:
        self.on_opened()
        if not self.over and self._hold(size):
            self._piece_held += size

    def refuse_size(self, size: int) -> None:
        self.on_opened()
        if not self.over:
            limit = self.service.limits.max_body_bytes
            self._fail(BodyTooLarge(f"The message has {size} bytes; {limit} are taken."))

    def end(self) -> None:
        if self._deaf:
            if self._end_with is GOING_AWAY and not self._missed:
                self._end_with = OK  # all that it said was heard
            self._finish()
        elif self._backlog:
            self._closing = True
        else:
            super().end()

    def on_end(self) -> None:
        self.on_opened()
        self._closed = True
        self._finish()

    def holder(self) -> Holder | None:
        return self._holder

    def on_gone(self) -> None:
        self._close()

    def on_sent(self) -> None:
        """A message has left."""
        self._flush()
        self._go_on()

    def on_tick(self, patience: int) -> None:
        """A second has passed. The client has `patience` seconds for a message that it has begun."""
        if self._deaf or self.full or (self._partial is None and not self._missing):
            self.ticks = 0
            return
        self.ticks += 1
        if self.ticks > patience:
            self._fail(DeadlineExceeded("The message did not arrive in time."))

    # What becomes of its requests.

    def on_answer(self, request: StreamRequest, status: int, body: bytes) -> None:
        """`request` is answered."""
        self._release(request)
        if self.over or self.gone:
            return
        if status == _GOOD:
            request.said = streamed(body)
        elif self.call_head.error_ends:
            self._end_at(request, body)
        else:
            asked_id = request.asked_id or id_in(request.body) or request.request_id.hex().encode()
            request.said = streamed_error(body, asked_id)
        if request.said is not None and (self._requests[0] is not request or self.unsent is not None):
            size = len(request.said)
            if not self._hold(size):
                return
            request.size = request.held = size
            self._bytes += size
            # It may wait for long, and counts for no more than its answer.
            request.body, request.payload, request.tensors = b"", b"", None
        self._flush()
        self._go_on()

    def _end_at(self, request: StreamRequest, trailers: bytes) -> None:
        """The last of which anything is said is the one before `request`."""
        self._deaf = self._failed = True
        self._end_with = trailers
        while (last := self._requests.pop()) is not request:
            self._give_up(last)
        self._drop_waiting()

    def _begin(self, payload: bytes | bytearray, compressed: bool, held: int) -> None:
        head, limits = self._head, self.service.limits
        if compressed or self._ends:
            head = head.copy()
            if compressed:
                head.content_encoding = self.call_head.encoding
            if self._ends:
                head.timeout_s = max(self._ends - self._loop.time(), _NOW)
        request = StreamRequest(self, head, self._speaker)
        size = len(payload)
        small = size <= limits.inline_bytes
        request.body = bytes(payload) if small and type(payload) is bytearray else payload
        request.size, request.held = size, held
        self._bytes += size
        if compressed or not small:
            request.large = True
            self._large += 1
        if not self._begun:
            self._loop.call_soon(self._next_turn)
        self._begun += 1
        self._requests.append(request)
        self.service.begin(request)

    def _has_room(self) -> bool:
        most = self.connection.limits
        few = len(self._requests) < most.max_stream_requests and self._begun < most.max_stream_begun
        return few and self._bytes < most.max_stream_bytes and self._large < most.max_stream_large

    def _next_turn(self) -> None:
        self._begun = 0
        self._go_on()

    def _go_on(self) -> None:
        """Begin what waits, as far as there is room. What is begun may be answered at once, and so come here
        again: then the first one goes on."""
        if self._going_on or not self.full:
            return
        self._going_on = True
        try:
            while not self.over and not self.gone:
                if self._waiting:
                    if not self._has_room():
                        return
                    self._begin(*self._waiting.popleft())
                elif self._backlog:
                    piece = bytes(memoryview(self._backlog)[:_PIECE])
                    del self._backlog[:_PIECE]
                    self.service.bodies.give(len(piece), self._holder)
                    self.full = False  # or the piece would be put behind itself
                    super().take(piece, 0, len(piece))
                    self.full = True
                else:
                    break
        finally:
            self._going_on = False
        if self.over or self.gone:
            return
        self.full = False
        if self._closing:
            self._closing = False
            self.end()
        else:
            self.connection.read_on(self)
            self._finish()

    def _flush(self) -> None:
        """Send the answers whose turn it is, one after the other."""
        requests = self._requests
        while requests and self.unsent is None and not self.over and not self.gone:
            said = requests[0].said
            if said is None:
                return
            self._release(requests.popleft())
            self.connection.send(self, said)
        if self.over:  # more waits for clients than the process holds
            self._close()
        else:
            self._finish()

    # How it ends.

    def drain(self) -> None:
        """What came is answered, and the client told to go elsewhere with what is to come."""
        if not self.complete and not self._deaf:
            self._deaf, self._end_with = True, GOING_AWAY
            self._finish()

    def refuse(self, trailers: bytes) -> None:
        self._close()
        super().refuse(trailers)

    def _fail(self, error: HeadraceError) -> None:
        """End it, whatever is under way."""
        self.service.refuse(StreamOpening(self, self._head), error)

    def _finish(self) -> None:
        """End it, if all is done."""
        if self.over or self.gone or self._going_on or self._requests or self.full or self.unsent is not None:
            return
        trailers = self._end_with or (OK if self._closed else b"")
        if trailers:
            self._close()
            self.connection.finish(self, trailers)

    def _close(self) -> None:
        """Give everything up. Whoever calls has ended it, or does so next."""
        if self._counted:
            self._counted = False
            self._streams.open -= 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._deaf = True
        requests, self._requests = self._requests, deque()
        for request in requests:
            self._give_up(request)
        self._drop_waiting()

    def _give_up(self, request: StreamRequest) -> None:
        self._release(request)
        if request.said is None:
            self.service.abandon(request)

    def _drop_waiting(self) -> None:
        held = self._piece_held + len(self._backlog) + sum(held for _, _, held in self._waiting)
        self.service.bodies.give(held, self._holder)
        self._piece_held = 0
        self._backlog.clear()
        self._waiting.clear()
        self.full = False
        self._drop()

    def _hold(self, size: int) -> bool:
        """Count bytes of the process; False where these are too many, which ends the stream."""
        try:
            self.service.bodies.take(size, self._holder)
        except HeadraceError as error:
            self._fail(error)
            return False
        return True

    def _release(self, request: StreamRequest) -> None:
        """It counts for nothing any more."""
        self._bytes -= request.size
        self._large -= request.large
        if request.held:
            self.service.bodies.give(request.held, self._holder)
        request.size = request.held = 0
        request.large = False
