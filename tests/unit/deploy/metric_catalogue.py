"""The names of all metrics that the services export, from their own catalogues and without starting them."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector

from services.analytics.metrics import Metrics as AnalyticsMetrics
from services.drift.metrics import Metrics as DriftMetrics
from services.gateway.metrics import GatewayMetrics
from services.registry.metrics import Metrics as RegistryMetrics
from services.router.metrics import RouterMetrics
from services.worker.metrics import WorkerMetrics

SERVICES = Path(__file__).resolve().parents[3] / "services"

#: Sample names of each kind of family, without `_created`, which no one asks for.
_SUFFIXES = {
    "counter": ("_total",),
    "histogram": ("_bucket", "_sum", "_count"),
    "summary": ("_sum", "_count", ""),
}

#: What Prometheus itself adds to each target.
_SCRAPE = {"up", "ALERTS"}


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


def metric_names() -> set[str]:
    """Every sample name that some service, or Prometheus about a service, may have."""
    idle: Any = _Idle()
    registries = [CollectorRegistry() for _ in range(5)]
    gateway, router, worker, analytics, drift = registries
    GatewayMetrics(gateway)
    router.register(RouterMetrics(idle, idle, idle))
    worker.register(WorkerMetrics(idle, SimpleNamespace(refused=Counter()), idle))  # type: ignore[arg-type]  # stand-ins
    AnalyticsMetrics(analytics)
    DriftMetrics(drift)
    ProcessCollector(registry=drift)
    registries.append(RegistryMetrics().registry)
    names = set(_SCRAPE) | _gauges_of_the_gateway()
    for registry in registries:
        for family in registry.collect():
            names |= {f"{family.name}{suffix}" for suffix in _SUFFIXES.get(family.type, ("",))}
    return names


def _gauges_of_the_gateway() -> set[str]:
    """Those are registered where the parts are wired."""
    return set(re.findall(r'\bgauge\(\s*"(\w+)"', (SERVICES / "gateway" / "app.py").read_text()))
