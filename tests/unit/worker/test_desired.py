"""What a pool should serve."""

from __future__ import annotations

from typing import Any

import pytest
from headrace.v1.control_pb2 import Batching, Experiment, ServedVersion, ServingConfig, Variant
from headrace.v1.tensor_pb2 import Signature

from services.common.errors import InvalidArgument
from services.worker.batch_queue import BatchPolicy
from services.worker.desired import Defaults, Deployments, VersionKey, defaults_of
from services.worker.prediction_log import PayloadPolicy
from services.worker.settings import Settings

DEFAULTS = Defaults(
    BatchPolicy(max_rows=64, max_queue_rows=1000), PayloadPolicy(request_bytes=5), timeout=30.0
)
KEY = VersionKey("net", "1", "sha256:1")


def deployment(revision: int = 1, **changes: object) -> ServingConfig:
    version = ServedVersion(version="1", artifact_digest="sha256:1", signature=Signature(batched=True))
    given = {"model": "net", "revision": revision, "versions": [version], "pool": "default"}
    return ServingConfig(**(given | changes))  # type: ignore[arg-type]  # fields of the message


def after(*configs: ServingConfig | None) -> Deployments:
    deployments = Deployments("default", DEFAULTS)
    for config in configs:
        deployments.apply(b"net", config.SerializeToString() if config else None)
    return deployments


def test_versions_of_the_own_pool_are_wanted() -> None:
    assert set(after(deployment()).desired_of("net")) == {KEY}
    assert after(deployment(pool="gpu")).desired_of("net") == {}
    # A deployment that names no pool is everybody's.
    assert set(after(deployment(pool="")).desired_of("net")) == {KEY}


def test_versions_of_experiments_and_rollouts_carry_traffic_without_a_share_of_it() -> None:
    versions = [
        ServedVersion(version="1", weight=10_000),
        ServedVersion(version="2"),
        ServedVersion(version="3", held=True),
        ServedVersion(version="4"),
    ]
    variants = [Variant(name="a", version="1"), Variant(name="b", version="4")]
    given = deployment(versions=versions, experiments=[Experiment(variants=variants)])
    carries = {key.version: desired.carries for key, desired in after(given).desired_of("net").items()}
    assert carries == {"1": True, "2": False, "3": True, "4": True}


def test_an_older_revision_is_ignored_and_a_deletion_forgets_it() -> None:
    assert after(deployment(5, versions=[]), deployment(4)).desired_of("net") == {}
    assert set(after(deployment(5, versions=[]), deployment(5)).desired_of("net")) == {KEY}
    gone = after(deployment(5), None)
    assert gone.desired_of("net") == {}
    # Deployed anew, revisions may begin again.
    assert set(after(deployment(5, versions=[]), None, deployment(1)).desired_of("net")) == {KEY}


def test_batches_grow_beyond_the_default_where_the_deployment_says_nothing_of_them() -> None:
    def batching(**said: Any) -> BatchPolicy:
        return after(deployment(batching=Batching(**said))).desired_of("net")[KEY].policy.batching

    silent = batching(max_queue_rows=100, max_queue_ms=7)
    assert silent.grows
    assert (silent.grown(8).max_rows, silent.grown(8).max_queue_rows) == (64, 100)
    assert (silent.grown(512).max_rows, silent.grown(512).max_queue_rows) == (512, 512)
    for said in ({"max_rows": 64}, {"max_delay_us": 1}, {"preferred_rows": [8]}):
        assert batching(**said).grown(512).max_rows == 64


def test_the_deployment_decides_over_the_defaults() -> None:
    policy = after(deployment()).desired_of("net")[KEY].policy
    assert (policy.batching.max_rows, policy.batching.max_delay, policy.timeout) == (64, 0.0, 30.0)
    assert policy.payloads == PayloadPolicy(enabled=False, request_bytes=5)
    batching = Batching(max_rows=16, max_delay_us=1500, preferred_rows=[8, 4, 32, 0], max_queue_rows=8)
    given = deployment(batching=batching, log_payloads=True, default_timeout_ms=250)
    policy = after(given).desired_of("net")[KEY].policy
    assert policy.batching.max_delay == pytest.approx(0.0015)
    assert policy.batching.preferred_rows == (4, 8)
    # A queue that could not hold one batch would refuse what the model can take.
    assert policy.batching.max_queue_rows == 16
    assert (policy.timeout, policy.payloads.enabled) == (0.25, True)


def test_a_model_that_is_not_batched_runs_its_requests_alone() -> None:
    version = ServedVersion(version="1", artifact_digest="sha256:1")
    given = deployment(versions=[version], batching=Batching(max_rows=16, max_delay_us=9000))
    batching = after(given).desired_of("net")[KEY].policy.batching
    assert (batching.max_rows, batching.max_delay) == (1, 0.0)


def test_a_record_that_cannot_be_read_is_named() -> None:
    with pytest.raises(InvalidArgument, match="the deployment of net"):
        Deployments("default", DEFAULTS).apply(b"net", b"\xff\xff")


def test_the_longest_wait_is_the_deployments_or_the_workers() -> None:
    (desired,) = after(deployment(batching=Batching(max_queue_ms=250))).desired_of("net").values()
    assert desired.policy.batching.max_queue == 0.25
    (desired,) = after(deployment()).desired_of("net").values()
    assert desired.policy.batching.max_queue == DEFAULTS.batching.max_queue


def test_what_a_worker_does_not_take_is_left_to_others() -> None:
    small = ServedVersion(version="1", artifact_digest="sha256:1", artifact_bytes=10)
    large = ServedVersion(version="2", artifact_digest="sha256:2", artifact_bytes=11)
    deployments = Deployments("default", DEFAULTS, lambda version: version.artifact_bytes <= 10)
    deployments.apply(b"net", deployment(versions=[small, large]).SerializeToString())
    assert set(deployments.desired_of("net")) == {KEY}
    # The same version, changed: its name decides nothing.
    small.artifact_bytes = 11
    deployments.apply(b"net", deployment(2, versions=[small, large]).SerializeToString())
    assert deployments.desired_of("net") == {}


def test_the_environment_says_what_deployments_do_not() -> None:
    given = Settings(
        kafka_bootstrap_servers="unused:1", internal_token="a-token-for-tests", artifact_store_url="file:///x",
        max_rows=3, max_queue_rows=5, max_queue_bytes=1 << 20, max_queue_ms=7, default_timeout_s=9.0,
        log_small_payload_bytes=11, log_payload_max_bytes=12, log_large_payload_bytes_per_s=13,
    )  # fmt: skip
    assert defaults_of(given) == Defaults(
        BatchPolicy(max_rows=3, max_queue_rows=5, max_queue_bytes=1 << 20, max_queue=0.007),
        PayloadPolicy(small_bytes=11, request_bytes=12, large_bytes_per_s=13),
        9.0,
    )
