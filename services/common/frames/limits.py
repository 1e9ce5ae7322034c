"""The bounds of a frame connection, in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one frame connection. Sizes are bytes, durations seconds."""

    #: Largest single gRPC message taken or sent. An item larger than this is refused before it is queued.
    max_message_bytes: int = 64 << 20
    #: Items are coalesced into messages of about this size; one larger item makes a message of its own.
    frame_target_bytes: int = 1 << 20
    #: So many submitted in one turn of the loop leave without waiting for its end: where a turn brings
    #: hundreds, the peer works on the first while the others are read. 0: all of a turn leave together.
    turn_items: int = 0
    #: Items waiting for the peer's window or the socket. Beyond it, submit is refused and a server whose
    #: client does not read its replies hangs up.
    max_buffer_bytes: int = 96 << 20
    #: A server grants no more window to a client that has this much waiting for it.
    pause_buffer_bytes: int = 8 << 20
    #: Items in flight on one stream; a server states it in its hello, a client keeps to the smaller one.
    max_in_flight: int = 16_384
    #: Flow-control window granted for the stream and for the connection.
    window_bytes: int = 16 << 20
    #: Largest HTTP/2 frame payload taken.
    max_http2_frame_bytes: int = 1 << 20
    #: Header block of one stream, compressed and uncompressed.
    max_header_bytes: int = 16 << 10
    #: Control frames taken in a row without a whole message in between.
    max_control_frames: int = 10_000
    #: Connections a server holds at once.
    max_connections: int = 512
    #: TCP, TLS, HTTP/2 and hello together.
    handshake_s: float = 10.0
    #: Silence, while something is in flight, after which a PING asks whether the peer lives, and the
    #: silence after that which says it does not. A peer's event loop answers it whatever its model does; a
    #: frozen process costs its requests the sum, which on a machine with more to do than it can must be more
    #: than such a loop is ever kept from running.
    ping_after_s: float = 2.0
    ping_timeout_s: float = 5.0
    #: Idle connections are left to TCP keepalive: after how much silence the kernel asks, and how much more
    #: ends it.
    idle_s: float = 10.0
    #: How long the socket may stay full because the peer does not read.
    unread_s: float = 20.0
    #: How long a closing connection waits for the peer to read the reason.
    linger_s: float = 1.0
    #: Reconnect: full jitter over an exponentially growing span.
    backoff_first_s: float = 0.05
    backoff_max_s: float = 2.0

    def __post_init__(self) -> None:
        if not 16_384 <= self.max_http2_frame_bytes < 1 << 24:
            raise ValueError("max_http2_frame_bytes must lie in 16384 … 2^24-1")
        if not 65_535 <= self.window_bytes < 1 << 31:
            raise ValueError("window_bytes must lie in 65535 … 2^31-1")
        if self.max_buffer_bytes < self.max_message_bytes:
            raise ValueError("max_buffer_bytes must hold at least one message")
