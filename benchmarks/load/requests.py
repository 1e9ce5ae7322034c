"""Requests as the bytes that go over the wire, in a file that every load generator reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.workload import Dialect, Workload


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where load goes and how it is worded."""

    host: str
    port: int
    path: str
    dialect: Dialect
    model: str = "mlp"
    headers: tuple[tuple[str, str], ...] = ()


def request_bytes(endpoint: Endpoint, workload: Workload, number: int) -> bytes:
    """Request number `number`, HTTP/1.1 and keep-alive."""
    body, needed = workload.body(endpoint.dialect, number, endpoint.model)
    headers = [
        ("Host", f"{endpoint.host}:{endpoint.port}"),
        *needed,
        *endpoint.headers,
        ("Content-Length", str(len(body))),
    ]
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
    return f"POST {endpoint.path} HTTP/1.1\r\n{lines}\r\n".encode() + body


def write_requests(path: Path, endpoint: Endpoint, workload: Workload) -> Path:
    """All requests in rotation, each as `<length>\\n<bytes>`; for gRPC see `write_frame`."""
    if endpoint.dialect is Dialect.GRPC:
        return write_frame(path, endpoint, workload)
    with path.open("wb") as file:
        for number in range(len(workload.inputs)):
            request = request_bytes(endpoint, workload, number)
            file.write(b"%d\n" % len(request) + request)
    return path


def write_frame(path: Path, endpoint: Endpoint, workload: Workload) -> Path:
    """The first request as a gRPC message with its prefix: h2load sends the same one again and again."""
    message, _headers = workload.body(Dialect.GRPC, 0, endpoint.model)
    path.write_bytes(b"\0" + len(message).to_bytes(4, "big") + message)
    return path


def read_requests(path: Path) -> list[bytes]:
    """The requests of `write_requests`."""
    requests = []
    with path.open("rb") as file:
        while line := file.readline():
            requests.append(file.read(int(line)))
    return requests
