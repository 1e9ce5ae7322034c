"""Every call that is not hot: a task each, running a servicer written for grpcio's asyncio server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final, NoReturn

import grpc
from headrace.v1.tensor_pb2 import Code

from services.common.errors import HeadraceError
from services.gateway.codecs.trailers import trailers
from services.gateway.compression import decompressed
from services.gateway.keys import Key
from services.gateway.reading import Holder
from services.gateway.rpc.heads import CallHead
from services.gateway.rpc.limits import RpcLimits
from services.gateway.rpc.methods import Method
from services.gateway.rpc.statuses import LATE
from services.gateway.rpc.streams import Stream

if TYPE_CHECKING:
    from services.gateway.rpc.connection import RpcConnection

log = logging.getLogger(__name__)

#: Messages of a client that wait for the method to ask for them.
_WAITING: Final = 16
_BUSY: Final = trailers(Code.CODE_RESOURCE_EXHAUSTED, "Too many calls at once.")
_TOO_LARGE: Final = trailers(Code.CODE_RESOURCE_EXHAUSTED, "The message is larger than this method takes.")
_TOO_FAST: Final = trailers(Code.CODE_RESOURCE_EXHAUSTED, "More messages than are read.")
_ONE_MESSAGE: Final = trailers(Code.CODE_INTERNAL, "A unary call has exactly one message.")
_UNREADABLE: Final = trailers(Code.CODE_INTERNAL, "The message cannot be read.")
_CRASHED: Final = trailers(Code.CODE_INTERNAL, "The gateway failed to handle this request.")


class CallAborted(Exception):
    """A servicer ended its call by `abort`."""

    def __init__(self, trailers: bytes) -> None:
        super().__init__("the call was aborted")
        self.trailers = trailers


class RpcContext:
    """What of grpcio's ServicerContext the servicers use."""

    def __init__(self, call: TaskCall) -> None:
        self._call = call

    def invocation_metadata(self) -> list[tuple[str, bytes]]:
        """Names and values, these as they came."""
        return [(name.decode("latin-1"), value) for name, value in self._call.call_head.metadata]

    async def write(self, message: Any) -> None:
        """Send `message`, once what was sent before has left."""
        await self._call.write(message)

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Iterable[tuple[str, str]] = ()
    ) -> NoReturn:
        """End the call with a status."""
        raise CallAborted(trailers(code.value[0], details, trailing_metadata))


class Tasks:
    """The tasks of all connections: bounded, and ended with the server."""

    def __init__(self, limits: RpcLimits) -> None:
        self._limits = limits
        self._running: set[asyncio.Task[None]] = set()
        self.calls = 0
        self.streaming = 0

    def start(self, call: TaskCall) -> asyncio.Task[None]:
        """Run `call`."""
        task = asyncio.create_task(call.run(), name=f"grpc {call.method.path}")
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    def room(self, method: Method) -> bool:
        """Whether one more call of `method` may be open."""
        if method.streams:
            return self.streaming < self._limits.max_streaming_tasks
        return self.calls < self._limits.max_tasks

    def count(self, method: Method, change: int) -> None:
        """Calls are opened and closed."""
        if method.streams:
            self.streaming += change
        else:
            self.calls += change

    async def close(self) -> None:
        """End what runs."""
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(set(self._running), timeout=1.0)


class _Messages:
    """What a client sends, until None stands in the queue: it sends nothing more."""

    def __init__(self, came: asyncio.Queue[Any]) -> None:
        self._came = came

    def __aiter__(self) -> _Messages:
        return self

    async def __anext__(self) -> Any:
        message = await self._came.get()
        if message is None:
            raise StopAsyncIteration
        return message


