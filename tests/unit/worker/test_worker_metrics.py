"""What a worker exports of its versions."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry

from services.worker.desired import VersionKey
from services.worker.metrics import WorkerMetrics
from services.worker.stats import ModelStats


class _Model:
    """A version that serves, and was asked `asked` times."""

    pending = queued_rows = running_rows = 0
    queued_rows_of = (0, 0, 0)
    run_time = SimpleNamespace(estimate=lambda _rows: 0.001)

    def __init__(self, asked: int) -> None:
        self.stats = ModelStats(succeeded=asked, rows=asked, runs=asked)


class _Host:
    """One version that is on its way out and in again, another that is not loaded."""

    def __init__(self) -> None:
        self.evictions: Counter[tuple[str, str]] = Counter()

    def serving(self) -> list[tuple[VersionKey, _Model]]:
        key = VersionKey("net", "1", "sha256:1")
        return [(key, _Model(1000)), (key, _Model(3))]

    def failed(self) -> list[tuple[VersionKey, Counter[str]]]:
        key = VersionKey("net", "1", "sha256:1")
        parked = VersionKey("large", "1", "sha256:2")
        return [
            (key, Counter(CODE_INTERNAL=7)),
            (key, Counter(CODE_INTERNAL=1)),
            (parked, Counter(CODE_UNAVAILABLE=2)),
        ]

    def states(self) -> list[Any]:
        return []


def test_no_two_series_have_the_same_labels() -> None:
    """Prometheus would take either of them."""
    registry = CollectorRegistry()
    host: Any = _Host()
    servicer: Any = SimpleNamespace(refused={})
    registry.register(WorkerMetrics(host, servicer, None))
    samples = [
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in registry.collect()
        for sample in family.samples
    ]
    assert len(samples) == len(set(samples))
    labels = {"model": "net", "version": "1"}
    assert registry.get_sample_value("nv_inference_request_success", labels) == 3


def test_a_version_that_is_not_loaded_says_whom_it_refused() -> None:
    registry = CollectorRegistry()
    host: Any = _Host()
    servicer: Any = SimpleNamespace(refused={})
    registry.register(WorkerMetrics(host, servicer, None))
    labels = {"model": "large", "version": "1", "reason": "CODE_UNAVAILABLE"}
    assert registry.get_sample_value("nv_inference_request_failure", labels) == 2
