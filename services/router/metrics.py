"""Every metric of the router. Labels are bounded by what is deployed and by the workers there are."""

from __future__ import annotations

from collections.abc import Iterator

from headrace.v1.tensor_pb2 import Code
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from services.common.eventlog import EventLog
from services.common.frames import FrameServer
from services.router.dispatch import Dispatcher
from services.router.outliers import State
from services.router.result_store import ResultStore
from services.router.stats import LATENCY_S

_VERSION = ("model", "version")
_OPEN = {State.CLOSED: 0.0, State.HALF_OPEN: 0.5, State.OPEN: 1.0}


class RouterMetrics(Collector):
    """Reads the totals of the dispatcher, the workers and the logs."""

    def __init__(
        self, dispatcher: Dispatcher, server: FrameServer, log: EventLog, store: ResultStore | None = None
    ) -> None:
        self._dispatcher = dispatcher
        self._server = server
        self._log = log
        self._store = store

    def collect(self) -> Iterator[Metric]:
        """The metrics now."""
        yield from self._requests()
        yield from self._workers()
        yield from self._breakers()
        yield from self._cache()
        yield from self._table()
        dispatcher, log = self._dispatcher, self._log
        for name, text, value in (
            ("in_flight", "Requests being answered", dispatcher.budget.active),
            ("retries_in_flight", "Retries that count against the budget", dispatcher.budget.retrying),
            ("waiting", "Requests waiting for a version to be loaded", len(dispatcher.waiting)),
            (
                "shadows_under_way",
                "Copies for shadows that are not compared yet",
                dispatcher.mirror.under_way if dispatcher.mirror else 0,
            ),
            ("gateway_connections", "Frame streams of gateways", self._server.connections),
            ("log_pending_bytes", "Refusals not yet in Kafka", log.pending_bytes),
            ("log_pending_records", "Records not yet in Kafka", log.pending_records),
        ):
            yield GaugeMetricFamily(f"headrace_router_{name}", text, value=float(value))
        for name, text, value in (
            ("retries_over_budget", "Retries that the budget did not allow", dispatcher.budget.refused),
            (
                "shadows_not_published",
                "Comparisons with shadows that were lost",
                dispatcher.stats.unpublished_shadows,
            ),
            ("refusals_not_logged", "Refusals that found the log full", dispatcher.log.dropped),
            ("log_published", "Records that Kafka acknowledged", log.published),
            ("log_publish_failures", "Publishes that failed and were tried again", log.publish_failures),
            ("log_set_aside", "Records that Kafka will never take, kept in a file", log.set_aside),
            ("log_torn_bytes", "Bytes that a crash left half written", log.dropped_bytes),
        ):
            yield CounterMetricFamily(f"headrace_router_{name}", text, value=float(value))

    def _requests(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "headrace_router_requests", "Requests by answer", labels=(*_VERSION, "code")
        )
        retries = CounterMetricFamily(
            "headrace_router_retries", "Requests sent once more", labels=(*_VERSION, "reason")
        )
        fallbacks = CounterMetricFamily(
            "headrace_router_fallbacks",
            "Requests that the fallback answered instead of the version",
            labels=(*_VERSION, "reason"),
        )
        hedges = CounterMetricFamily(
            "headrace_router_hedges",
            "Late requests sent to a second worker, and those that it answered first",
            labels=(*_VERSION, "result"),
        )
        cache = CounterMetricFamily(
            "headrace_router_cache_requests",
            "Requests that the result cache took",
            labels=(*_VERSION, "result"),
        )
        shadows = CounterMetricFamily(
            "headrace_router_shadows", "Copies for the shadow version", labels=(*_VERSION, "result")
        )
        latency = HistogramMetricFamily(
            "headrace_router_latency_seconds", "From the frame's arrival to the answer", labels=_VERSION
        )
        for key, stats in self._dispatcher.stats.versions.items():
            for code, count in enumerate(stats.codes):
                if count:
                    name = Code.Name(Code.ValueType(code)).removeprefix("CODE_")
                    requests.add_metric((*key, name), count)
            for reason, count in stats.retries.items():
                retries.add_metric((*key, reason), count)
            for result, count in stats.hedges.items():
                hedges.add_metric((*key, result), count)
            for result, count in stats.shadows.items():
                shadows.add_metric((*key, result), count)
            for result, count in stats.cache.items():
                cache.add_metric((*key, result), count)
            for reason, count in stats.fallbacks.items():
                fallbacks.add_metric((*key, reason), count)
            buckets, total = [], 0
            for bound, count in zip((*map(str, LATENCY_S), "+Inf"), stats.latency, strict=True):
                total += count
                buckets.append((bound, float(total)))
            latency.add_metric(key, buckets, stats.latency_sum_s)
        yield from (requests, retries, fallbacks, hedges, cache, shadows, latency)

    def _workers(self) -> Iterator[Metric]:
        labels = ("worker",)
        up = GaugeMetricFamily(
            "headrace_router_worker_up", "Whether the worker takes requests", labels=labels
        )
        flight = GaugeMetricFamily(
            "headrace_router_worker_in_flight", "Requests at the worker", labels=labels
        )
        latency = GaugeMetricFamily(
            "headrace_router_worker_latency_seconds", "Expected latency (peak EWMA)", labels=labels
        )
        now = self._dispatcher.endpoints.now()
        for endpoint in self._dispatcher.endpoints.all():
            up.add_metric((endpoint.worker_id,), float(endpoint.reachable))
            flight.add_metric((endpoint.worker_id,), endpoint.in_flight)
            latency.add_metric((endpoint.worker_id,), endpoint.latency.value(now))
        yield from (up, flight, latency)

    def _breakers(self) -> Iterator[Metric]:
        ejections = CounterMetricFamily(
            "headrace_router_ejections", "Times that a worker was left out of a version", labels=_VERSION
        )
        spared = CounterMetricFamily(
            "headrace_router_ejections_spared",
            "Ejections that did not happen, since enough workers were out",
            labels=_VERSION,
        )
        states = GaugeMetricFamily(
            "headrace_router_breaker_open",
            "1: left out of the version, 0.5: being tried again, 0: had errors lately",
            labels=(*_VERSION, "worker"),
        )
        for key, group in self._dispatcher.endpoints.groups():
            ejections.add_metric(key, group.outliers.ejected_total)
            spared.add_metric(key, group.outliers.spared_total)
            for endpoint, breaker in group.outliers.breakers.items():
                states.add_metric((*key, endpoint.worker_id), _OPEN[breaker.state])
        yield from (ejections, spared, states)

    def _cache(self) -> Iterator[Metric]:
        store = self._store
        if store is None:
            return
        up = "Whether the result cache is asked at all"
        yield GaugeMetricFamily("headrace_router_cache_up", up, value=float(store.usable))
        for name, text, value in (
            ("round_trips", "Reads of the result cache", store.round_trips),
            ("failures", "Round trips to the result cache that failed or took too long", store.failures),
            ("dropped", "Answers that were not kept, since the result cache was away or slow", store.dropped),
        ):
            yield CounterMetricFamily(f"headrace_router_cache_{name}", text, value=float(value))

    def _table(self) -> Iterator[Metric]:
        revision = GaugeMetricFamily(
            "headrace_router_revision", "Revision of the deployment that is served", labels=("model",)
        )
        endpoints = GaugeMetricFamily(
            "headrace_router_endpoints", "Workers that can answer the version", labels=_VERSION
        )
        for route in self._dispatcher.table:
            revision.add_metric((route.model,), route.revision)
            for target in route.targets:
                endpoints.add_metric(target.key, len(self._dispatcher.endpoints.group(target.key).members))
        refused = GaugeMetricFamily(
            "headrace_router_refused",
            "Models whose newest deployment cannot be served, so that the one before it still is",
            value=float(len(self._dispatcher.table.refused)),
        )
        yield from (revision, endpoints, refused)
