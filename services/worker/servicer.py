"""Requests as they arrive, from the frame stream or one at a time, to the versions that answer them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest, RequestFrame
from headrace.v1.tensor_pb2 import Code

from services.common.clock import Clock
from services.common.errors import HeadraceError, InvalidArgument, ResourceExhausted, Unavailable
from services.common.shared_memory import in_shared_memory
from services.worker.input_layout import InputLayout
from services.worker.item import Answer, Item
from services.worker.replies import error_reply
from services.worker.serving import Log
from services.worker.shared_inputs import SharedInputs

#: By a request's position, the data of its inputs where it came apart from them.
Contents = dict[int, list[memoryview | None]]
Settle = Callable[[PredictRequest, Answer], None]


class Version(Protocol):
    """A version that takes requests: `LoadedModel`, or `Parked` until it is loaded again."""

    layout: InputLayout

    @property
    def timeout(self) -> float:
        """Seconds that a request has whose caller set no deadline."""
        ...

    def submit(self, items: Sequence[Item]) -> None:
        """Queue requests that arrived together; each is settled exactly once."""
        ...

    def cancel(self, item: Item) -> None:
        """Nobody waits for `item` any more."""
        ...


class Versions(Protocol):
    """What is loaded."""

    def find(self, model: str, version: str) -> Version | None:
        """The version, if it can answer now or when it has been loaded again."""
        ...


class Servicer:
    """Hands requests to the versions that they name."""

    def __init__(self, host: Versions, log: Log, clock: Clock, shared: SharedInputs | None = None) -> None:
        """Without `shared`, nobody's shared memory is read."""
        self._shared = shared or SharedInputs(allowed=False)
        self._host = host
        self._log = log
        self._clock = clock
        #: Set once the worker takes nothing more.
        self.closed = False
        self.refused: dict[str, int] = {}
        # Who sends inputs that way sends all of them so.
        self._shared_lately = False

    def accept(
        self,
        requests: Sequence[PredictRequest],
        settle: Settle,
        waiting: dict[int, tuple[Version, Item]],
        contents: Contents,
    ) -> None:
        """Queue `requests`, which arrived together; `settle` is called once for each, now or later. Those
        that can be queued are put into `waiting`, by their ids, before any of them is settled. `contents` is
        the data of large inputs, as `Peer.contents`.

        A version that is not loaded is UNAVAILABLE, so that the router tries another endpoint; a request that
        its version cannot take is INVALID_ARGUMENT with the field."""
        now = self._clock.monotonic()
        groups: dict[Version, list[Item]] = {}
        group: list[Item] = []
        closed = self._closed()
        model = version = ""
        loaded: Version | None = None
        for position, request in enumerate(requests):
            if request.model != model or request.version != version:
                model, version = request.model, request.version
                loaded = self._host.find(model, version)
                if loaded is not None:
                    group = groups.setdefault(loaded, [])
            try:
                if closed is not None:
                    raise closed
                if loaded is None:
                    raise self._not_here(request)
                apart = contents.get(position) if contents else None
                if self._shared_lately:
                    self._shared_lately = in_shared_memory(request)
                if self._shared_lately:
                    rows, key, data = loaded.layout.take(request, self._shared.read(request, apart))
                else:
                    try:
                        rows, key, data = loaded.layout.take(request, apart)
                    except InvalidArgument:
                        # Asked only now: who sends data with the request pays nothing for those who do not.
                        if not in_shared_memory(request):
                            raise
                        self._shared_lately = True
                        rows, key, data = loaded.layout.take(request, self._shared.read(request, apart))
            except HeadraceError as error:
                self._count(error)
                settle(request, error)
                continue
            timeout = request.timeout_us
            deadline = now + (timeout / 1e6 if timeout else loaded.timeout)
            item = Item(request, rows, key, data, deadline, settle)
            group.append(item)
            waiting[item.id] = loaded, item
        for loaded, items in groups.items():
            loaded.submit(items)

    def _closed(self) -> HeadraceError | None:
        if self.closed:
            return Unavailable("the worker is leaving")
        if not self._log.usable:
            # Refused before running: what cannot be logged is not computed either.
            return ResourceExhausted("the prediction log takes nothing more", retry_after_ms=1000)
        return None

    def _not_here(self, request: PredictRequest) -> HeadraceError:
        # Never NOT_FOUND: the router decides what exists. A worker that just started has not read the
        # deployments yet, and its router may still remember what the process before it had loaded.
        return Unavailable(f"{request.model} version {request.version} is not loaded here", field="version")

    def _count(self, error: HeadraceError) -> None:
        name = Code.Name(error.code)
        self.refused[name] = self.refused.get(name, 0) + 1


class Acceptor(Protocol):
    """The part of `Servicer` that a stream uses."""

    def accept(
        self,
        requests: Sequence[PredictRequest],
        settle: Settle,
        waiting: dict[int, tuple[Version, Item]],
        contents: Contents,
    ) -> None: ...


class Outlet(Protocol):
    """The part of a `Peer` that a stream uses."""

    @property
    def contents(self) -> Contents: ...

    def reply(self, reply: PredictReply) -> None: ...

    def reply_raw(self, item_id: int, payload: bytes) -> None: ...


class FrameConnection:
    """One router's stream."""

    def __init__(self, servicer: Acceptor, peer: Outlet) -> None:
        self._servicer = servicer
        self._peer = peer
        self._waiting: dict[int, tuple[Version, Item]] = {}

    def on_request_frame(self, frame: RequestFrame) -> None:
        """Take out the requests that nobody waits for, and queue the frame's at once."""
        # Cancels are of what came before the frame, an id that it brings again included.
        for identifier in frame.cancels:
            cancelled = self._waiting.pop(identifier, None)
            if cancelled is not None:
                cancelled[0].cancel(cancelled[1])
        self._servicer.accept(frame.items[:], self._settle, self._waiting, self._peer.contents)

    def on_closed(self) -> None:
        """The router has gone: nobody waits for its requests any more."""
        waiting, self._waiting = self._waiting, {}
        for loaded, item in waiting.values():
            loaded.cancel(item)

    def _settle(self, request: PredictRequest, answer: Answer) -> None:
        identifier = request.id
        if identifier in self._waiting:
            del self._waiting[identifier]
        if isinstance(answer, bytes):
            self._peer.reply_raw(identifier, answer)
        else:
            self._peer.reply(error_reply(request, answer))
