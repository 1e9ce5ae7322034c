"""Large bodies of hot requests, read from the socket to where they stay (`frames/in_place`)."""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.server import ServerState

from services.common.frames.in_place import IN_PLACE_BYTES, MOST_IN_PLACE, InPlace, unwritten
from services.gateway.hot.exchange import HotExchange
from services.gateway.hot.front import HotFront
from services.gateway.hot.hardened import HardenedProtocol


class ReceivingProtocol(HardenedProtocol):
    """One connection: where the rest of a body of a known length goes that has begun to arrive."""

    def __init__(
        self,
        front: HotFront,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(front, config, server_state, app_state, _loop)
        self._in_place: InPlace | None = None
        # A body, what fills it, and how much of it is still to come.
        self._whole = b""
        self._room: memoryview | None = None
        self._missing = 0

    def connection_lost(self, exc: Exception | None) -> None:
        self._whole, self._room = b"", None
        super().connection_lost(exc)

    def room(self) -> memoryview | None:
        """Where the next bytes of a large body belong; None where none is being read."""
        room = self._room
        return room[len(room) - self._missing :] if room is not None else None

    def filled(self, size: int) -> None:
        """`size` bytes of it came."""
        exchange = self.cycle
        self._missing -= size
        if not isinstance(exchange, HotExchange):
            return
        exchange.size += size
        if self._missing:
            if not self._last:
                self._hold(exchange)
            return
        whole, self._whole, self._room = self._whole, b"", None
        if exchange.refusal is None and not exchange.response_complete:
            exchange.body = whole
        # The one before stands inside of the body, and would take what follows for the rest of it.
        self.parser = httptools.HttpRequestParser(self)
        self.on_message_complete()

    def _read(self, data: bytes) -> None:
        super()._read(data)
        exchange = self._reading
        if self._in_body and self._room is None and isinstance(exchange, HotExchange):
            length = exchange.head.length
            if length <= MOST_IN_PLACE and length - exchange.size >= IN_PLACE_BYTES:
                self._read_in_place(exchange, length)

    def _read_in_place(self, exchange: HotExchange, length: int) -> None:
        """Let the rest of its body come to where it stays, if it is waited for."""
        if (
            self._last
            or exchange.refusal is not None
            or exchange.response_complete
            or self.parser.get_http_version() != "1.1"
            or not InPlace.fits(self.transport)
        ):
            return
        self._whole, room = unwritten(length)
        at = 0
        for piece in (exchange.body, *(exchange.pieces or ())):
            room[at : at + len(piece)] = piece
            at += len(piece)
        exchange.drop()
        self._room, self._missing = room, length - at
        if self._in_place is None:
            self._in_place = InPlace(self, self.transport)
        self._in_place.begin()
