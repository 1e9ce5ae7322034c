"""Statistics of model versions, added up over the workers that live."""

from __future__ import annotations

from typing import Any

import pytest
from headrace.v1.control_pb2 import LoadedVersion, ServedVersion, ServingConfig, ServingTotals, WorkerStatus
from headrace.v1.tensor_pb2 import DataType, Signature, TensorSpec
from open_inference.open_inference_pb2 import ModelStatistics

from services.common.clock import ManualClock
from services.common.errors import NotFound, PermissionDenied
from services.gateway.catalogue import Catalogue
from services.gateway.keys import Key
from services.gateway.pools import Pools
from services.gateway.rest.v2_statistics import as_json, model_statistics
from tests.fixtures.followed import Followed

X = TensorSpec(name="x", datatype=DataType.DATA_TYPE_FP32, shape=[-1, 1])
TOTALS = ServingTotals(
    succeeded=3, rows=7, failed=2, batches=2, ran=4, request_ns=400, queue_ns=100, compute_input_ns=30,
    compute_infer_ns=200, compute_output_ns=10, last_ran_at_us=5_000_999,
)  # fmt: skip


class Platform:
    """Models `m` (two versions) and `stats`, and what their workers say."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.pools = Pools(self.clock)
        self.pools.table = Followed()
        self.catalogue = Catalogue()
        for model, names in (("m", ("1", "2")), ("stats", ("1",))):
            signature = Signature(inputs=[X], outputs=[X], batched=True)
            versions = [
                ServedVersion(version=name, artifact_digest=f"d{name}", signature=signature, weight=1)
                for name in names
            ]
            config = ServingConfig(model=model, revision=1, versions=versions)
            self.catalogue.apply(model.encode(), config.SerializeToString())
        self.beats = 0

    def say(self, worker: str, totals: ServingTotals | None, **more: Any) -> tuple[bytes, bytes]:
        self.beats += 1
        about = {"pool": more.pop("pool", "cpu"), "state": more.pop("state", WorkerStatus.STATE_READY)}
        status = WorkerStatus(worker_id=worker, interval_ms=1000, sequence=self.beats, **about)
        fields = {"model": "m", "version": "1", "artifact_digest": "d1", "totals": totals} | more
        status.versions.add(state=LoadedVersion.STATE_READY, **fields)
        record = worker.encode(), status.SerializeToString()
        self.pools.apply(*record)
        return record

    def of(self, model: str = "", version: str = "", models: tuple[str, ...] = ()) -> list[ModelStatistics]:
        self.clock.advance(1.1)  # heartbeats are not looked at for every question
        key = Key("k", frozenset({"read"}), frozenset(models), 0, b"", None)
        return model_statistics(self.catalogue, self.pools, key, model, version)


@pytest.fixture
def platform() -> Platform:
    return Platform()


def test_workers_are_added_up_whatever_their_pools(platform: Platform) -> None:
    later = ServingTotals()
    later.CopyFrom(TOTALS)
    later.last_ran_at_us = 9_000_000
    platform.say("a", TOTALS)
    platform.say("b", later, pool="gpu")
    platform.say("c", None)
    platform.say("older artifact", TOTALS, artifact_digest="d0")
    (found,) = platform.of("m", "1")
    assert as_json(found) == {
        "name": "m",
        "version": "1",
        "last_inference": 9000,
        "inference_count": 14,
        "execution_count": 4,
        "inference_stats": {
            "success": {"count": 6, "ns": 800},
            "fail": {"count": 4, "ns": 0},
            "queue": {"count": 8, "ns": 200},
            "compute_input": {"count": 8, "ns": 60},
            "compute_infer": {"count": 8, "ns": 400},
            "compute_output": {"count": 8, "ns": 20},
            "cache_hit": {"count": 0, "ns": 0},
            "cache_miss": {"count": 0, "ns": 0},
        },
        "batch_stats": [],
    }
    assert not found.inference_stats.HasField("cache_hit")


def test_who_is_gone_counts_no_more(platform: Platform) -> None:
    platform.say("a", TOTALS)
    platform.say("b", TOTALS)
    assert platform.of("m", "1")[0].inference_count == 14
    for _ in range(3):
        platform.say("a", TOTALS)
        platform.clock.advance(1.0)
    assert platform.of("m", "1")[0].inference_count == 7
    platform.clock.advance(5)
    assert platform.of("m", "1")[0].inference_count == 0


def test_guests_are_counted_and_nothing_else_is_known_of_them(platform: Platform) -> None:
    def say() -> None:
        platform.say("local:guest-0", TOTALS, state=WorkerStatus.STATE_GONE)

    platform.say("a", TOTALS)
    say()
    assert platform.of("m", "1")[0].inference_count == 14
    for _ in range(4):
        say()
        platform.clock.advance(1)
    assert platform.of("m", "1")[0].inference_count == 7
    assert platform.pools.workers("cpu") == 0
    platform.clock.advance(3)
    assert platform.of("m", "1")[0].inference_count == 0
    say()
    platform.pools.apply(b"local:guest-0", None)
    assert platform.of("m", "1")[0].inference_count == 0


def test_what_a_guest_said_before_anybody_listened_counts_for_nothing(platform: Platform) -> None:
    platform.pools.table = None
    platform.say("local:guest-0", TOTALS, state=WorkerStatus.STATE_GONE)
    assert platform.of("m", "1")[0].inference_count == 0


def test_a_topic_that_is_read_once_more_brings_no_guest_back(platform: Platform) -> None:
    pools = platform.pools
    table, pools.table = pools.table, None
    before = platform.say("local:before", TOTALS, state=WorkerStatus.STATE_GONE)
    pools.table = table
    since = platform.say("local:since", TOTALS, state=WorkerStatus.STATE_GONE)
    assert platform.of("m", "1")[0].inference_count == 7
    platform.clock.advance(5)
    assert platform.of("m", "1")[0].inference_count == 0
    for record in (before, since):
        pools.apply(*record)
    assert platform.of("m", "1")[0].inference_count == 0


def test_of_what_is_asked_for(platform: Platform) -> None:
    def named(model: str = "", version: str = "", models: tuple[str, ...] = ()) -> list[tuple[str, str]]:
        return [(one.name, one.version) for one in platform.of(model, version, models)]

    assert named("m") == [("m", "1"), ("m", "2")]
    assert named("m", "2") == [("m", "2")]
    assert named() == [("m", "1"), ("m", "2"), ("stats", "1")]
    assert named(models=("stats",)) == [("stats", "1")]
    assert named("stats") == [("stats", "1")]
    with pytest.raises(PermissionDenied):
        named("m", models=("stats",))
    for unknown in (("nobody",), ("m", "3")):
        with pytest.raises(NotFound):
            named(*unknown)
