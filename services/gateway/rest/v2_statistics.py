"""The statistics extension of the Open Inference Protocol, as Triton has it.

Workers count, guests of routers as well, and say what in their heartbeats; here it is added up over those
alive, so that every gateway says the same, a second or two late, and zeros once the broker has been away for
a few seconds. Like another server's, a worker's counts begin with its process. What nobody counts is left
out: the time of failures, answers from the result cache (which never came to a worker; the routers' metrics
have them), and batches by their exact sizes (the workers' metrics have a histogram).
"""

from __future__ import annotations

from typing import Any

from open_inference.open_inference_pb2 import InferStatistics, ModelStatistics

from services.gateway.catalogue import Catalogue, ServedModel, ServedVersion
from services.gateway.keys import Key
from services.gateway.pools import Pools

_DURATIONS = (
    "success", "fail", "queue", "compute_input", "compute_infer", "compute_output",
    # Nobody counts these, but clients read them without asking whether they are there.
    "cache_hit", "cache_miss",
)  # fmt: skip


def model_statistics(
    catalogue: Catalogue, pools: Pools, key: Key, model: str = "", version: str = ""
) -> list[ModelStatistics]:
    """Of a version, all versions of a model, or of all models that `key` is for. Raises NotFound and
    PermissionDenied."""
    if model:
        key.require_model(model)
        served = catalogue.model(model)
        versions = [served.version(version)] if version else served.versions.values()
        return [_of(pools, served, one) for one in versions]
    return [
        _of(pools, served, one)
        for served in catalogue
        if not key.models or served.name in key.models
        for one in served.versions.values()
    ]


def as_json(statistics: ModelStatistics) -> dict[str, Any]:
    """The same over REST."""
    counted = statistics.inference_stats
    durations = {name: getattr(counted, name) for name in _DURATIONS}
    return {
        "name": statistics.name,
        "version": statistics.version,
        "last_inference": statistics.last_inference,
        "inference_count": statistics.inference_count,
        "execution_count": statistics.execution_count,
        "inference_stats": {name: {"count": one.count, "ns": one.ns} for name, one in durations.items()},
        "batch_stats": [],
    }


def _of(pools: Pools, model: ServedModel, version: ServedVersion) -> ModelStatistics:
    said = ModelStatistics(name=model.name, version=version.name, inference_stats=InferStatistics())
    counted = said.inference_stats
    for totals in pools.totals(model.name, version.name, version.artifact_digest):
        said.last_inference = max(said.last_inference, totals.last_ran_at_us // 1000)
        said.inference_count += totals.rows
        said.execution_count += totals.batches
        counted.success.count += totals.succeeded
        # Of all that were in a batch: the few that failed there took as long as their neighbours.
        counted.success.ns += totals.request_ns
        counted.fail.count += totals.failed
        for duration, ns in (
            (counted.queue, totals.queue_ns),
            (counted.compute_input, totals.compute_input_ns),
            (counted.compute_infer, totals.compute_infer_ns),
            (counted.compute_output, totals.compute_output_ns),
        ):
            duration.count += totals.ran
            duration.ns += ns
    return said
