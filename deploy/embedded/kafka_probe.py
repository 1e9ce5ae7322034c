"""The smallest question that only a Kafka broker answers: ApiVersions, version 0."""

from __future__ import annotations

import socket
import struct

API_VERSIONS = 18
_CORRELATION = 0x48454144


def answers_kafka(host: str, port: int, timeout: float = 0.8) -> bool:
    """Whether a broker answers ApiVersions without an error. Never raises."""
    client = b"probe"
    header = struct.pack(f">hhih{len(client)}s", API_VERSIONS, 0, _CORRELATION, len(client), client)
    try:
        with socket.create_connection((host, port), timeout=timeout) as connection:
            connection.settimeout(timeout)
            connection.sendall(struct.pack(">i", len(header)) + header)
            reply = b""
            while len(reply) < 10:
                chunk = connection.recv(4096)
                if not chunk:
                    return False
                reply += chunk
    except OSError:
        return False
    _size, correlation, error = struct.unpack_from(">iih", reply)
    return bool(correlation == _CORRELATION and error == 0)
