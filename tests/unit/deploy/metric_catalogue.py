"""The names, kinds and labels of all metrics that the services export, from their own catalogues and without
starting them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector

from services.analytics.metrics import Metrics as AnalyticsMetrics
from services.common.lifecycle.joint_ops import _Joined
from services.drift.metrics import Metrics as DriftMetrics
from services.gateway.jobs.metrics import JobMetrics
from services.gateway.metrics import GatewayMetrics
from services.registry.metrics import Metrics as RegistryMetrics
from services.router.metrics import RouterMetrics
from services.worker.batch.metrics import BatchMetrics, BatchStats
from services.worker.metrics import WorkerMetrics

SERVICES = Path(__file__).resolve().parents[3] / "services"

#: Sample names of each kind of family, without `_created`, which no one asks for.
_SUFFIXES = {
    "counter": ("_total",),
    "histogram": ("_bucket", "_sum", "_count"),
    "summary": ("_sum", "_count", ""),
}


@dataclass(frozen=True, slots=True)
class Sample:
    """What is known of a name: Prometheus' kind of its family, and its labels."""

    kind: str
    labels: frozenset[str]


#: What Prometheus itself adds: to each target, and of each alert.
_SCRAPE = {
    "up": Sample("gauge", frozenset()),
    "ALERTS": Sample("gauge", frozenset({"alertname", "alertstate", "severity"})),
}
#: Labels that every series has by where it was scraped.
TARGET = frozenset({"job", "instance", "service"})


class _Idle:
    """Stands for any part of a service that nothing happened in: whatever is asked of it is empty or 0."""

    def __getattr__(self, name: str) -> Any:
        return _Idle()

    def __call__(self, *_: object) -> Any:
        return _Idle()

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __float__(self) -> float:
        return 0.0

    def items(self) -> Any:
        return ()


def metrics() -> dict[str, Sample]:
    """Every sample that some service, or Prometheus about a service, may have."""
    idle: Any = _Idle()
    registries = [CollectorRegistry() for _ in range(6)]
    gateway, router, worker, analytics, drift, joint = registries
    joint.register(_Joined({}, 2, 0))
    GatewayMetrics(gateway)
    JobMetrics(gateway)
    router.register(RouterMetrics(idle, idle, idle, idle))
    worker.register(WorkerMetrics(idle, SimpleNamespace(refused=Counter()), idle))  # type: ignore[arg-type]  # stand-ins
    worker.register(BatchMetrics(SimpleNamespace(stats=BatchStats(), partitions=0)))
    AnalyticsMetrics(analytics)
    DriftMetrics(drift)
    ProcessCollector(registry=drift)
    registries.append(RegistryMetrics().registry)
    found = dict(_SCRAPE) | _gauges_of_the_gateway()
    for registry in registries:
        for name, sample in _of(registry):
            found[name] = sample
    return found


def metric_names() -> set[str]:
    """Their names."""
    return set(metrics())


def _of(registry: CollectorRegistry) -> Iterator[tuple[str, Sample]]:
    # Labels are told by families that collectors make, and of ready-made instruments by the instrument alone.
    for collector in list(registry._collector_to_names):
        for family in collector.collect():
            told: Any = getattr(family, "_labelnames", None) or getattr(collector, "_labelnames", ())
            for suffix in _SUFFIXES.get(family.type, ("",)):
                of_buckets = {"le"} if suffix == "_bucket" else set()
                yield f"{family.name}{suffix}", Sample(family.type, frozenset({*told, *of_buckets}))


def _gauges_of_the_gateway() -> dict[str, Sample]:
    """Those are registered where the parts are wired."""
    named = re.findall(r'\bgauge\(\s*"(\w+)"', (SERVICES / "gateway" / "app.py").read_text())
    return {name: Sample("gauge", frozenset()) for name in named}
