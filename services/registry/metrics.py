"""Every metric of the registry. Labels are methods, route templates, codes and topics: bounded sets."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """The registry's metrics in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.versions_created = Counter(
            "headrace_registry_versions_created_total", "Model versions made.", registry=self.registry
        )
        self.uploaded_bytes = Counter(
            "headrace_registry_uploaded_bytes_total", "Bytes of new versions.", registry=self.registry
        )
        self.http_requests = Counter(
            "headrace_registry_http_requests_total",
            "HTTP requests by method, route and status.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self.http_seconds = Histogram(
            "headrace_registry_http_request_seconds",
            "Time from the request's head to the end of its answer.",
            ["method", "route"],
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60, 600),
            registry=self.registry,
        )
        self.rpcs = Counter(
            "headrace_registry_rpcs_total", "gRPC calls by method and code.", ["method", "code"],
            registry=self.registry,
        )  # fmt: skip
        self.republished = Counter(
            "headrace_registry_republished_total",
            "Control records published again because the broker did not hold them.",
            ["topic"],
            registry=self.registry,
        )
        self.control_missing = Gauge(
            "headrace_registry_control_missing",
            "Control records that the broker did not hold at the last check.",
            ["topic"],
            registry=self.registry,
        )
        self.outbox_age = Gauge(
            "headrace_registry_outbox_age_seconds",
            "Age of the oldest control record that waits for the broker.",
            registry=self.registry,
        )
        self.lag = Gauge("headrace_registry_lag", "Records not yet read.", ["topic"], registry=self.registry)
        self.dead_letters = Gauge(
            "headrace_registry_dead_letters",
            "Malformed records set aside and not replayed.",
            ["topic"],
            registry=self.registry,
        )
        self.verdicts = Counter(
            "headrace_registry_verdicts_total", "Verdicts of analytics received.", registry=self.registry
        )
        self.decisions = Counter(
            "headrace_registry_decisions_total",
            "What the controller did by itself, by kind of trial.",
            ["kind", "action"],
            registry=self.registry,
        )
        self.rollouts = Gauge(
            "headrace_registry_rollouts", "Rollouts by status.", ["status"], registry=self.registry
        )
        self.experiments = Gauge(
            "headrace_registry_experiments",
            "Experiments by status.",
            ["status"],
            registry=self.registry,
        )
