"""The ops port of several processes: what each of them says, put together."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from services.common.lifecycle.health import Health
from services.common.lifecycle.ops import Receive, Scope, Send, respond

_TIMEOUT_S = 2.0
_MAX_ANSWER = 16 << 20
_JSON = "application/json"


@dataclass(frozen=True, slots=True)
class _Said:
    status: int
    body: bytes


class JointOps:
    """`/health/live`, `/health/ready` and `/metrics` for processes that have their own on local ports.

    Ready is who has one ready process at least. Metrics carry the label `process`, so that a process that was
    replaced looks to Prometheus like what it is: one that starts from nothing.
    """

    def __init__(self, host: str, ports: Sequence[int], health: Health, restarts: Callable[[], int]) -> None:
        self._host = host
        self._ports = tuple(ports)
        self._health = health
        self._restarts = restarts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            while True:
                phase = (await receive())["type"]
                await send({"type": f"{phase}.complete"})
                if phase == "lifespan.shutdown":
                    return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000})
        elif scope["path"] == "/health/live":
            await respond(scope, send, 200, _JSON, b'{"live":true}')
        elif scope["path"] == "/health/ready":
            await respond(scope, send, *await self._ready())
        elif scope["path"] == "/metrics":
            await respond(scope, send, *await self._metrics(scope))
        else:
            missing = b'{"error":"only /health/live, /health/ready and /metrics"}'
            await respond(scope, send, 404, _JSON, missing)

    async def _ready(self) -> tuple[int, str, bytes]:
        reasons: dict[str, Any] = dict(self._health.reasons()) or await self._nobody_ready()
        body = {"ready": not reasons, "reasons": reasons}
        return (503 if reasons else 200), _JSON, json.dumps(body).encode()

    async def _nobody_ready(self) -> dict[str, Any]:
        """Why each process is not ready; nothing as soon as one says that it is: another may be frozen, and
        who asks has no time to wait for it."""
        asked = [asyncio.create_task(self._ask(port, "/health/ready")) for port in self._ports]
        try:
            for answer in asyncio.as_completed(asked):
                said = await answer
                if said is not None and said.status == 200:
                    return {}
        finally:
            for task in asked:
                task.cancel()
            await asyncio.wait(asked)
        return {f"process-{index}": _reason(task.result()) for index, task in enumerate(asked)}

    async def _metrics(self, scope: Scope) -> tuple[int, str, bytes]:
        accept = b",".join(value for name, value in scope["headers"] if name == b"accept").decode("latin-1")
        encode, content_type = choose_encoder(accept)
        said = await self._everybody("/metrics")
        texts = {
            index: one.body.decode() for index, one in said.items() if one is not None and one.status == 200
        }
        registry = CollectorRegistry()
        registry.register(_Joined(texts, len(self._ports), self._restarts()))
        # In a thread: with thousands of models it takes seconds, and who asks about health has no time.
        return 200, content_type, await asyncio.to_thread(encode, registry)

    async def _everybody(self, path: str) -> dict[int, _Said | None]:
        answers = await asyncio.gather(*(self._ask(port, path) for port in self._ports))
        return dict(enumerate(answers))

    async def _ask(self, port: int, path: str) -> _Said | None:
        """What the process on `port` says; None where it says nothing in time."""
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(self._host, port, limit=_MAX_ANSWER)
                try:
                    # HTTP/1.0: the answer ends with the connection.
                    writer.write(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
                    answer = await reader.read(-1)
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return None
        head, _, body = answer.partition(b"\r\n\r\n")
        status = head.split(b" ", 2)[1:2]
        return _Said(int(status[0]), body) if status and status[0].isdigit() else None


class _Joined(Collector):
    """The metrics of all processes, as one registry has them."""

    def __init__(self, texts: Mapping[int, str], processes: int, restarts: int) -> None:
        self._texts = texts
        self._processes = processes
        self._restarts = restarts

    def collect(self) -> Iterator[Metric]:
        """Families in the order in which they first appear."""
        families: dict[str, Metric] = {}
        for index, text in self._texts.items():
            for family in text_string_to_metric_families(text):
                if family.name.endswith("_created"):
                    continue  # a gauge in this format; OpenMetrics takes none of that name beside the counter
                joint = families.get(family.name)
                if joint is None:
                    joint = families[family.name] = Metric(family.name, family.documentation, family.type)
                for sample in family.samples:
                    joint.add_sample(
                        sample.name, {**sample.labels, "process": str(index)}, sample.value, sample.timestamp
                    )
        yield from families.values()
        yield GaugeMetricFamily("headrace_processes", "Processes wanted.", value=self._processes)
        yield GaugeMetricFamily("headrace_processes_up", "Processes that answer.", value=len(self._texts))
        yield GaugeMetricFamily("headrace_process_restarts", "Processes replaced.", value=self._restarts)


def _reason(said: _Said | None) -> object:
    if said is None:
        return "does not answer"
    try:
        return json.loads(said.body)["reasons"]
    except (ValueError, KeyError, TypeError):
        return f"answers {said.status}"
