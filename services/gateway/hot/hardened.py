"""uvicorn's httptools protocol, hardened.

What is added: deadlines for heads, bodies, unread answers and silence, bounds for heads, exactly one Host, no
fields from trailers, a pipeline that cannot grow while its connection is read, answers in order also when the
bytes after them are no HTTP, refused bodies read for a while so that their senders see why, and draining.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
from uvicorn.server import ServerState

from services.common.errors import BodyTooLarge, HeadraceError, MalformedBody, Unavailable
from services.gateway.call import Head
from services.gateway.errors import HeadTooLarge
from services.gateway.hot.deadlines import Phase, TimedProtocol
from services.gateway.hot.exchange import HotExchange, no_app, refused
from services.gateway.hot.front import HotFront
from services.gateway.targets import Dialect, Target

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_RETRY_MS = 1000
_ANY = Target(Dialect.NATIVE)


class HardenedProtocol(TimedProtocol):
    """One connection, whatever is asked over it."""

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
        self._max_body = front.service.limits.max_body_bytes
        self._ticks = 0
        self._in_head = False
        self._in_body = False
        self._head_bytes = 0
        # Nothing that arrives after the present request is looked at.
        self._last = False
        self._lingering = False
        self._upgrade_ignored = False
        self._advancing = False
        self._stalled = False
        self._crowded = False
        self._half_closed = False
        # The parser stands where a request begins, and nothing is unanswered.
        self._at_start = False
        # Whose answer is next, and whose message is being read; the same most of the time.
        self._running: HotExchange | RequestResponseCycle | None = None
        self._reading: HotExchange | RequestResponseCycle | None = None
        self._default_headers: list[tuple[bytes, bytes]] | None = None
        self._default_lines = b""

    # Transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        connections = self.front.connections
        connections.add(self)
        excess = len(connections) - self.front.limits.max_connections
        if excess > 0:
            self._crowded = True
            if excess > self.front.limits.max_connections // 10:
                transport.abort()
        self._at_start = self.front.hot and not self._crowded

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

    def data_received(self, data: bytes) -> None:
        if self._at_start:
            self._at_start = False
            known = self.front.heads.find(data)
            if known is None:
                self._read(data)
                self._remember(data)
                return
            head, start = known
            exchange = HotExchange(self.front.service, head, self)
            exchange.body = data[start:]
            exchange.complete = exchange.started = True
            self._running = exchange
            self.cycle = exchange  # type: ignore[assignment]  # has what uvicorn uses of a cycle
            self._ticks = 0
            exchange.service.begin(exchange)
        else:
            self._read(data)

    def _remember(self, data: bytes) -> None:
        """`data` began a request. Where it was one hot request that went on its way, know its head."""
        exchange = self.cycle
        if (
            isinstance(exchange, HotExchange)
            and exchange.complete
            and exchange.channel is not None
            and exchange.keep_alive
            and not exchange.expects_continue
            and not self._in_head
            and not self._in_body
        ):
            self.front.heads.learn(data, exchange.head)

    def _read(self, data: bytes) -> None:
        """Let the parser read."""
        if self._last:
            if self._lingering and not self._in_body:
                self.transport.close()
            elif self._lingering:
                self._discard(data)
            return
        unfinished = self.headers if self._in_head else None
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as stopped:
            if self._upgrade_ignored:
                self._read_on(data[stopped.args[0] :])
            elif not self._last:
                self.front.connections.discard(self)
                self.handle_websocket_upgrade()
        except httptools.HttpParserError:
            self._refuse_rest(MalformedBody("These bytes are not a request as RFC 9112 has it."))
        else:
            if self._in_head and self.headers is unfinished:  # all of `data` was head
                self._head_bytes += len(data)
                if self._head_bytes > self.front.limits.max_head_bytes:
                    self._refuse_rest(HeadTooLarge("The request's headers are too long."))
            elif self._in_body:
                self._hold(self._reading)

    def eof_received(self) -> bool:  # type: ignore[override]  # uvicorn closes whatever runs
        """The client sends nothing more; what it has asked for is still answered."""
        if self.phase() is not Phase.BUSY:
            return False
        self.cycle.keep_alive = False
        self._half_closed = True
        self._ticks = 0
        return True

    def resume_writing(self) -> None:
        super().resume_writing()
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

    # Parser

    def on_message_begin(self) -> None:
        self.url = b""
        self.headers = []
        self._at_start = False
        self._in_head = True
        self._reading = None
        self._head_bytes = 0
        self._ticks = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        # Trailers come this way too, after the head; none of them is a header (RFC 9110, 6.5.1).
        if self._in_head:
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._in_body = True
        self._ticks = 0
        if self._last:
            return
        if self._crowded:
            self._refuse_rest(Unavailable("There are too many connections.", retry_after_ms=_RETRY_MS))
            return
        if len(self.headers) > self.front.limits.max_headers:
            self._refuse_rest(HeadTooLarge("The request has too many headers."))
            return
        if self.parser.should_upgrade():
            self._decide_upgrade()
            return
        self._begin()

    def on_body(self, body: bytes) -> None:
        if self._upgrade_ignored:
            return
        cycle = self.cycle
        if not isinstance(cycle, HotExchange):
            self._ticks = 0
            if not self._last:
                super().on_body(body)
        elif cycle.refusal is None and not cycle.response_complete and not cycle.take(body, self._max_body):
            self._too_large(cycle)

    def on_message_complete(self) -> None:
        if self._upgrade_ignored:
            return
        self._in_body = False
        self._reading = None
        self._ticks = 0
        cycle = self.cycle
        if not isinstance(cycle, HotExchange):
            if not self._last:
                super().on_message_complete()
            return
        cycle.complete = True
        if self._lingering:
            self.transport.close()
        elif cycle.started and not cycle.response_complete:
            cycle.run()

    # Requests

    def _begin(self) -> None:
        """The headers of a request are complete."""
        self._begin_asgi()

    def _begin_asgi(self) -> None:
        url, headers = self.url, self.headers
        super().on_message_begin()
        self.url = url
        hosts = 0
        for name, value in headers:
            super().on_header(name, value)
            hosts += name.lower() == b"host"
        if hosts > 1 or (hosts == 0 and self.parser.get_http_version() == "1.1"):
            self._refuse_rest(MalformedBody("A request has exactly one Host header."))
            return
        previous = self.cycle
        super().on_headers_complete()
        if self.cycle is not previous:  # uvicorn makes none for a WebSocket
            self._reading = self.cycle
            if self.front.draining:
                self.cycle.keep_alive = False

    def _decide_upgrade(self) -> None:
        """WebSocket is uvicorn's; any other protocol is not offered, and the request is read as if it had not
        asked (RFC 9110, 7.8: curl --http2 asks on every first request)."""
        self.headers = [(name.lower(), value) for name, value in self.headers]
        if self.parser.get_method() == b"CONNECT":
            self._refuse_rest(MalformedBody("This is no proxy."))
        elif self._should_upgrade():
            self._begin_asgi()
        else:
            self._upgrade_ignored = True

    def _read_on(self, rest: bytes) -> None:
        """Read the request again without its wish; the parser stops for good where it saw one."""
        head = [self.parser.get_method() + b" " + self.url + b" HTTP/1.1"]
        head += [
            name + b": " + value for name, value in self.headers if name not in (b"upgrade", b"connection")
        ]
        self._upgrade_ignored = False
        self.parser = httptools.HttpRequestParser(self)
        self._read(b"\r\n".join(head) + b"\r\n\r\n" + rest)

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

    def _too_large(self, exchange: HotExchange) -> None:
        exchange.refusal = self._body_too_large()
        exchange.drop()
        if exchange.started:
            self._start(exchange)

    def _body_too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"The body is longer than {self._max_body} bytes.")

    def _refuse_rest(self, error: HeadraceError) -> None:
        """Answer `error` once everything before it is answered, and take nothing more."""
        if self._last:
            return
        self._last = True
        broken: Any = self._reading
        self._in_head = self._in_body = False
        self._reading = None
        if isinstance(broken, HotExchange):  # the message that broke off gets the answer itself
            if broken.response_complete:
                self.transport.close()
            elif refused(broken, error).started:
                self._start(broken)
            return
        exchange = refused(HotExchange(self.front.service, Head(_ANY), self), error)
        if broken is not None:
            self._forget(broken)
        previous = self.cycle
        self.cycle = exchange  # type: ignore[assignment]  # as in _begin_hot
        if previous is None or previous.response_complete or (previous is broken and self._running is None):
            self._start(exchange)
        else:
            self.pipeline.appendleft((exchange, no_app))  # type: ignore[arg-type]  # as in _begin_hot

    def _forget(self, cycle: RequestResponseCycle) -> None:
        """Tell an ASGI application that its request broke off; whatever it answers is dropped."""
        if cycle.response_started:
            self.transport.close()
        cycle.disconnected = True
        cycle.message_event.set()
        if cycle is self._running:
            self._running = None
        self.pipeline = type(self.pipeline)(pair for pair in self.pipeline if pair[0] is not cycle)

    # Answers

    def default_lines(self) -> bytes:
        """Headers that uvicorn puts on every answer (Date, renewed every second)."""
        headers = self.server_state.default_headers
        if headers is not self._default_headers:
            self._default_headers = headers
            self._default_lines = b"".join([b"%s: %s\r\n" % pair for pair in headers])
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
        if exchange.complete or exchange.expects_continue:
            self.transport.close()
        else:
            # Closing with unread bytes would reset the connection before the client has read why.
            self._lingering = True
            self.flow.resume_reading()

    def _drop_pipeline(self) -> None:
        for cycle, _app in self.pipeline:
            if isinstance(cycle, HotExchange):
                cycle.release()
        self.pipeline.clear()

    def on_response_complete(self) -> None:
        """An ASGI request was answered."""
        self.server_state.total_requests += 1
        self._running = None
        self._ticks = 0
        if not self.transport.is_closing():
            self._advance()

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

    def _discard(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.transport.close()
