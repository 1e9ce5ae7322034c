"""Whether the workers of a pool have a version, by what they say of themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
from headrace.v1.control_pb2 import LoadedVersion, WorkerStatus
from headrace.v1.tensor_pb2 import DataType, Signature, TensorSpec

from services.common.clock import ManualClock
from services.common.topics import chunks
from services.gateway.catalogue import Catalogue
from services.gateway.jobs.runtime import _groups
from services.gateway.keys import Key, Scope
from services.gateway.pools import READY, Condition, Pools, Speed, State
from services.gateway.rest.v2_routes import repository_index
from tests.fixtures.deployments import config, served
from tests.fixtures.followed import Followed

FAILED = Condition(State.UNAVAILABLE, "no such operator")
LOADING = Condition(State.LOADING)
X = TensorSpec(name="x", datatype=DataType.DATA_TYPE_FP32, shape=[-1, 1])
SIGNATURE = Signature(inputs=[X], outputs=[X], batched=True)
NOBODYS = Condition(State.UNAVAILABLE, "no worker has it")


class Heard:
    """Pools, and workers that say something every second."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.pools = Pools(self.clock)
        self.pools.table = Followed()
        self._beats = 0

    def say(self, worker: str, state: LoadedVersion.State | None, error: str = "", pool: str = "cpu") -> None:
        self._beats += 1
        status = WorkerStatus(worker_id=worker, pool=pool, interval_ms=1000, sequence=self._beats)
        if state is not None:
            status.versions.add(model="m", version="1", artifact_digest="d", state=state, error=error)
        self.pools.apply(worker.encode(), status.SerializeToString())

    def settled(self, *said: tuple[str, LoadedVersion.State | None, str]) -> None:
        """All of them say it for long enough."""
        for _ in range(5):
            for worker, state, error in said:
                self.say(worker, state, error)
            self.clock.advance(1)

    def condition(self, pool: str = "cpu", artifact: str = "d") -> Condition:
        return self.pools.condition(pool, "m", "1", artifact)


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([LoadedVersion.STATE_READY], READY),
        ([LoadedVersion.STATE_EVICTED], READY),
        ([LoadedVersion.STATE_FAILED, LoadedVersion.STATE_READY], READY),
        ([LoadedVersion.STATE_FAILED, LoadedVersion.STATE_FAILED], FAILED),
        ([LoadedVersion.STATE_FAILED, LoadedVersion.STATE_LOADING], LOADING),
        ([LoadedVersion.STATE_WARMING], LOADING),
        ([None], NOBODYS),
    ],
)
def test_the_best_worker_decides(states: list[LoadedVersion.State | None], expected: Condition) -> None:
    heard = Heard()
    reasons: dict[LoadedVersion.State | None, str] = {LoadedVersion.STATE_FAILED: "no such operator"}
    heard.settled(*[(f"w{n}", state, reasons.get(state, "")) for n, state in enumerate(states)])
    assert heard.condition() == expected
    assert heard.condition(pool="") == expected, "a deployment without a pool is everybody's"
    assert heard.condition(artifact="another") == NOBODYS


def test_a_worker_that_tries_again_has_still_failed() -> None:
    heard = Heard()
    heard.settled(("w", LoadedVersion.STATE_LOADING, "no such operator"))
    assert heard.condition() == FAILED


def test_a_pool_without_workers_is_named() -> None:
    heard = Heard()
    heard.settled(("w", LoadedVersion.STATE_READY, ""))
    condition = heard.condition(pool="gpu")
    assert condition == Condition(State.UNAVAILABLE, "no worker of pool 'gpu' is alive")


