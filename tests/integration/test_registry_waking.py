"""What changes a trial wakes the registry's controller, which looks seldom by itself while none is open."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from deploy.embedded.tansu import TansuServer
from services.common.bus.admin import ensure_topics
from services.registry import app
from services.registry.controller import Actor, Controller
from services.registry.edge import Edge
from services.registry.repository import Repository
from tests.fixtures.onnx_files import linear
from tests.fixtures.registry import Running, registry_settings, running_registry
from tests.fixtures.registry_trials import TOPICS
from tests.fixtures.waiting import eventually

#: No test lives to see the controller look by itself.
_INTERVAL_S = 3600.0
_SOON_S, _SELDOM_S = 2 * _INTERVAL_S, 10 * _INTERVAL_S
ROLLOUT = {"model": "m", "version": "2"}
EXPERIMENT = {"model": "m", "variants": [{"name": "a", "version": "1"}, {"name": "b", "version": "2"}]}


class Looks:
    """Counts the controller's looks. It is asked behind the actors of the registry."""

    kind = "looks"
    actions = ()
    is_open = False

    def __init__(self) -> None:
        self.count = 0

    async def candidates(self, tx: Repository, now: datetime) -> Sequence[str]:
        self.count += 1
        return ()

    async def act(self, tx: Repository, trial_id: str, now: datetime) -> str | None:
        raise AssertionError("nothing was found")


@dataclass
class Case:
    """A registry whose controller looks when it is woken, and only then."""

    running: Running
    controller: Controller
    looks: Looks

    async def call(self, method: str, path: str, body: Any) -> dict[str, Any]:
        answer = await self.running.rest.request(method, f"/v1/{path}", json=body)
        assert answer.is_success, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def wakes(self, method: str, path: str, body: Any, pause_s: float) -> dict[str, Any]:
        """A call that wakes the controller, which rests for `pause_s` behind its look."""
        before = self.looks.count
        answer = await self.call(method, path, body)
        await eventually(lambda: self.looks.count > before)
        await eventually(lambda: self.controller._pause_s(0, failed=False) == pause_s)
        return answer


@pytest.fixture
async def case(
    database_url: str, new_tansu: Callable[[], TansuServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Case]:
    broker = new_tansu().url
    await ensure_topics(broker, TOPICS)
    made: list[Controller] = []
    looks = Looks()

    def slow(edge: Edge, actors: Iterable[Actor]) -> Controller:
        made.append(Controller(edge, [*actors, looks], _INTERVAL_S))
        return made[0]

    monkeypatch.setattr(app, "Controller", slow)
    async with running_registry(
        registry_settings(database_url, broker, tmp_path, republish_check_s=3600.0)
    ) as running:
        await running.make("m", linear(weight=1), linear(weight=2))
        await running.deploy("m", {"1": 100})
        await eventually(lambda: looks.count == 1)
        yield Case(running, made[0], looks)


async def test_a_rollout_that_begins_or_ends_wakes_it(case: Case) -> None:
    assert case.controller._pause_s(0, failed=False) == _SELDOM_S
    made = await case.wakes("POST", "rollouts", ROLLOUT, _SOON_S)
    await case.wakes("POST", f"rollouts/{made['rollout_id']}/abort", {}, _SELDOM_S)


async def test_an_experiment_that_begins_or_ends_wakes_it(case: Case) -> None:
    # What it is about serves already: it runs at once, and when it is stopped its evidence still grows.
    await case.running.deploy("m", {"1": 50, "2": 50})
    made = await case.wakes("POST", "experiments", EXPERIMENT, _SELDOM_S)
    path = f"experiments/{made['experiment_id']}"
    await case.wakes("POST", f"{path}/start", {}, _SOON_S)
    await case.wakes("POST", f"{path}/stop", {}, _SELDOM_S)


async def test_what_changes_no_trial_wakes_nobody(case: Case) -> None:
    await case.call("PUT", "models/m/aliases/champion", {"version": "1"})
    await case.running.deploy("m", {"1": 100}, log_payloads=False)
    await case.wakes("POST", "experiments", EXPERIMENT, _SELDOM_S)
    assert case.looks.count == 2
