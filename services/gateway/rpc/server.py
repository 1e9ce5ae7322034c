"""The listener, the deadlines of all connections, and their end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from services.common.listening import adopt, close_listener
from services.gateway.predict import PredictService
from services.gateway.reading import BodyBudget
from services.gateway.rpc.connection import RpcConnection
from services.gateway.rpc.infer_stream import InferStreams
from services.gateway.rpc.limits import RpcLimits
from services.gateway.rpc.methods import Method
from services.gateway.rpc.tasks import Tasks

_BACKLOG = 512
_ABORT_S = 1.0


class RpcServer:
    """Accepts gRPC connections. Calls of `hot_path`, and messages of calls of `stream_path`, go to `service`,
    other calls to `methods`."""

    def __init__(
        self,
        service: PredictService,
        hot_path: bytes,
        stream_path: bytes,
        methods: Mapping[bytes, Method],
        limits: RpcLimits,
    ) -> None:
        self.service = service
        self.hot_path = hot_path
        self.stream_path = stream_path
        self.methods = methods
        self.limits = limits
        self.tasks = Tasks(limits)
        self.streams = InferStreams(limits.max_infer_streams)
        self._connections: set[RpcConnection] = set()
        self._server: asyncio.Server | None = None
        self._shared = False  # others listen at the port, too

    @property
    def bodies(self) -> BodyBudget:
        """Counts bytes that are held for clients."""
        return self.service.bodies

    @property
    def connections(self) -> int:
        """Open connections."""
        return len(self._connections)

    async def start(self, host: str, port: int, *, reuse_port: bool = False) -> int:
        """Listen; returns the port, which the system picks where `port` is 0. Raises OSError."""
        loop = asyncio.get_running_loop()
        self._shared = reuse_port
        server = self._server = await loop.create_server(
            lambda: RpcConnection(self, loop), host, port, reuse_port=reuse_port or None, backlog=_BACKLOG
        )
        return int(server.sockets[0].getsockname()[1])

    @asynccontextmanager
    async def sweeping(self, every_s: float = 1.0) -> AsyncIterator[None]:
        """Enforce the deadlines of all connections while the block runs."""

        async def sweep() -> None:
            while True:
                await asyncio.sleep(every_s)
                for connection in list(self._connections):
                    connection.tick()

        task = asyncio.create_task(sweep(), name="grpc-deadlines")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})

    async def stop(self, grace_s: float) -> None:
        """Take no connections but those that the kernel has accepted already, answer what is open for at most
        `grace_s`, then close."""
        for connection in list(self._connections):
            connection.drain()
        if self._server is not None:
            loop = asyncio.get_running_loop()
            known = set(self._connections)
            last = close_listener(self._server, shared=self._shared)
            await adopt(lambda: RpcConnection(self, loop), last)
            for connection in self._connections - known:
                # Their first call is on its way: gRPC's client fails it, unless it may retry, where it hears
                # of the end before it has sent it.
                loop.call_later(self.limits.drain_notice_s, connection.drain)
        await self._wait_lost(grace_s)
        for connection in list(self._connections):
            connection.shut()
        await self._wait_lost(self.limits.linger_s * 2)
        for connection in list(self._connections):
            connection.abort()
        await self._wait_lost(_ABORT_S)
        await self.tasks.close()

    async def _wait_lost(self, timeout_s: float) -> None:
        waits = [connection.lost for connection in self._connections]
        if waits:
            await asyncio.wait(waits, timeout=timeout_s)

    # The connections' part.

    def admit(self, connection: RpcConnection) -> bool:
        """Count a new connection; False where there are too many already."""
        self._connections.add(connection)
        return len(self._connections) <= self.limits.max_connections

    def forget(self, connection: RpcConnection) -> None:
        """A connection is gone."""
        self._connections.discard(connection)
