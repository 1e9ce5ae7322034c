"""What metrics say of versions and models that are served no more: nothing."""

from __future__ import annotations

from headrace.v1.control_pb2 import ServedVersion, ServingConfig
from prometheus_client import CollectorRegistry, generate_latest

from services.drift.metrics import Metrics
from services.drift.signatures import Signatures


def config(*versions: str) -> bytes:
    served = [ServedVersion(version=version) for version in versions]
    return ServingConfig(model="m", versions=served).SerializeToString()


def test_a_version_that_is_undeployed_has_no_psi() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    signatures = Signatures(metrics.keep_psi)

    def shown() -> list[str]:
        lines = generate_latest(registry).decode().splitlines()
        return [line.split('version="')[1][0] for line in lines if line.startswith("headrace_drift_psi{")]

    for version in ("1", "2", "3"):  # records may be read before deployments are
        assert not signatures.is_gone("m", version)
        metrics.show_psi("m", version, 0.1)
    signatures.apply(b"m", config("1", "2"))
    assert shown() == ["1", "2"]
    signatures.apply(b"m", config("2"))
    assert shown() == ["2"]
    assert signatures.is_gone("m", "1")
    assert not signatures.is_gone("m", "2")
    signatures.apply(b"m", None)
    assert shown() == []
    assert signatures.is_gone("m", "2")
    assert not signatures.is_gone("n", "1")
    signatures.apply(b"m", config("1"))
    assert not signatures.is_gone("m", "1")


def test_a_model_that_is_gone_leaves_no_series() -> None:
    """As many come and go, and the page that is scraped would only grow."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    for model in ("a", "b", "c"):
        metrics.windows.labels(model).inc()
    metrics.keep_models({"b"})
    lines = generate_latest(registry).decode().splitlines()
    assert {line.partition('model="')[2][:1] for line in lines if 'model="' in line} == {"b"}
    metrics.windows.labels("a").inc()  # a window that closes late
    metrics.keep_models({"b"})
    assert registry.get_sample_value("headrace_drift_windows_total", {"model": "a"}) is None
    assert registry.get_sample_value("headrace_drift_windows_total", {"model": "b"}) == 1
