"""What is read from one connection: uvicorn's httptools protocol, hardened.

What is added: bounds for heads, exactly one Host, no transfer coding but `chunked`, no fields from trailers,
refusals of what is no HTTP that wait for the answers before them, and refused bodies read for a while so that
their senders see why.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
from uvicorn.server import ServerState

from services.common.errors import BodyTooLarge, HeadraceError, MalformedBody, Unavailable, Unimplemented
from services.gateway.call import Head
from services.gateway.errors import HeadTooLarge
from services.gateway.hot.exchange import HotExchange, no_app, refused
from services.gateway.hot.front import HotFront
from services.gateway.hot.pipeline import PipelinedProtocol
from services.gateway.targets import Dialect, Target

_RETRY_MS = 1000
_ANY = Target(Dialect.NATIVE)


class HardenedProtocol(PipelinedProtocol):
    """One connection, whatever is asked over it."""

    def __init__(
        self,
        front: HotFront,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(front, config, server_state, app_state, _loop)
        self._max_body = front.service.limits.max_body_bytes
        self._head_bytes = 0
        self._upgrade_ignored = False
        self._crowded = False
        # Whose message is being read.
        self._reading: HotExchange | RequestResponseCycle | None = None

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
            self._read_no_http()
        else:
            if self._in_head and self.headers is unfinished:  # all of `data` was head
                self._head_bytes += len(data)
                if self._head_bytes > self.front.limits.max_head_bytes:
                    self._refuse_rest(HeadTooLarge("The request's headers are too long."))
            elif self._in_body:
                self._hold(self._reading)

    def _read_no_http(self) -> None:
        """The parser stopped for good."""
        if self._lingering:
            self.transport.close()
        else:
            self._refuse_rest(MalformedBody("These bytes are not a request as RFC 9112 has it."))

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
        refusal: HeadraceError | None = None
        for name, value in headers:
            super().on_header(name, value)
            lower = name.lower()
            hosts += lower == b"host"
            if lower == b"transfer-encoding":
                refusal = self._coding_refused()
        if refusal is not None:
            self._refuse_rest(refusal)
            return
        if hosts > 1 or (hosts == 0 and self.parser.get_http_version() == "1.1"):
            self._refuse_rest(MalformedBody("A request has exactly one Host header."))
            return
        previous = self.cycle
        super().on_headers_complete()
        if self.cycle is not previous:  # uvicorn makes none for a WebSocket
            self._reading = self.cycle
            if self.front.draining:
                self.cycle.keep_alive = False

    def _coding_refused(self) -> HeadraceError | None:
        """Why a body with these Transfer-Encoding headers is not read, None where it is: `chunked` alone (RFC
        9112, 6.1 and 6.3)."""
        values = [value for name, value in self.headers if name.lower() == b"transfer-encoding"]
        *others, last = [coding.strip(b" \t").lower() for coding in b",".join(values).split(b",")]
        if last != b"chunked" or last in others:
            return MalformedBody("Where a body ends is said by chunked as the last transfer coding, once.")
        if not others:
            return None
        return Unimplemented("The only transfer coding known here is chunked.", field="Transfer-Encoding")

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

    def _discard(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.transport.close()
