"""Every metric of the worker. Numbers are kept where the work is done and read here when somebody scrapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from headrace.v1.control_pb2 import LoadedVersion
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    UntypedMetricFamily,
)
from prometheus_client.registry import Collector

from services.common.eventlog import EventLog
from services.worker.desired import VersionKey
from services.worker.loaded_model import LoadedModel
from services.worker.model_host import ModelHost
from services.worker.priorities import RANKS
from services.worker.servicer import Servicer
from services.worker.stats import BATCH_ROWS, ModelStats

_VERSION = ("model", "version")

# Triton's names, without the _total that a Prometheus counter would get: existing dashboards ask for these.
_TRITON: dict[str, tuple[str, Callable[[ModelStats], float]]] = {
    "nv_inference_request_success": ("Requests answered", lambda s: s.succeeded),
    "nv_inference_count": ("Rows answered", lambda s: s.rows),
    "nv_inference_exec_count": ("Batches run", lambda s: s.runs + s.reruns),
    "nv_inference_request_duration_us": ("Arrival to answer, summed", lambda s: s.request_s * 1e6),
    "nv_inference_queue_duration_us": ("Waiting in the batcher, summed", lambda s: s.queue_s * 1e6),
    "nv_inference_compute_input_duration_us": ("Joining inputs, summed", lambda s: s.compute_input_s * 1e6),
    "nv_inference_compute_infer_duration_us": (
        "Running the model, summed",
        lambda s: s.compute_infer_s * 1e6,
    ),
    "nv_inference_compute_output_duration_us": (
        "Cutting outputs, summed",
        lambda s: s.compute_output_s * 1e6,
    ),
}


class WorkerMetrics(Collector):
    """Reads the totals of every loaded version, of the servicer and of the prediction log, where that is the
    worker's own."""

    def __init__(self, host: ModelHost, servicer: Servicer, log: EventLog | None) -> None:
        self._host = host
        self._servicer = servicer
        self._log = log

    def collect(self) -> Iterator[Metric]:
        """The metrics now."""
        # One that is on its way out and in again is there twice, and no two series have the same labels.
        versions = list({_labels(key): (key, model) for key, model in self._host.serving()}.values())
        for name, (text, read) in _TRITON.items():
            untyped = UntypedMetricFamily(name, text, labels=_VERSION)
            for key, model in versions:
                untyped.add_metric(_labels(key), read(model.stats))
            yield untyped
        yield from _failures(self._host.failed())
        yield from _batches(versions)
        yield from _load(versions)
        yield from self._process()

    def _process(self) -> Iterator[Metric]:
        states = GaugeMetricFamily(
            "headrace_worker_versions", "Versions by state", labels=("model", "version", "state")
        )
        for status in self._host.states():
            state = LoadedVersion.State.Name(status.state).removeprefix("STATE_").lower()
            states.add_metric((status.model, status.version, state), 1)
        yield states
        evicted = CounterMetricFamily(
            "headrace_worker_evictions", "Times a version left memory to make room", labels=_VERSION
        )
        for version, times in self._host.evictions.items():
            evicted.add_metric(version, times)
        yield evicted
        refused = CounterMetricFamily(
            "headrace_worker_refused", "Requests refused before they were queued", labels=("code",)
        )
        for code, count in self._servicer.refused.items():
            refused.add_metric((code,), count)
        yield refused
        if self._log is not None:
            yield from _logged(self._log)


def _logged(log: EventLog) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "headrace_worker_log_pending_bytes", "Prediction log not yet in Kafka", value=log.pending_bytes
    )
    yield GaugeMetricFamily(
        "headrace_worker_log_pending_records", "Records not yet in Kafka", value=log.pending_records
    )
    for name, text, value in (
        ("appended", "Records written to the prediction log", log.appended),
        ("published", "Records that Kafka acknowledged", log.published),
        ("replayed", "Records found from an earlier process", log.replayed),
        ("refused", "Records that found the log full", log.refused),
        ("publish_failures", "Publishes that failed and were tried again", log.publish_failures),
        ("set_aside", "Records that Kafka will never take, kept in a file", log.set_aside),
        ("torn_bytes", "Bytes that a crash left half written", log.dropped_bytes),
    ):
        yield CounterMetricFamily(f"headrace_worker_log_{name}", text, value=value)


def _labels(key: VersionKey) -> tuple[str, str]:
    return key.model, key.version


Versions = Iterable[tuple[VersionKey, LoadedModel]]


def _failures(counted: Iterable[tuple[VersionKey, Counter[str]]]) -> Iterator[Metric]:
    family = UntypedMetricFamily(
        "nv_inference_request_failure", "Requests failed", labels=(*_VERSION, "reason")
    )
    for labels, failed in {_labels(key): failed for key, failed in counted}.items():
        for reason, count in failed.items():
            family.add_metric((*labels, reason), count)
    yield family


def _batches(versions: Versions) -> Iterator[Metric]:
    released = CounterMetricFamily(
        "headrace_worker_batches", "Batches by the reason of their release", labels=(*_VERSION, "reason")
    )
    inline = CounterMetricFamily(
        "headrace_worker_inline_batches", "Batches run on the event loop", labels=_VERSION
    )
    reruns = CounterMetricFamily(
        "headrace_worker_reruns", "Runs of parts of a batch that failed as a whole", labels=_VERSION
    )
    omitted = CounterMetricFamily(
        "headrace_worker_payloads_omitted", "Requests logged without their large tensors", labels=_VERSION
    )
    rows = HistogramMetricFamily("headrace_worker_batch_rows", "Rows of a batch", labels=_VERSION)
    for key, model in versions:
        stats = model.stats
        for reason, count in stats.released.items():
            released.add_metric((*_labels(key), reason), count)
        inline.add_metric(_labels(key), stats.inline_runs)
        reruns.add_metric(_labels(key), stats.reruns)
        omitted.add_metric(_labels(key), stats.payloads_omitted)
        buckets, total = [], 0
        for bound, count in zip((*map(str, BATCH_ROWS), "+Inf"), stats.batch_rows, strict=True):
            total += count
            buckets.append((bound, float(total)))
        rows.add_metric(_labels(key), buckets, stats.batch_rows_sum)
    yield from (released, inline, reruns, omitted, rows)


def _load(versions: Versions) -> Iterator[Metric]:
    pending = GaugeMetricFamily("nv_inference_pending_request_count", "Requests waiting", labels=_VERSION)
    queued = GaugeMetricFamily("headrace_worker_queued_rows", "Rows waiting", labels=_VERSION)
    classes = GaugeMetricFamily(
        "headrace_worker_queued_rows_by_priority", "Rows waiting", labels=(*_VERSION, "priority")
    )
    running = GaugeMetricFamily("headrace_worker_running_rows", "Rows running", labels=_VERSION)
    expected = GaugeMetricFamily(
        "headrace_worker_run_seconds", "Expected run time of one row", labels=_VERSION
    )
    for key, model in versions:
        pending.add_metric(_labels(key), model.pending)
        queued.add_metric(_labels(key), model.queued_rows)
        for rank, rows in zip(RANKS, model.queued_rows_of, strict=True):
            classes.add_metric((*_labels(key), rank.name.lower()), rows)
        running.add_metric(_labels(key), model.running_rows)
        expected.add_metric(_labels(key), model.run_time.estimate(1))
    yield from (pending, queued, classes, running, expected)
