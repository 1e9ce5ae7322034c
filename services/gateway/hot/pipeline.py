"""Answers in the order of their requests, over one connection.

A pipeline that cannot grow while its connection is read, hot and ASGI requests mixed in it, answers in order
whoever gives them, clients that leave their answers unread, half-closed connections, and draining.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
from uvicorn.server import ServerState

from services.common.errors import HeadraceError
from services.gateway.hot.deadlines import Phase, TimedProtocol
from services.gateway.hot.exchange import HotExchange
from services.gateway.hot.front import HotFront
from services.gateway.speaking import lines_of

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_HTTP_1_0 = "1.0"


class PipelinedProtocol(TimedProtocol):
    """One connection: whose answer is next, and what comes after it."""

    def __init__(
        self,
        front: HotFront,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.front = front
        self._ticks = self._unread = 0
        self._in_head = False
        self._in_body = False
        # Nothing that arrives after the present request is looked at.
        self._last = False
        self._lingering = False
        self._advancing = False
        self._stalled = False
        self._half_closed = False
        # The parser stands where a request begins, and nothing is unanswered.
        self._at_start = False
        # Whose answer is next; mostly the one whose message is being read.
        self._running: HotExchange | RequestResponseCycle | None = None
        self._default_headers: list[tuple[bytes, bytes]] | None = None
        self._default_lines = b""

    # Transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.front.connections.discard(self)
        running, self._running = self._running, None
        if isinstance(self.cycle, HotExchange):
            self.cycle.release()
        self._drop_pipeline()
        if running is not None and not running.response_complete:
            running.disconnected = True
            if isinstance(running, HotExchange):
                running.release()
                running.service.abandon(running)
            else:
                running.message_event.set()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]  # uvicorn closes whatever runs
        """The client sends nothing more; what it has asked for is still answered."""
        if self.phase() is not Phase.BUSY:
            return False
        self.cycle.keep_alive = False
        self._half_closed = True
        self._ticks = 0
        return True

    def _ask_if_there(self) -> None:
        # From here both look the same. What is sent to one that has left is answered by a reset, on which the
        # next write fails; to one that waits an interim answer means nothing (RFC 9110, 15.2). Its answer's
        # own bytes ask as well; HTTP/1.0 knows no interim answers, and waits as long as its request may.
        running = self._running
        if running is None or self.parser.get_http_version() == _HTTP_1_0:
            return
        if isinstance(running, HotExchange) or not running.response_started:
            self.transport.write(_CONTINUE)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread = 0
        if self._stalled:
            self._stalled = False
            self._advance()

    def shutdown(self) -> None:
        """Called by uvicorn when the process ends: finish what runs or arrives, close what is idle."""
        self.front.draining = True
        if self.phase() is Phase.IDLE:
            self.transport.close()
            return
        for cycle in (self._running, self.cycle, *(queued for queued, _app in self.pipeline)):
            if cycle is not None:
                cycle.keep_alive = False

    # Turns

    def _start(self, exchange: HotExchange) -> None:
        exchange.started = True
        self._running = exchange
        if exchange.refusal is not None:
            exchange.keep_alive = False
            self._last = True
            exchange.run()
        elif exchange.complete:
            exchange.run()
        elif exchange.expects_continue:
            self._hold(exchange)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _hold(self, exchange: HotExchange | RequestResponseCycle | None) -> None:
        """Wait for the rest of a hot body, or refuse it."""
        if not isinstance(exchange, HotExchange) or exchange.refusal is not None:
            return
        try:
            exchange.hold()
        except HeadraceError as error:
            exchange.refusal = error
            exchange.drop()
        if not exchange.started:
            return
        if exchange.refusal is not None:
            self._start(exchange)
        elif exchange.expects_continue and not exchange.continued:
            exchange.continued = True
            self.transport.write(_CONTINUE)

    def _advance(self) -> None:
        """Start what waits, unless the client leaves its answers unread. Answers given at once must not
        recurse."""
        if self._advancing:
            return
        self._advancing = True
        try:
            while self._running is None or self._running.response_complete:
                if self.flow.write_paused:
                    self._stalled = True
                    self.flow.pause_reading()
                    return
                if self._last and not self.pipeline:
                    return
                if not self.pipeline:
                    self.flow.resume_reading()
                    return
                cycle, app = self.pipeline.pop()
                if not isinstance(cycle, HotExchange):
                    self._start_asgi_task(cycle, app)
                    return
                self._start(cycle)
                if not self.pipeline or not cycle.complete:
                    self.flow.resume_reading()  # for the rest of it, or to notice that the client left
        finally:
            self._advancing = False

    def _forget(self, cycle: RequestResponseCycle) -> None:
        """Tell an ASGI application that its request broke off; whatever it answers is dropped."""
        if cycle.response_started:
            self.transport.close()
        cycle.disconnected = True
        cycle.message_event.set()
        if cycle is self._running:
            self._running = None
        self.pipeline = type(self.pipeline)(pair for pair in self.pipeline if pair[0] is not cycle)

    def _drop_pipeline(self) -> None:
        for cycle, _app in self.pipeline:
            if isinstance(cycle, HotExchange):
                cycle.release()
        self.pipeline.clear()

    # Answers

    def default_lines(self) -> bytes:
        """Headers that uvicorn puts on every answer (Date, renewed every second)."""
        headers = self.server_state.default_headers
        if headers is not self._default_headers:
            self._default_headers = headers
            self._default_lines = lines_of(headers)
        return self._default_lines

    def answered(self, exchange: HotExchange, *, keep_alive: bool) -> None:
        """`exchange` was written; go on with what waits behind it."""
        self.server_state.total_requests += 1
        self._running = None
        self._ticks = 0
        if keep_alive:
            flow = self.flow
            if self.pipeline or flow.read_paused or flow.write_paused:
                self._advance()
            elif not (self._in_head or self._in_body or self._last):
                self._at_start = self.front.hot
            return
        self._last = True
        self._drop_pipeline()
        if exchange.complete or (exchange.expects_continue and not exchange.continued):
            self.transport.close()
        else:
            # Closing with unread bytes would reset the connection before the client has read why.
            self._lingering = True
            self.flow.resume_reading()

    def on_response_complete(self) -> None:
        """An ASGI request was answered."""
        self.server_state.total_requests += 1
        self._running = None
        self._ticks = 0
        if not self.transport.is_closing():
            self._advance()
