"""Requests for a version that is not loaded: they wait, in bounds, until it is."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from headrace.v1.dataplane_pb2 import PredictReply
from headrace.v1.tensor_pb2 import Code

from services.common.clock import SystemClock
from services.common.errors import Unavailable
from services.worker.batch_queue import BatchPolicy
from services.worker.input_layout import InputLayout
from services.worker.parked import Parked
from services.worker.prediction_log import PayloadPolicy
from services.worker.serving import ServingPolicy
from tests.fixtures.loaded_model import SIGNATURE, Rig
from tests.fixtures.waiting import eventually


@pytest.fixture
def rig() -> Iterator[Rig]:
    pool = ThreadPoolExecutor(1)
    yield Rig(pool)
    pool.shutdown()


class Demand:
    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> None:
        self.times += 1


def park(demand: Demand, max_queue_rows: int = 64, failed: Counter[str] | None = None) -> Parked:
    policy = ServingPolicy(BatchPolicy(max_rows=4, max_queue_rows=max_queue_rows), PayloadPolicy(), 1.0)
    counted: Counter[str] = Counter() if failed is None else failed
    return Parked(InputLayout(SIGNATURE), policy, SystemClock(), demand, counted)


async def test_what_waits_is_answered_by_the_model_that_takes_over(rig: Rig) -> None:
    demand = Demand()
    parked = park(demand)
    items = [rig.item(number) for number in range(4)]
    parked.submit(items)
    assert demand.times == 1
    assert parked.queued_rows == 4
    parked.cancel(items[1])
    model = rig.start()
    rig.backend.gate.clear()
    parked.hand_over(model)
    # Whoever still holds the stand-in can cancel what has moved on.
    parked.cancel(items[2])
    rig.backend.gate.set()
    await eventually(lambda: len(rig.answers) == 2)
    assert rig.codes() == {0: Code.CODE_OK, 3: Code.CODE_OK}
    assert isinstance(rig.answers[3], PredictReply)


async def test_waiting_ends_at_the_deadline_and_with_the_stand_in(rig: Rig) -> None:
    parked = park(Demand())
    parked.submit([rig.item(1, seconds=0.02), rig.item(2, seconds=30.0)])
    await eventually(lambda: 1 in rig.answers)
    assert rig.codes() == {1: Code.CODE_DEADLINE_EXCEEDED}
    parked.close(Unavailable("no room", retry_after_ms=1000))
    assert rig.codes()[2] == Code.CODE_UNAVAILABLE
    parked.submit([rig.item(3)])
    assert rig.codes()[3] == Code.CODE_UNAVAILABLE


async def test_whom_it_refuses_is_counted(rig: Rig) -> None:
    failed: Counter[str] = Counter({"CODE_INTERNAL": 1})
    parked = park(Demand(), max_queue_rows=16, failed=failed)
    parked.submit([rig.item(number) for number in range(40)])
    refused = len(rig.answers)
    assert refused > 20
    assert failed == {"CODE_INTERNAL": 1, "CODE_RESOURCE_EXHAUSTED": refused}
    parked.close(Unavailable("no room"))
    assert failed == {
        "CODE_INTERNAL": 1,
        "CODE_RESOURCE_EXHAUSTED": refused,
        "CODE_UNAVAILABLE": 40 - refused,
    }


async def test_no_more_wait_than_the_queue_holds(rig: Rig) -> None:
    demand = Demand()
    parked = park(demand, max_queue_rows=16)
    parked.submit([rig.item(number) for number in range(40)])
    refused = [number for number, code in rig.codes().items() if code == Code.CODE_RESOURCE_EXHAUSTED]
    assert parked.queued_rows + len(refused) == 40
    assert parked.queued_rows <= 16
    await asyncio.sleep(0)
    assert demand.times == 1
