"""Every metric of the drift service."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Set

from prometheus_client import CollectorRegistry, Counter, Gauge


class Metrics:
    """Created once in `app.py`; labels are models and versions only, never users or features."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.records = Counter("headrace_drift_records", "Prediction records read", registry=registry)
        self.unknown_versions = Counter(
            "headrace_drift_unknown_versions",
            "Records of versions that no deployment names",
            registry=registry,
        )
        self.windows = Counter(
            "headrace_drift_windows", "Windows compared with their reference", ["model"], registry=registry
        )
        self.psi = Gauge(
            "headrace_drift_psi",
            "Largest PSI of any feature in the version's newest window",
            ["model", "version"],
            registry=registry,
        )
        #: Versions that have a series of it, by model.
        self._with_psi: defaultdict[str, set[str]] = defaultdict(set)
        self.open_alerts = Gauge(
            "headrace_drift_open_alerts", "Alerts that have not ended", registry=registry
        )
        self.deliveries = Counter(
            "headrace_drift_deliveries", "Alerts posted to webhooks", ["outcome"], registry=registry
        )
        # From 0: of a series that begins with 1, nobody sees that it grew.
        for outcome in ("delivered", "failed", "given_up"):
            self.deliveries.labels(outcome)
        self.lag = Gauge("headrace_drift_lag", "Prediction records not yet read", registry=registry)
        self.dead_letters = Gauge(
            "headrace_drift_dead_letters", "Malformed records set aside and not replayed", registry=registry
        )
        self.outbox_age = Gauge(
            "headrace_drift_outbox_age_seconds",
            "Age of the oldest alert that waits for the broker.",
            registry=registry,
        )

    def show_psi(self, model: str, version: str, psi: float) -> None:
        """What the newest window of a version that is served says."""
        self.psi.labels(model, version).set(psi)
        self._with_psi[model].add(version)

    def keep_psi(self, model: str, served: Set[str]) -> None:
        """Forget the versions of `model` that are not served: nobody would ever change what they show."""
        for version in self._with_psi[model] - served:
            self.psi.remove(model, version)
        self._with_psi[model] &= served

    def keep_models(self, served: Set[str]) -> None:
        """Forget the windows of models that are not served: each that came and went would leave a series.
        A window that closes later begins a new one, until the next call."""
        shown = {sample.labels["model"] for one in self.windows.collect() for sample in one.samples}
        for model in shown - served:
            self.windows.remove(model)
