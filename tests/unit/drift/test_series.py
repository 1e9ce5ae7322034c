"""What metrics say of versions that are served no more: nothing."""

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
