"""Frames: requests and replies between services, coalesced, over gRPC's own wire format.

One bidirectional stream `/headrace.v1.DataPlane/Frames` per connection. Everything queued when the event
loop turns leaves in one message and, where the windows allow it, in one write. Any gRPC peer can be on the
other end; the HTTP/2 part here knows one stream and no more (RFC 9113, gRPC's PROTOCOL-HTTP2.md).

Client side, one object per remote address; it reconnects by itself and never raises for a lost peer:

    calls = FrameCalls("127.0.0.1:8010",         # or "unix:/path", or "local:name" on the same event loop
                       credential=token, role="gateway", instance="gateway-1",
                       limits=Limits(), ssl=None, on_state=lambda usable: ...)
    calls.start()                                # owned task; also: await calls.wait_connected(timeout_s)
    local_id = calls.submit(request, deadline, on_reply)
        # request: PredictRequest; its `id` and `timeout_us` do not count and it is serialized at once, so
        #   it may be changed and submitted again (elsewhere too) afterwards. `submit_raw` takes the bytes.
        # deadline: on the scale of loop.time(), None for none.
        # on_reply(PredictReply): exactly once, on the loop, never before submit returned, unless cancelled.
        #   Replies made here: UNAVAILABLE whose message starts with "connection" (not connected, lost,
        #   draining), RESOURCE_EXHAUSTED (buffer or in-flight limit full), DEADLINE_EXCEEDED,
        #   INVALID_ARGUMENT (larger than a message may be). `reply.id` is the local id in every case.
    calls.cancel(local_id)                       # no reply is delivered any more; the peer is told
    reply = await calls.predict(request, deadline)   # cancelling the await cancels the call
    calls.usable  calls.connected  calls.draining  calls.in_flight  calls.peer (Hello | None)  calls.address
    await calls.close()                          # what is pending is answered UNAVAILABLE "connection closed"

    on_state(usable: bool) is called on every change of `usable` = connected and not draining.
    `lost(reply)` tells whether a reply was made here because the connection was not there or went away.

Server side:

    class Handler:                               # one per connection, made by handler_factory(peer)
        def on_request_frame(self, frame: RequestFrame) -> None: ...   # items and cancels; must not block
        def on_closed(self) -> None: ...         # once; nobody waits for this peer's items any more

    server = FrameServer(handler_factory, credential=token, instance="worker-1", role="worker",
                         limits=Limits(), ssl=None)
        # detaches=True: data of large tensors is not in the items but in `peer.contents`, as views, and
        #   `peer.item_payloads()` are the items as they came, behind what is `peer.apart`. `submit_raw(…,
        #   tensors=…)` sends parts from where they are.
    port = await server.start("127.0.0.1", 0)    # reuse_port=True to share the port between processes
    address = await server.start_unix(path)      # as well or instead, for processes of this user
    address = server.start_local("server-0")     # as well or instead, for clients on this event loop
    peer.reply(reply)                            # reply.id = the item's id; at any time
        # one reply per item: replies to unknown, cancelled or already answered ids are dropped, and so is
        # every reply after on_closed. The reply is serialized at once and may be changed afterwards.
    peer.role  peer.instance  peer.remote  peer.in_flight
    await server.drain(grace_s)                  # says `draining`, answers what is open, then closes
    await server.close()

`frame.items` of a handler never hold more than the stream may have in flight; the rest was refused with
RESOURCE_EXHAUSTED. An item's deadline is `loop.time() + item.timeout_us / 1e6` at its arrival.

TLS: pass `server_tls(...)` / `client_tls(...)`, or what `server_tls_of` / `client_tls_of` make of settings;
ALPN must settle on h2. What stays on the machine (unix:) goes without.

Reading order: limits, address, turn, wire (frames of HTTP/2), in_place (long messages, read to where they
stay), messages (gRPC messages, coalescing), detached (large tensors, which are not copied), outbound, control
and connection (what both sides share: sending and ending; settings, windows and headers; messages), peer,
server_connection, server, outbox, deadlines, client_connection, local (both ends in one process, without a
socket), reconnecting, client, tls. `header_blocks`, `wire` and `turn` also serve the gateway's gRPC front,
which has many streams per connection, and `in_place` its HTTP.
"""

from services.common.frames.client import FrameCalls, lost
from services.common.frames.limits import Limits
from services.common.frames.messages import item_payloads, timeout_override
from services.common.frames.peer import FrameHandler, Peer
from services.common.frames.server import FrameServer
from services.common.frames.tls import client_tls, client_tls_of, server_tls, server_tls_of

__all__ = [
    "FrameCalls",
    "FrameHandler",
    "FrameServer",
    "Limits",
    "Peer",
    "client_tls",
    "client_tls_of",
    "item_payloads",
    "lost",
    "server_tls",
    "server_tls_of",
    "timeout_override",
]
