"""A listening socket, and how it is closed without losing who connects meanwhile."""

from __future__ import annotations

import ctypes
import socket
import struct
import sys
import time
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


def accept_last(listener: socket.socket, *, shared: bool) -> list[socket.socket]:
    """Take the connections that wait at `listener`, which the kernel would reset with it: close it at once
    then. `shared`: others listen at the port, too. Who comes in between is not answered by the kernel, tries
    again after a second as TCP does, and finds one of them. Blocks, for less than a millisecond."""
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
