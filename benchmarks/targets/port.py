"""What the harness asks of everything that it measures."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
import numpy as np
from open_inference import open_inference_pb2 as oip_pb2

from benchmarks.load.requests import Endpoint, request_bytes
from benchmarks.process_tree import Unavailable
from benchmarks.workload import Dialect, Workload

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Front:
    """One way into a running server. `prepare` is called before load goes there."""

    name: str
    endpoint: Endpoint
    prepare: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class Running:
    """A server under way. `processes` gives the process ids of each of its parts, now."""

    fronts: Sequence[Front]
    processes: Callable[[], Mapping[str, Sequence[int]]]
    #: Parts without which no request is answered; empty where all are.
    serving_parts: frozenset[str] = frozenset()
    #: (rows, batches) run since the start, where the server tells.
    batches: Callable[[], tuple[float, float]] | None = None
    notes: list[str] = field(default_factory=list)


class Target(Protocol):
    """One server. `install` and `running` raise Unavailable with the reason."""

    name: str
    title: str
    #: How it was set up, one sentence for the report.
    setup: str

    def install(self) -> None: ...

    def versions(self) -> str: ...

    def running(self, workload: Workload) -> AbstractContextManager[Running]: ...


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def answers(port: int, path: str) -> bool:
    """Whether GET `path` gives 200."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def ask(endpoint: Endpoint, workload: Workload, number: int) -> tuple[int, bytes, Mapping[str, str]]:
    """Send request `number` as the load generator will; status, body and headers of the answer."""
    raw = request_bytes(endpoint, workload, number)
    head, _, body = raw.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines[1:])
    connection = http.client.HTTPConnection(endpoint.host, endpoint.port, timeout=10)
    try:
        connection.request("POST", endpoint.path, body, headers)
        answer = connection.getresponse()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, answer.read(), found
    finally:
        connection.close()


def call(endpoint: Endpoint, workload: Workload, number: int) -> bytes:
    """ModelInfer of request `number`, as the load generator will call it; the answer's message. Raises
    Unavailable."""
    message, _ = workload.body(Dialect.GRPC, number, endpoint.model)
    metadata = tuple((name.lower(), value) for name, value in endpoint.headers)
    with grpc.insecure_channel(f"{endpoint.host}:{endpoint.port}") as channel:
        method = channel.unary_unary(endpoint.path, bytes, bytes)
        try:
            answer: bytes = method(message, timeout=10, metadata=metadata, wait_for_ready=True)
        except grpc.RpcError as error:
            raise Unavailable(f"{endpoint.path} answers {error}") from None
    return answer


def check_answers(front: Front, workload: Workload, requests: int = 8) -> int:
    """Compare real answers with ONNX Runtime's own; gives the size of the last one's body. Raises Unavailable
    where one differs."""
    size = 0
    for number in range(min(requests, len(workload.inputs))):
        headers: Mapping[str, str]
        if front.endpoint.dialect is Dialect.GRPC:
            status, body, headers = 200, call(front.endpoint, workload, number), {}
        else:
            status, body, headers = ask(front.endpoint, workload, number)
        if status != 200:
            raise Unavailable(f"{front.name} answers {status}: {body[:300].decode(errors='replace')}")
        got = values_of(front.endpoint.dialect, body, headers, workload.output)
        size = len(body)
        wanted = [workload.expected(version, number).reshape(-1) for version in range(len(workload.models))]
        if not any(got.shape == one.shape and np.allclose(got, one, atol=1e-3) for one in wanted):
            raise Unavailable(f"{front.name} answers {got[:4]}, ONNX Runtime {wanted[0][:4]}")
    return size


def values_of(dialect: Dialect, body: bytes, headers: Mapping[str, str], output: str) -> Any:
    """The flat values of `output` in an answer."""
    if dialect is Dialect.GRPC:
        said = oip_pb2.ModelInferResponse.FromString(body)
        place = [one.name for one in said.outputs].index(output)
        if said.raw_output_contents:
            return np.frombuffer(said.raw_output_contents[place], np.float32)
        return np.asarray(said.outputs[place].contents.fp32_contents, np.float32)
    length = headers.get("inference-header-content-length")
    if length is not None:
        return np.frombuffer(body[int(length) :], np.float32)
    said = json.loads(body)
    if dialect is Dialect.NATIVE:
        found = said["outputs"][output]
    elif dialect in {Dialect.V2_JSON, Dialect.V2_BINARY}:
        found = next(one["data"] for one in said["outputs"] if one["name"] == output)
    else:
        found = said["output"] if isinstance(said, dict) else said
    return np.asarray(found, np.float32).reshape(-1)
