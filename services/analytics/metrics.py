"""Every metric of the analytics service."""

from __future__ import annotations

from collections.abc import Set

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """Created once in `app.py`; labels are model names and topics only."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.records = Counter("headrace_analytics_records", "Records read", ["topic"], registry=registry)
        self.repeated = Counter(
            "headrace_analytics_repeated_records", "Records read before", ["topic"], registry=registry
        )
        self.requests = Counter(
            "headrace_analytics_requests", "Logged rows taken in", ["model"], registry=registry
        )
        self.outcomes = Counter("headrace_analytics_outcomes", "New outcomes", registry=registry)
        self.segments = Counter(
            "headrace_analytics_segments", "Parquet objects written", ["why"], registry=registry
        )
        self.inbox_rows = Gauge(
            "headrace_analytics_inbox_rows", "Requests that are not in Parquet yet", registry=registry
        )
        self.dead_letters = Gauge(
            "headrace_analytics_dead_letters",
            "Malformed records set aside and not replayed",
            ["topic"],
            registry=registry,
        )
        self.lag = Gauge("headrace_analytics_lag", "Records not yet read", ["topic"], registry=registry)
        self.query_seconds = Histogram(
            "headrace_analytics_query_seconds",
            "Time of a DuckDB query",
            registry=registry,
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
        )
        self.trials = Gauge(
            "headrace_analytics_trials", "Experiments and rollouts that are judged", registry=registry
        )
        self.looks = Counter(
            "headrace_analytics_looks", "Looks at experiments and rollouts", ["result"], registry=registry
        )
        # From 0: of a series that begins with 1, nobody sees that it grew.
        for result in ("ok", "later", "failed"):
            self.looks.labels(result)
        self.look_seconds = Histogram(
            "headrace_analytics_look_seconds",
            "Time of a look at one experiment or rollout",
            registry=registry,
            buckets=(0.03, 0.1, 0.3, 1, 3, 10, 30),
        )
        self.placebo_rate = Gauge(
            "headrace_placebo_false_positive_rate",
            "Share of A/A halves of a control that the deciding method ever told apart",
            ["model"],
            registry=registry,
        )

    def keep_models(self, served: Set[str]) -> None:
        """Forget the requests of models that are not served: models come and go, and each would leave a
        series. Records that come later begin a new one, until the next call."""
        shown = {sample.labels["model"] for one in self.requests.collect() for sample in one.samples}
        for model in shown - served:
            self.requests.remove(model)
