"""uvicorn as a part of the service: our loop, our signals, a bounded end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Generator
from typing import Any

import uvicorn

from services.common.errors import Fatal
from services.common.listening import adopt, close_listener, listen

_START_S = 30.0
_CANCEL_S = 2.0
#: How long connections that have asked nothing yet are waited for.
_ASK_S = 0.5
#: How old the date in an answer may be.
_DATE_S = 1.0


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._ending = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Raises Fatal where uvicorn would end the process: the application's own start failed."""
        try:
            await super().startup(sockets)
        except SystemExit:
            raise Fatal("The HTTP application failed to start; the reason stands in the log above.") from None

    async def main_loop(self) -> None:
        """Keep the date until `end`. uvicorn's own looks ten times a second whether it should."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DATE_S):
                    await self._ending.wait()

    def end(self) -> None:
        """Have `serve` shut down and return."""
        self.should_exit = True
        self._ending.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield  # signals belong to lifecycle.run


@contextlib.asynccontextmanager
async def serve_asgi(  # noqa: PLR0913 - the knobs of an HTTP server, all named
    app: Any,
    host: str,
    port: int,
    *,
    drain_s: float = 10.0,
    http: Any = "httptools",
    tls: ssl.SSLContext | None = None,
    reuse_port: bool = False,
    keep_alive_s: int = 75,
    backlog: int = 2048,
) -> AsyncIterator[int]:
    """Serve `app` while the block runs; gives the bound port (`port` 0: any free one).

    At the end no new connections are taken but those that the kernel has accepted already; running requests
    have `drain_s` seconds, then they are cancelled.
    `http` is an uvicorn protocol class or name. Raises Fatal where the port is taken or the application's own
    start fails.
    """
    listener = listen(host, port, reuse_port=reuse_port, backlog=backlog)
    config = uvicorn.Config(
        app,
        http=http,
        lifespan="auto",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=keep_alive_s,
        timeout_graceful_shutdown=max(1, round(drain_s)),
        ssl_context_factory=(lambda _config, _default: tls) if tls else None,
        backlog=backlog,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]), name=f"http:{port}")
    try:
        await _started(server, serving)
        try:
            yield listener.getsockname()[1]
        finally:
            await _stop_listening(server, shared=reuse_port)
            await _all_asked(server)
    finally:
        server.end()
        await _ended(serving, drain_s + _CANCEL_S)
        listener.close()


async def _started(server: uvicorn.Server, serving: asyncio.Task[None]) -> None:
    async with asyncio.timeout(_START_S):
        while not server.started:
            if serving.done():
                serving.result()  # raises what its start raised
            await asyncio.sleep(0.005)


async def _stop_listening(server: uvicorn.Server, *, shared: bool) -> None:
    """Close the listener without losing a connection."""
    last = [taken for one in server.servers for taken in close_listener(one, shared=shared)]
    loop, config = asyncio.get_running_loop(), server.config

    def protocol() -> asyncio.Protocol:  # as uvicorn makes it
        made: asyncio.Protocol = config.http_protocol_class(  # type: ignore[call-arg]
            config=config, server_state=server.server_state, app_state=server.lifespan.state, _loop=loop
        )
        return made

    await adopt(protocol, last, config.ssl)


async def _all_asked(server: uvicorn.Server) -> None:
    """Wait a moment for the first request of each connection: uvicorn closes those that have none, and one
    that was made just now has it on its way."""
    loop = asyncio.get_running_loop()
    until = loop.time() + _ASK_S
    while loop.time() < until:
        if not any(map(_has_asked_nothing, server.server_state.connections)):
            return
        await asyncio.sleep(0.01)


def _has_asked_nothing(connection: object) -> bool:
    return getattr(connection, "cycle", "") is None  # a WebSocket has asked, and has none


async def _ended(serving: asyncio.Task[None], within_s: float) -> None:
    _done, late = await asyncio.wait({serving}, timeout=within_s)
    for task in late:
        task.cancel()
    if late:
        await asyncio.wait(late, timeout=_CANCEL_S)
    if serving.done() and not serving.cancelled():
        serving.exception()  # seen; a failed start was raised by _started
