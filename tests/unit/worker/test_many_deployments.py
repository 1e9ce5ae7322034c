"""Hundreds of versions on one worker: what a start and an eviction cost grows no faster than their number."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from headrace.v1.control_pb2 import LoadedVersion, ServedVersion, ServingConfig, WorkerStatus

from services.common.clock import ManualClock
from services.common.lifecycle import Health
from services.worker.batch_queue import BatchPolicy
from services.worker.desired import Defaults, Deployments
from services.worker.eviction import Resident, victims
from services.worker.model_host import ModelHost
from services.worker.prediction_log import PayloadPolicy
from services.worker.status import StatusReport

DEFAULTS = Defaults(
    BatchPolicy(max_rows=64, max_queue_rows=1000), PayloadPolicy(request_bytes=5), timeout=30.0
)
MANY = 100


class Waits:
    """A loader whose loads never end."""

    async def load(self, *_: object) -> None:
        await asyncio.Event().wait()


def deployment(model: str, *versions: str) -> bytes:
    served = [ServedVersion(version=version, artifact_digest=f"sha256:{version}") for version in versions]
    return ServingConfig(model=model, revision=1, versions=served).SerializeToString()


async def test_a_record_has_only_its_own_model_looked_at() -> None:
    looked_at: list[str] = []

    def takes(served: ServedVersion) -> bool:
        looked_at.append(served.version)
        return True

    deployments = Deployments("default", DEFAULTS, takes)
    clock = ManualClock()
    host = ModelHost(deployments, Waits(), None, lambda: None, clock)  # type: ignore[arg-type]  # not used
    try:
        for number in range(MANY):
            host.apply(f"m{number}".encode(), deployment(f"m{number}", str(number)))
        assert looked_at == [str(number) for number in range(MANY)]
        host.apply(b"m7", deployment("m7", "7", "new"))
        host.apply(b"m8", None)
        states = {(one.model, one.version) for one in host.states()}
        assert {("m6", "6"), ("m7", "7"), ("m7", "new"), ("m9", "9")} <= states
        assert all(one.state == LoadedVersion.STATE_LOADING for one in host.states())
        assert host.desired("m7", "new") is not None
        assert host.desired("m8", "8") is None
    finally:
        await host.close()


def test_the_last_words_of_a_worker_do_not_say_what_it_had() -> None:
    """The topic keeps them, and in containers no worker has the name of another."""
    state = LoadedVersion(model="m", version="1", state=LoadedVersion.STATE_READY)
    host: Any = SimpleNamespace(serving=list, states=lambda: [state] * MANY)
    report = StatusReport("w", "default", ("", ""), host, Health(), ManualClock(), memory_limit=0)
    report.state = WorkerStatus.STATE_DRAINING
    assert len(report().versions) == MANY
    report.state = WorkerStatus.STATE_GONE
    assert not report().versions
    assert report().state == WorkerStatus.STATE_GONE


class Key:
    """Of a version; counts how often one is compared with another."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        Key.compared += 1
        return self is other

    __hash__ = object.__hash__


def test_who_makes_room_is_found_without_comparing_each_with_each() -> None:
    keys = [Key() for _ in range(MANY)]
    residents = [
        Resident(key, 10, carries=True, unused=number % 2 * 100.0, busy=False)  # type: ignore[arg-type]  # stands for a key
        for number, key in enumerate(keys)
    ]
    chosen = victims(residents, 10 * MANY, demanded=True, long_idle=60.0)
    assert [id(key) for key in chosen] == [id(key) for key in keys[1::2] + keys[::2]]
    assert Key.compared == 0
