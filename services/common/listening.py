"""A listening socket, and how it is closed without losing who connects meanwhile: `close_listener`, then
`adopt`."""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import ssl as tls
import struct
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from services.common.errors import Fatal

#: Of setsockopt (asm-generic/socket.h), for a program of classic BPF: code, two jumps, operand.
_SO_ATTACH_FILTER = 26
_NO_SYN = b"".join(
    struct.pack("HBBI", *step)
    for step in (
        (0x30, 0, 0, 13),  # the flags in the TCP header
        (0x45, 0, 1, 0x02),  # SYN?
        (0x06, 0, 0, 0),  # drop it
        (0x06, 0, 0, 0xFFFF_FFFF),  # keep whatever else it is
    )
)
#: How long handshakes that have begun may take to their end: on this machine, or next to it.
_HANDSHAKE_S = 0.0002
#: How long TLS is waited for with those who were taken last: some connect to see whether the port is open.
_TLS_S = 1.0


def listen(host: str, port: int, *, reuse_port: bool, backlog: int) -> socket.socket:
    """A socket that listens at `port` (0: any free one). Raises Fatal where that is taken."""
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


def close_listener(server: asyncio.Server, *, shared: bool) -> list[socket.socket]:
    """Close what `server` listens at; returns the connections that waited there, for `adopt`. `shared` and
    what it takes: as in `accept_last`. Nothing, where it is closed already."""
    taken = []
    for one in server.sockets:
        # By a handle of our own: neither asyncio nor uvloop lets anybody accept with theirs.
        with suppress(OSError), socket.socket(fileno=os.dup(one.fileno())) as listener:
            taken += accept_last(listener, shared=shared)
    server.close()
    return taken


async def adopt(
    build: Callable[[], asyncio.Protocol], taken: Sequence[socket.socket], ssl: tls.SSLContext | None = None
) -> None:
    """Give connections that were taken last to protocols, as their listener would have. On return these know
    of them, as do those of the connections that the loop had accepted itself. Who has not agreed upon TLS
    within a second is sent away."""
    loop = asyncio.get_running_loop()
    adopted = [loop.connect_accepted_socket(build, one, ssl=ssl) for one in taken]
    with suppress(TimeoutError):
        async with asyncio.timeout(_TLS_S if ssl else None):
            await asyncio.gather(*adopted, return_exceptions=True)
    await asyncio.sleep(0)  # a protocol hears of its connection a turn after that was accepted


def accept_last(listener: socket.socket, *, shared: bool) -> list[socket.socket]:
    """Take the connections that wait at `listener`, which the kernel would reset with it: close it at once
    then. `shared`: others listen at the port, too. Who comes in between is not answered by the kernel, tries
    again after a second as TCP does, and finds one of them. Blocks, for less than a millisecond."""
    if listener.family == socket.AF_UNIX:
        with suppress(OSError):  # only Linux does it: who comes from here on is refused
            listener.shutdown(socket.SHUT_RD)
    taken = _waiting(listener)
    if shared and sys.platform == "linux":
        program = ctypes.create_string_buffer(_NO_SYN)
        with suppress(OSError):  # as before, then: a few microseconds in which a connection is reset
            listener.setsockopt(
                socket.SOL_SOCKET,
                _SO_ATTACH_FILTER,
                struct.pack("HP", len(_NO_SYN) // 8, ctypes.addressof(program)),
            )
        time.sleep(_HANDSHAKE_S)
        taken += _waiting(listener)
    return taken


def _waiting(listener: socket.socket) -> list[socket.socket]:
    taken = []
    with suppress(OSError):  # nobody waits; or no descriptors are left for those who do
        while True:
            taken.append(listener.accept()[0])
    return taken
