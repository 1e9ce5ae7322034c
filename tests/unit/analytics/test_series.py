"""What metrics say of models that are served no more: nothing."""

from __future__ import annotations

from headrace.v1.control_pb2 import ServedVersion, ServingConfig
from prometheus_client import CollectorRegistry, generate_latest

from services.analytics.metrics import Metrics
from services.analytics.signatures import Signatures


def config(model: str) -> bytes:
    return ServingConfig(model=model, versions=[ServedVersion(version="1")]).SerializeToString()


def test_a_model_that_is_gone_leaves_no_series() -> None:
    """As many come and go, and the page that is scraped would only grow."""
    registry = CollectorRegistry()
    metrics, signatures = Metrics(registry), Signatures()

    def shown() -> set[str]:
        lines = generate_latest(registry).decode().splitlines()
        return {
            line.partition('model="')[2][:1] for line in lines if line.startswith("headrace_analytics_req")
        }

    for model in ("a", "b", "c"):
        signatures.apply(model.encode(), config(model))
        metrics.requests.labels(model).inc()
    metrics.keep_models(signatures.served)
    assert shown() == {"a", "b", "c"}
    signatures.apply(b"a", None)
    signatures.apply(b"c", None)
    metrics.keep_models(signatures.served)
    assert shown() == {"b"}
    metrics.requests.labels("a").inc()  # a record that comes late
    metrics.keep_models(signatures.served)
    assert shown() == {"b"}
    assert signatures.knows("a", "1")  # its records stay, too
    signatures.apply(b"a", config("a"))
    metrics.requests.labels("a").inc()
    metrics.keep_models(signatures.served)
    assert shown() == {"a", "b"}
