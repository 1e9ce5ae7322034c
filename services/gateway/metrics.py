"""Every metric of the gateway, and the counting of requests.

Requests are counted in plain integers, one cell per (route, model, status), and turned into Prometheus
families when scraped: a few hundred nanoseconds a request. Labels are bounded: routes are those of the code,
models those in service (the counts of one that is not are forgotten), statuses those we send.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any

from headrace.v1.tensor_pb2 import Code
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from services.common.errors import HeadraceError
from services.common.telemetry import log_fields
from services.gateway.call import Call

#: Upper bounds of the latency histogram, seconds.
BUCKETS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)

_FAILURES_LOGGED_PER_S = 10


class Cell:
    """The requests of one route, model and status."""

    __slots__ = ("buckets", "seconds")

    def __init__(self) -> None:
        self.buckets = [0] * (len(BUCKETS) + 1)
        self.seconds = 0.0

    def observe(self, seconds: float) -> None:
        """Count one answered request."""
        self.buckets[bisect_left(BUCKETS, seconds)] += 1
        self.seconds += seconds


class GatewayMetrics(Collector):
    """Counts requests; reads gauges when scraped."""

    def __init__(
        self, registry: CollectorRegistry, in_service: Callable[[str], bool] = lambda _model: True
    ) -> None:
        """`in_service` says of a model whether it is."""
        self._in_service = in_service
        self._cells: dict[tuple[str, str, int], Cell] = {}
        self._gauges: list[tuple[str, str, Callable[[], float]]] = []
        self._logged_second = 0
        self._logged = 0
        registry.register(self)

    def gauge(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """Export `read()` as the gauge `name` from now on."""
        self._gauges.append((name, help_text, read))

    def observe(self, route: str, model: str, status: int, seconds: float) -> None:
        """Count one answered request."""
        self.cell(route, model, status).observe(seconds)

    def cell(self, route: str, model: str, status: int) -> Cell:
        """What counts the requests of one route, model and status, for who has many of them."""
        key = (route, model, status)
        try:
            return self._cells[key]
        except KeyError:
            cell = self._cells[key] = Cell()
            return cell

    def log_failure(self, log: Any, status: int, call: Call, error: HeadraceError) -> None:
        """Log a failed request, ten a second at most: an outage must not become an outage of the log."""
        second = int(time.monotonic())
        if second != self._logged_second:
            self._logged_second, self._logged = second, 0
        self._logged += 1
        if self._logged <= _FAILURES_LOGGED_PER_S:
            log.warning(
                "request_failed",
                route=call.target.dialect,
                model=call.model.name if call.model is not None else None,
                request_id=call.request_id.hex(),
                status=status,
                code=Code.Name(error.code),
                detail=error.message,
                **log_fields(call.trace_context or call.trace_parent),
            )

    def collect(self) -> Iterator[Metric]:
        """What Prometheus sees."""
        for key in [key for key in self._cells if key[1] and not self._in_service(key[1])]:
            del self._cells[key]
        requests = CounterMetricFamily(
            "headrace_gateway_requests", "Requests answered.", labels=["route", "model", "status"]
        )
        latency = HistogramMetricFamily(
            "headrace_gateway_request_seconds",
            "From the whole request read to the answer written.",
            labels=["route", "model"],
        )
        merged: dict[tuple[str, str], Cell] = {}
        for (route, model, status), cell in list(self._cells.items()):
            requests.add_metric([route, model, str(status)], sum(cell.buckets))
            into = merged.setdefault((route, model), Cell())
            into.seconds += cell.seconds
            into.buckets = [a + b for a, b in zip(into.buckets, cell.buckets, strict=True)]
        for (route, model), cell in merged.items():
            running, buckets = 0, []
            for bound, count in zip((*BUCKETS, float("inf")), cell.buckets, strict=True):
                running += count
                buckets.append(("+Inf" if bound == float("inf") else str(bound), float(running)))
            latency.add_metric([route, model], buckets, cell.seconds)
        yield requests
        yield latency
        for name, help_text, read in self._gauges:
            yield GaugeMetricFamily(name, help_text, value=read())

    def describe(self) -> Iterator[Metric]:
        """Nothing: names are known without reading the gauges."""
        return iter(())