class TaskCall(Stream):
    """One such call."""

    def __init__(
        self, tasks: Tasks, connection: RpcConnection, call_head: CallHead, method: Method, stream_id: int
    ) -> None:
        self.open(connection, call_head, stream_id, connection.limits.max_small_bytes)
        self.method = method
        self._tasks = tasks
        self._task: asyncio.Task[None] | None = None
        self._came: asyncio.Queue[Any] = asyncio.Queue(_WAITING)
        self._left = asyncio.Event()
        self._left.set()
        self._counted = False
        self._looked = False
        self._key: Key | None = None

    # The stream's part.

    def on_opened(self) -> None:
        if not self._looked:
            self._looked = True
            self._begin()

    def _begin(self) -> None:
        """Refuse it, or start it where it does not wait for its one message."""
        door = self.method.door
        if door is not None:
            try:
                self._key = door(self.call_head.metadata)
            except HeadraceError as error:
                self.refuse(trailers(error.code, error.message))
                return
        if self.method.handler.request_streaming:
            self._start()

    def _start(self) -> None:
        """Only what runs counts, or callers without a key could take the room of others by saying nothing."""
        if not self._tasks.room(self.method):
            self.refuse(_BUSY)
            return
        self._counted = True
        self._tasks.count(self.method, 1)
        self._task = self._tasks.start(self)

    def on_message(self, payload: bytes | bytearray, *, compressed: bool) -> None:
        self.on_opened()
        if self.over:
            return
        try:
            if compressed:
                payload = decompressed(payload, self.call_head.encoding or b"", self.max_bytes)
            message = self.method.handler.request_deserializer(bytes(payload))
        except Exception:  # whatever the deserializer makes of bytes that are no message
            self.refuse(_UNREADABLE)
            return
        if not self.method.handler.request_streaming and not self._came.empty():
            self.refuse(_ONE_MESSAGE)
        elif self._came.full():
            self.refuse(_TOO_FAST)
        else:
            self._came.put_nowait(message)

    def on_piece(self, size: int) -> None:
        self.on_opened()

    def on_end(self) -> None:
        self.on_opened()
        if self.over:
            return
        if self.method.handler.request_streaming:
            if self._came.full():
                self.refuse(_TOO_FAST)
            else:
                self._came.put_nowait(None)
        elif self._came.empty():
            self.refuse(_ONE_MESSAGE)
        else:
            self._start()

    def holder(self) -> Holder | None:
        return self._key.holder if self._key is not None else None

    def on_gone(self) -> None:
        self._close()

    def refuse_size(self, size: int) -> None:
        self.refuse(_TOO_LARGE)

    def late(self) -> None:
        self.refuse(LATE)

    def on_sent(self) -> None:
        """A message has left."""
        self._left.set()

    def refuse(self, trailers: bytes) -> None:
        super().refuse(trailers)
        self._close()

    def _close(self) -> None:
        if self._counted:
            self._counted = False
            self._tasks.count(self.method, -1)
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()

    # The task's part.

    async def run(self) -> None:
        """Call the method, and end the call with what comes of it."""
        try:
            async with asyncio.timeout(self.call_head.timeout_s or None):
                await self._called()
                await self._left.wait()
            self.connection.finish(self)
        except CallAborted as aborted:
            self.refuse(aborted.trailers)
        except TimeoutError:
            self.refuse(LATE)
        except Exception:
            log.exception("gRPC method %s failed", self.method.path)
            self.refuse(_CRASHED)
        finally:
            self._close()

    async def _called(self) -> None:
        handler, context = self.method.handler, RpcContext(self)
        asked: Any = _Messages(self._came) if handler.request_streaming else self._came.get_nowait()
        if not handler.response_streaming:
            answers = handler.stream_unary if handler.request_streaming else handler.unary_unary
            await self.write(await answers(asked, context))
            return
        answers = handler.stream_stream if handler.request_streaming else handler.unary_stream
        answered = answers(asked, context)
        if hasattr(answered, "__aiter__"):
            async for message in answered:
                await self.write(message)
        else:
            await answered  # it writes by its context

    async def write(self, message: Any) -> None:
        """Send one message, once the one before has left."""
        await self._left.wait()
        self._left.clear()
        self.connection.send(self, self.method.handler.response_serializer(message))
        if self.over or self.gone:  # what waits for clients is too much already
            raise CallAborted(_BUSY)
