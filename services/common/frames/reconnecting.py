"""Keeps one connection to an address: opens it, and opens another after its end, ever more rarely where that
does not succeed.

Not compiled: mypyc loses a cancellation where a `finally` waits for something, and `close` would never end.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl as tls
from typing import Final

from headrace.v1.dataplane_pb2 import Hello

from services.common.frames import local
from services.common.frames.address import Address
from services.common.frames.client_connection import Caller, ClientConnection, Connection, Opening
from services.common.tasks import ended

log = logging.getLogger(__name__)

#: After so many failed attempts in a row it is said why, once: at a start others may only be slower.
_SAID_AFTER: Final = 6


class Reconnecting:
    """Connects on behalf of one Caller, who hears of a connection when the hellos agree and when it ends."""

    def __init__(
        self,
        address: str,
        calls: Caller,
        *,
        credential: str,
        hello: Hello,
        ssl: tls.SSLContext | None,
        seed: int | None,
    ) -> None:
        """Raises ValueError where there can be nothing at `address`."""
        self.last_error = ""  # why the last attempt or connection ended
        self._address = address
        self._where = Address.parse(address)
        self._calls = calls
        self._limits = calls.limits
        self._ssl = ssl
        leaves_machine = not (self._where.path or self._where.name)
        self._opening = Opening(
            authority=self._where.authority,
            scheme="https" if ssl is not None and leaves_machine else "http",
            credential=credential,
            hello=hello,
            ping_after_s=self._limits.ping_after_s,
        )
        self._random = random.Random(seed)
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Connect, and stay connected until `close`."""
        if self._task is None:
            self._task = self._loop.create_task(self._stay_connected(), name=f"frames to {self._address}")

    async def close(self) -> None:
        """End the connection, and open no other."""
        task, self._task = self._task, None
        if task is not None:
            await ended(task)

    async def _stay_connected(self) -> None:
        failures = 0
        limits = self._limits
        while True:
            reached = await self._connect_once()
            failures = 0 if reached else failures + 1
            if failures == _SAID_AFTER:
                log.warning("no frame connection to %s: %s", self._address, self.last_error)
            span = min(limits.backoff_first_s * 2 ** min(failures, 16), limits.backoff_max_s)
            await asyncio.sleep(self._random.uniform(span / 4, span))

    async def _connect_once(self) -> bool:
        """Hold one connection until it ends; whether the hellos were exchanged on it."""
        connection = self._connect_here() if self._where.name else await self._connect()
        if connection is None:
            return False
        cancelled: asyncio.CancelledError | None = None
        try:
            await asyncio.shield(connection.lost)
        except asyncio.CancelledError as error:
            cancelled = error
        if cancelled is not None:  # not in a `finally`: mypyc forgets it where that awaits
            if not connection.lost.done():
                if connection.greeted:
                    self._calls.disconnected(connection, "connection closed")
                    connection.shut()
                    await asyncio.wait([connection.lost], timeout=self._limits.linger_s)
                connection.abort()
            raise cancelled
        return connection.greeted

    def _connect_here(self) -> Connection | None:
        connection = local.connect(self._loop, self._where.name, self._calls, self._opening)
        if connection is None:
            self.last_error = "nobody serves it in this process"
        return connection

    async def _connect(self) -> Connection | None:
        connection: ClientConnection | None = None

        def build() -> ClientConnection:
            nonlocal connection
            connection = ClientConnection(self._calls, self._opening, self._loop)
            return connection

        try:
            async with asyncio.timeout(self._limits.handshake_s):
                await self._where.connect(build, self._ssl)
        except (OSError, TimeoutError, ValueError) as error:  # ValueError: no host can have that name
            self.last_error = str(error) or "no answer in time"
            return None
        return connection
