"""Long messages, read from the socket to where they stay.

An event loop gives a protocol what came in pieces of at most 256 kB, each copied out of its own buffer, and a
message that is longer is copied once more when its pieces are joined. Once a connection knows how long the
message is that it reads, its transport is told to fill the message's own bytes instead. Short messages come
faster as pieces; so whoever reads a long one stands in for its connection only as long as long ones come.
"""

from __future__ import annotations

import asyncio
import ctypes
from typing import Final, Protocol, cast

#: Where so much of a message is still to come, it is read in place.
IN_PLACE_BYTES: Final = 64 << 10
#: Of longer messages memory is taken as they come: announcing one shall not be enough.
MOST_IN_PLACE: Final = 8 << 20
#: What is read at once of what follows a long message: the head of the next one.
_HEAD_BYTES: Final = 4096

_new = ctypes.pythonapi.PyBytes_FromStringAndSize
_new.argtypes, _new.restype = (ctypes.c_char_p, ctypes.c_ssize_t), ctypes.py_object
_address = ctypes.pythonapi.PyBytes_AsString
_address.argtypes, _address.restype = (ctypes.py_object,), ctypes.c_void_p
_view = ctypes.pythonapi.PyMemoryView_FromMemory
_view.argtypes, _view.restype = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int), ctypes.py_object
_WRITABLE: Final = 0x200  # PyBUF_WRITE


def unwritten(size: int) -> tuple[bytes, memoryview]:
    """`size` bytes, at least two, of whatever their memory held, and a view that fills them, which does not
    keep them alive. They may be written as long as nobody else has seen them: this is how the C API wants
    bytes filled by a read."""
    made = _new(None, size)
    return made, _view(_address(made), size, _WRITABLE)


class Receiver(Protocol):
    """A connection that reads long messages in place: an `asyncio.Protocol`, and this."""

    def room(self) -> memoryview | None:
        """Where the next bytes belong; None where nothing long is being read."""
        ...

    def filled(self, size: int) -> None:
        """`size` bytes of that room came."""
        ...


class InPlace(asyncio.BufferedProtocol):
    """Stands in for `receiver` at its transport, from `begin` until something short came."""

    def __init__(self, receiver: Receiver, transport: asyncio.Transport) -> None:
        self._receiver = receiver
        self._protocol = cast("asyncio.Protocol", receiver)
        self._transport = transport
        self._active = False
        self._in_room = False
        self._head = bytearray()

    @staticmethod
    def fits(transport: asyncio.Transport) -> bool:
        """Whether a socket's bytes are the messages' own: those of TLS are decrypted elsewhere."""
        return transport.get_extra_info("sslcontext") is None

    def begin(self) -> None:
        """The receiver has room for a long message."""
        if not self._active:
            self._active = True
            self._head = bytearray(_HEAD_BYTES)
            self._transport.set_protocol(self)

    def get_buffer(self, sizehint: int) -> memoryview | bytearray:
        room = self._receiver.room()
        self._in_room = room is not None
        return self._head if room is None else room

    def buffer_updated(self, nbytes: int) -> None:
        if self._in_room:
            self._receiver.filled(nbytes)
            return
        self._protocol.data_received(bytes(memoryview(self._head)[:nbytes]))
        if self._receiver.room() is None and self._transport.get_protocol() is self:
            self._active = False
            self._head = bytearray()
            self._transport.set_protocol(self._protocol)

    # What else the transport says is the receiver's.

    def eof_received(self) -> bool | None:
        return self._protocol.eof_received()

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._protocol.connection_lost(exc)
