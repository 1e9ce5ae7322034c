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

_START_S = 30.0
_CANCEL_S = 2.0


class _Server(uvicorn.Server):
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

    At the end no new connections are taken, running requests have `drain_s` seconds, then they are cancelled.
    `http` is an uvicorn protocol class or name. Raises Fatal where the port is taken or the application's own
    start fails.
    """
    listener = _listen(host, port, reuse_port=reuse_port, backlog=backlog)
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
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await _ended(serving, drain_s + _CANCEL_S)
        listener.close()


def _listen(host: str, port: int, *, reuse_port: bool, backlog: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named: asyncio sets TCP_NODELAY only on accepted sockets that say they are TCP.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
        listener.listen(backlog)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise Fatal(f"Cannot listen on {host}:{port}: {error.strerror or error}.") from error
    return listener


async def _started(server: uvicorn.Server, serving: asyncio.Task[None]) -> None:
    async with asyncio.timeout(_START_S):
        while not server.started:
            if serving.done():
                serving.result()  # raises what uvicorn raised
                raise Fatal("The HTTP application failed to start; the reason stands in the log above.")
            await asyncio.sleep(0.005)


async def _ended(serving: asyncio.Task[None], within_s: float) -> None:
    _done, late = await asyncio.wait({serving}, timeout=within_s)
    for task in late:
        task.cancel()
    if late:
        await asyncio.wait(late, timeout=_CANCEL_S)
    if serving.done() and not serving.cancelled():
        serving.exception()  # seen; a failed start was raised by _started