def test_where_nobody_is_heard_of_a_version_counts_as_ready() -> None:
    """The broker may be away, which requests do not need; and when it is back not all are heard at once."""
    heard = Heard()
    assert heard.condition() == READY, "nobody was heard of yet"
    heard.say("w", LoadedVersion.STATE_FAILED, "no such operator")
    heard.clock.advance(2.9)
    assert heard.condition() == READY, "others may not have said anything yet"
    heard.settled(("w", LoadedVersion.STATE_FAILED, "no such operator"))
    assert heard.condition() == FAILED
    heard.clock.advance(4)
    assert heard.condition() == READY, "silence"
    heard.say("w", LoadedVersion.STATE_FAILED, "no such operator")
    assert heard.condition() == READY, "the first after it"


def test_what_was_said_is_read_once_a_second() -> None:
    heard = Heard()
    heard.settled(("w", LoadedVersion.STATE_FAILED, "no such operator"))
    assert heard.condition() == FAILED
    heard.say("w", LoadedVersion.STATE_READY)
    assert heard.condition() == FAILED
    heard.clock.advance(1.1)
    assert heard.condition() == READY


def test_a_version_is_found_wherever_a_heartbeat_says_it() -> None:
    """Where it was in the one before is only where it is looked for first."""
    heard = Heard()
    ready, failed = LoadedVersion.STATE_READY, LoadedVersion.STATE_FAILED
    beats = [
        [("a", ready), ("m", failed), ("z", ready)],
        [("m", failed), ("a", ready), ("z", ready)],
        [("a", ready), ("z", ready), ("y", failed)],
        [("z", ready)],
        [],
        [("m", ready), ("a", failed)],
    ]
    for number, beat in enumerate(beats):
        for again in range(5 if number == 0 else 1):
            status = WorkerStatus(worker_id="w", pool="cpu", interval_ms=1000, sequence=10 * number + again)
            for model, state in beat:
                status.versions.add(
                    model=model, version="1", artifact_digest="d", state=state,
                    best_rows=8 if state == ready else 0, best_rows_per_s=float(number),
                )  # fmt: skip
            heard.pools.apply(b"w", status.SerializeToString())
            heard.clock.advance(1.1)
        for model in "amyz":
            said = dict(beat).get(model)
            condition = heard.pools.condition("cpu", model, "1", "d")
            assert condition.ready == (said == ready), (number, model)
            assert (condition == NOBODYS) == (said is None), (number, model)
            speed = Speed(1, 8, float(number)) if said == ready else Speed(1, 0, 0.0)
            assert heard.pools.speed("cpu", model, "1") == speed


def test_the_index_says_what_is_ready_and_why_the_rest_is_not() -> None:
    heard, catalogue = Heard(), Catalogue()
    heard.settled(("w", LoadedVersion.STATE_FAILED, "no such operator"))
    deployment = config("m", 1, served("1", "d", SIGNATURE), served("2", "e", SIGNATURE))
    deployment.pool = "cpu"
    catalogue.apply(b"m", deployment.SerializeToString())
    key = Key("k", frozenset({Scope.READ}), frozenset(), 0, b"", None)
    assert repository_index(catalogue, heard.pools, key) == [
        {"name": "m", "version": "1", "state": "UNAVAILABLE", "reason": "no such operator"},
        {"name": "m", "version": "2", "state": "UNAVAILABLE", "reason": "no worker has it"},
    ]
    assert repository_index(catalogue, heard.pools, key, ready=True) == []
    heard.clock.advance(5)
    assert len(repository_index(catalogue, heard.pools, key, ready=True)) == 2
    assert repository_index(catalogue, heard.pools, replace(key, models=frozenset({"other"}))) == []


def test_the_lag_of_a_pool_is_told_when_its_workers_have_gone() -> None:
    """What they set aside is there as before, and so is what nobody reads now."""
    heard, known = Heard(), set[str]()
    heard.settled(("w", LoadedVersion.STATE_READY, ""))
    before = _groups(heard.pools, 4, known)
    assert (chunks("cpu", 4), "cpu") in before
    heard.clock.advance(60)
    assert heard.pools.names() == []
    assert _groups(heard.pools, 4, known) == before
