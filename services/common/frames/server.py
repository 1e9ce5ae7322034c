"""The serving side: accepts frame connections on a port, on a path of this machine, in this process, or on
all of them."""

from __future__ import annotations

import asyncio
import functools
import hmac
import ssl as tls
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from headrace.v1.dataplane_pb2 import Hello

from services.common.frames import local
from services.common.frames.address import Address, PathListener
from services.common.frames.limits import Limits
from services.common.frames.messages import PROTOCOL
from services.common.frames.peer import FrameHandler, Peer
from services.common.frames.server_connection import Accepted, ServerConnection
from services.common.listening import adopt, close_listener


class _Listening(NamedTuple):
    server: asyncio.Server
    ssl: tls.SSLContext | None
    shared: bool


class FrameServer:
    """Accepts frame connections where it was told to listen."""

    def __init__(
        self,
        handler_factory: Callable[[Peer], FrameHandler],
        *,
        credential: str,
        instance: str,
        role: str,
        limits: Limits | None = None,
        ssl: tls.SSLContext | None = None,
        detaches: bool = False,
    ) -> None:
        """`detaches`: handlers take the data of large tensors from `Peer.contents`, and items to be passed on
        from `Peer.item_payloads`; otherwise everything is in the frame."""
        if not credential:
            raise ValueError("a frame server needs a credential")
        self.handler_factory = handler_factory
        self.limits = limits or Limits()
        self.hello = Hello(
            protocol=PROTOCOL, role=role, instance=instance, max_in_flight=self.limits.max_in_flight
        )
        self.detaches = detaches
        self.draining = False
        self._expected = f"Bearer {credential}".encode()
        self._ssl = ssl
        self._listening: list[_Listening] = []
        self._paths: list[PathListener] = []
        self._names: list[tuple[asyncio.AbstractEventLoop, str]] = []
        self._connections: set[Accepted] = set()

    @property
    def connections(self) -> int:
        """Open connections, those in their handshake included."""
        return len(self._connections)

    async def start(self, host: str, port: int, *, reuse_port: bool = False) -> int:
        """Listen; returns the port, which the system picks where `port` is 0."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: ServerConnection(self, loop),
            host,
            port,
            ssl=self._ssl,
            ssl_handshake_timeout=self.limits.handshake_s if self._ssl else None,
            reuse_port=reuse_port or None,
            backlog=512,
        )
        self._listening.append(_Listening(server, self._ssl, reuse_port))
        return int(server.sockets[0].getsockname()[1])

    async def start_unix(self, path: Path) -> str:
        """Listen at `path` for processes of this user; returns the address for them. Without TLS: nothing
        leaves the machine. Raises OSError."""
        loop = asyncio.get_running_loop()
        at = await asyncio.to_thread(PathListener, path)
        self._paths.append(at)
        server = await loop.create_unix_server(
            lambda: ServerConnection(self, loop), sock=at.socket, backlog=512
        )
        self._listening.append(_Listening(server, None, shared=False))
        return f"unix:{path}"

    def start_local(self, name: str) -> str:
        """Serve clients on this event loop; returns the address for them. Raises ValueError where that is no
        name, OSError where another server has it."""
        address = f"local:{name}"
        if Address.parse(address).name != name:
            raise ValueError(f"{name!r} is no name: it begins with a letter")
        loop = asyncio.get_running_loop()
        local.offer(loop, name, self)
        self._names.append((loop, name))
        return address

    def _withdraw(self) -> list[_Listening]:
        """Let nobody find this server any more; returns what is to be closed at once."""
        for loop, name in self._names:
            local.withdraw(loop, name, self)
        self._names.clear()
        for path in self._paths:
            path.remove()
        self._paths.clear()
        listening, self._listening = self._listening, []
        return listening

    async def drain(self, grace_s: float) -> None:
        """Take no connections but those that the kernel has accepted already, ask all of them for nothing
        new, answer what is open for at most `grace_s`, then close."""
        loop = asyncio.get_running_loop()
        until = loop.time() + grace_s
        self.draining = True
        for connection in list(self._connections):
            connection.say_draining()
        build = functools.partial(ServerConnection, self, loop)
        last = [(close_listener(one.server, shared=one.shared), one.ssl) for one in self._withdraw()]
        await asyncio.gather(*(adopt(build, taken, ssl) for taken, ssl in last))
        await self._wait_lost(until - loop.time())
        await self.close()

    async def close(self) -> None:
        """End every connection and wait until the sockets are gone."""
        for one in self._withdraw():
            one.server.close()
        for connection in list(self._connections):
            connection.shut()
        await self._wait_lost(self.limits.linger_s * 2)
        for connection in list(self._connections):
            connection.abort()
        await self._wait_lost(1.0)

    async def _wait_lost(self, timeout_s: float) -> None:
        waits = [connection.lost for connection in self._connections]
        if waits:
            await asyncio.wait(waits, timeout=timeout_s)

    # The connections' part.

    def admit(self, connection: Accepted) -> bool:
        """Count a new connection; False where there are too many already."""
        self._connections.add(connection)
        if self.draining:
            # Once it has heard with whom it speaks.
            asyncio.get_running_loop().call_soon(connection.say_draining)
        return len(self._connections) <= self.limits.max_connections

    def forget(self, connection: Accepted) -> None:
        """A connection is gone."""
        self._connections.discard(connection)

    def authentic(self, authorization: str) -> bool:
        """Whether the header carries the credential; takes the same time however wrong it is."""
        return hmac.compare_digest(authorization.encode(), self._expected)
