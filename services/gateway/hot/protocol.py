"""The hot routes, taken out before ASGI: no scope, no cycle, no event and no task is made for them. Every
other request is handed to uvicorn with the very bytes that arrived."""

from __future__ import annotations

from typing import ClassVar

from services.common.errors import HeadraceError, MalformedBody
from services.gateway.call import HEADERS, Head
from services.gateway.hot.exchange import HotExchange, no_app
from services.gateway.hot.receiving import ReceivingProtocol
from services.gateway.targets import Target, target_of

#: Names as clients wrote them, and what we do with them; bounded, for names are theirs.
_LEARNED_NAMES = 2048
_MAX_LEARNED_BYTES = 40

_FRAMING = {
    b"host": "host",
    b"content-length": "length",
    b"transfer-encoding": "coding",
    b"connection": "connection",
    b"expect": "expect",
}


class HotProtocol(ReceivingProtocol):
    """One connection. uvicorn makes it by `functools.partial(HotProtocol, front)`."""

    _names: ClassVar[dict[bytes, str]] = {}

    def _begin(self) -> None:
        target = target_of(self.url) if self.front.hot else None
        if target is not None and self.parser.get_method() == b"POST":
            self._begin_hot(target)
        else:
            self._begin_asgi()

    def _begin_hot(self, target: Target) -> None:
        head = Head(target)
        exchange = HotExchange(self.front.service, head, self)
        hosts = 0
        keep_alive = self.parser.should_keep_alive()
        names = self._names
        for name, value in self.headers:
            try:
                meaning = names[name]
            except KeyError:
                meaning = self._learn(name)
            if not meaning:
                continue
            if meaning == "host":
                hosts += 1
            elif meaning == "length":
                head.length = int(value)
                if head.length > self._max_body:
                    exchange.refusal = self._body_too_large()
            elif meaning == "coding":
                exchange.refusal = self._coding_refused()
            elif meaning == "connection":
                keep_alive = keep_alive and self.parser.get_http_version() != "1.0"
            elif meaning == "expect":
                exchange.expects_continue = value.lower() == b"100-continue"
            else:
                setattr(head, meaning, value)
        if hosts != 1:
            exchange.refusal = self._hosts_refused(exchange.refusal)
            keep_alive = False
        exchange.keep_alive = keep_alive
        previous = self.cycle
        self._reading = exchange
        self.cycle = exchange  # type: ignore[assignment]  # has what uvicorn uses of a cycle
        if previous is None or previous.response_complete:
            self._start(exchange)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((exchange, no_app))  # type: ignore[arg-type]  # the same

    def _hosts_refused(self, refusal: HeadraceError | None) -> HeadraceError | None:
        """What is wrong with a request that has no Host or several; else `refusal`."""
        if self.parser.get_http_version() != "1.1":
            return refusal
        return MalformedBody("A request has exactly one Host header.")

    @classmethod
    def _learn(cls, name: bytes) -> str:
        lower = name.lower()
        meaning = HEADERS.get(lower) or _FRAMING.get(lower, "")
        if len(cls._names) < _LEARNED_NAMES and len(name) <= _MAX_LEARNED_BYTES:
            cls._names[name] = meaning
        return meaning
