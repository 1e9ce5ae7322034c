"""The bounds of gRPC connections, in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RpcLimits:
    """Bounds of one connection, and of all together. Sizes are bytes; durations whole seconds, enforced by
    a sweep to the second."""

    #: Largest message of a hot call.
    max_message_bytes: int = 33 << 20
    #: Largest message of any other call; some of these need no key.
    max_small_bytes: int = 16 << 10
    #: Flow-control windows that are granted: what a client may send before it hears from us.
    stream_window_bytes: int = 1 << 20
    window_bytes: int = 4 << 20
    max_frame_bytes: int = 64 << 10
    #: Header block of one call, compressed and uncompressed.
    max_header_bytes: int = 16 << 10
    max_streams: int = 1024
    #: In one second: frames that bring nothing forward, and calls that their client resets.
    max_control_frames: int = 10_000
    max_resets: int = 2_000
    #: Connections beyond are sent away.
    max_connections: int = 10_000
    #: Calls other than hot ones, of all connections; the second bounds those that may go on for ever.
    max_tasks: int = 1024
    max_streaming_tasks: int = 256
    #: Calls of ModelStreamInfer, of all connections.
    max_infer_streams: int = 10_000
    #: Requests of one of them that are under way, or whose answers are not sent yet, and bytes of both; and
    #: how many of these requests may be such as threads read. What comes beyond waits in the stream's window.
    max_stream_requests: int = 256
    max_stream_bytes: int = 8 << 20
    max_stream_large: int = 16
    #: Requests that one of them begins in a turn of the event loop, which is not its own.
    max_stream_begun: int = 64
    #: From the connection to the client's SETTINGS.
    handshake_s: int = 10
    #: From the head of a unary call to the end of its message, and for one message of a stream to come.
    body_s: int = 30
    #: How long a client may leave answers unread.
    unread_s: int = 30
    #: Silence, while a call is open, after which a PING asks whether the client lives, and the silence after
    #: that which says it does not. Idle connections are left to TCP.
    ping_after_s: int = 30
    ping_timeout_s: int = 20
    #: How long a closing connection waits for the client to read the reason.
    linger_s: float = 1.0
    #: While draining: how long calls that crossed the news are still taken.
    drain_notice_s: float = 0.2
