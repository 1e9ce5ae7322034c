"""What a rollout does to the configuration that is served, and what a worker makes of it."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

from headrace.v1.control_pb2 import ServedVersion, ServingConfig

from services.registry import rollout_config
from services.registry.rollout_plan import Status
from services.registry.rollout_schemas import StepIn
from services.registry.serving_config import release, set_weights
from services.worker.batch_queue import BatchPolicy
from services.worker.desired import Defaults, Deployments
from services.worker.prediction_log import PayloadPolicy
from tests.fixtures.rollouts import a_rollout

DEFAULTS = Defaults(BatchPolicy(max_rows=8, max_queue_rows=8), PayloadPolicy(request_bytes=5), timeout=30.0)
STEPS = (Decimal("0.01"), Decimal("0.1"), Decimal("0.5"), Decimal(1))


def served(*versions: str) -> ServingConfig:
    config = ServingConfig(model="m", versions=[ServedVersion(version=version) for version in versions])
    set_weights(config, {"1": 10_000})
    return config


def carrying(config: ServingConfig) -> set[str]:
    """The versions whose room a worker gives to no idle one."""
    worker = Deployments("", DEFAULTS)
    worker.apply(b"m", config.SerializeToString())
    return {key.version for key, desired in worker.desired_of("m").items() if desired.carries}


def entered(config: ServingConfig, before: ServingConfig, step: int) -> None:
    rollout = replace(a_rollout(step=step), status=Status.BAKING if step == 3 else Status.RUNNING)
    rollout_config.enter_step(config, before, rollout, StepIn(weight=STEPS[step]))


def test_the_previous_version_keeps_its_room_while_the_new_one_bakes() -> None:
    before = served("1", "3")
    config = served("1", "3")
    rollout_config.begin(config, [ServedVersion(version="2", held=True)], "2", "rol_1")
    assert carrying(config) == {"1", "2"}
    for step in range(4):
        entered(config, before, step)
        assert carrying(config) == {"1", "2"}
    assert {version.version: version.weight for version in config.versions} == {"1": 0, "2": 10_000, "3": 0}
    rollout_config.hand_over(config, "2", "1", keep_previous=False)
    release(config, [])
    assert [(version.version, version.held) for version in config.versions] == [("3", False), ("2", False)]


def test_going_back_leaves_nothing_held_that_was_not() -> None:
    """Also of a new version that had been deployed without traffic, which has to be loaded all the same."""
    for versions, added in (("12", []), ("1", [ServedVersion(version="2", held=True)])):
        before, config = served(*versions), served(*versions)
        rollout_config.begin(config, added, "2", "rol_1")
        assert carrying(config) == {"1", "2"}
        entered(config, before, 3)
        rollout_config.restore(config, before, "2")
        release(config, [])
        assert list(config.versions) == list(before.versions)


def test_a_rollout_that_is_given_up_takes_the_previous_version_from_nobody() -> None:
    before, config = served("1"), served("1")
    rollout_config.begin(config, [ServedVersion(version="2", held=True)], "2", "rol_1")
    entered(config, before, 3)
    rollout_config.let_go(config, before, "2")
    release(config, [])
    assert {version.version for version in config.versions} == {"1", "2"}
