"""Edges of trials that need no database: workers without room, shadows that left, what queries say."""

from __future__ import annotations

from typing import Any

import pytest
from headrace.v1.control_pb2 import LoadedVersion, ServedVersion, ServingConfig, Shadow, WorkerStatus

from services.common.assignment import Buckets
from services.common.clock import ManualClock
from services.common.experiments import holdout_salt, layer_salt
from services.registry.experiment_endpoints import attribute_value
from services.registry.rollout_config import begin, restore_shadow
from services.registry.rollout_plan import Action, Readiness
from services.registry.rollout_steps import next_step
from services.registry.rollout_words import loading
from services.registry.workers import Workers
from tests.fixtures.rollouts import START, a_rollout, after, facts

CONFIG = ServingConfig(
    model="m", pool="default", versions=[ServedVersion(version="2", artifact_digest="sha256:2")]
)


def heard(**states: tuple[Any, str]) -> Readiness:
    """What is known of version 2 after one heartbeat of each worker."""
    workers = Workers(ManualClock())
    for worker_id, (state, error) in states.items():
        loaded = LoadedVersion(model="m", version="2", artifact_digest="sha256:2", state=state, error=error)
        status = WorkerStatus(
            pool="default", state=WorkerStatus.STATE_READY, interval_ms=1000, versions=[loaded]
        )
        workers.hear(worker_id, status)
    return workers.readiness(CONFIG, "2")


def test_a_worker_without_room_is_waited_for_with_its_words() -> None:
    known = heard(
        w1=(LoadedVersion.STATE_READY, ""),
        w2=(LoadedVersion.STATE_EVICTED, "12 MB are missing"),
        w3=(LoadedVersion.STATE_EVICTED, ""),
    )
    assert (known.workers, known.ready, known.complete, known.error) == (3, 1, False, "")
    words = loading(a_rollout(), known)
    assert words == "1 of 3 workers have loaded version 2 (w2: 12 MB are missing)"
    assert "made room" in heard(w3=(LoadedVersion.STATE_EVICTED, "")).no_room


class Table:
    """A topic that was read."""

    caught_up = False
    readings = 1

    async def ready(self, timeout: float) -> None:
        """It is."""


def test_a_dead_worker_is_not_heard_of_again_where_the_topic_is_read_once_more() -> None:
    clock, table = ManualClock(), Table()
    workers = Workers(clock)
    workers.table = table

    def said(worker_id: str, sequence: int, state: Any) -> tuple[bytes, bytes]:
        version = LoadedVersion(model="m", version="2", artifact_digest="sha256:2", state=state)
        status = WorkerStatus(
            pool="default",
            state=WorkerStatus.STATE_READY,
            interval_ms=1000,
            sequence=sequence,
            versions=[version],
        )
        return worker_id.encode(), status.SerializeToString()

    long_dead = said("w0", 9, LoadedVersion.STATE_FAILED)
    workers.apply(*long_dead)
    table.caught_up = True
    dead = said("w1", 7, LoadedVersion.STATE_FAILED)
    workers.apply(*dead)
    assert workers.readiness(CONFIG, "2") == Readiness(1, 0, "w1: no reason given", failed=1)
    # That it tries again is no success yet.
    workers.apply(*said("w1", 8, LoadedVersion.STATE_LOADING))
    assert workers.readiness(CONFIG, "2").failed == 1
    workers.apply(*said("w1", 9, LoadedVersion.STATE_READY))
    workers.apply(*said("w1", 10, LoadedVersion.STATE_LOADING))
    assert workers.readiness(CONFIG, "2") == Readiness(1, 0)
    dead = said("w1", 11, LoadedVersion.STATE_FAILED)
    workers.apply(*dead)
    clock.advance(3.1)
    workers.apply(*said("w2", 1, LoadedVersion.STATE_READY))
    for again in (long_dead, dead, said("w2", 1, LoadedVersion.STATE_READY)):
        workers.apply(*again)
    assert workers.readiness(CONFIG, "2") == Readiness(1, 1)
    clock.advance(2.9)
    assert workers.is_ready(CONFIG, "2")
    clock.advance(0.2)
    assert workers.readiness(CONFIG, "2") == Readiness(0, 0)
    # Once it is gone for good, its name may come back.
    workers.apply(b"w1", None)
    workers.apply(*dead)
    assert workers.readiness(CONFIG, "2").workers == 1


def test_who_is_heard_of_first_after_a_silence_does_not_speak_for_the_others() -> None:
    """The registry has started, or the broker was away: heartbeats come one after the other again."""
    clock = ManualClock()
    workers = Workers(clock)

    def hear(worker_id: str, state: Any) -> Readiness:
        loaded = LoadedVersion(model="m", version="2", artifact_digest="sha256:2", state=state, error="full")
        status = WorkerStatus(
            pool="default", state=WorkerStatus.STATE_READY, interval_ms=1000, versions=[loaded]
        )
        workers.hear(worker_id, status)
        return workers.readiness(CONFIG, "2")

    canary = a_rollout(step=1)
    loading_it = a_rollout(entered_at=None, clock_at=None)
    for _silence in range(2):
        failed = hear("w1", LoadedVersion.STATE_FAILED)
        assert next_step(canary, facts(canary, readiness=failed), START).action is Action.WAIT
        late = facts(loading_it, readiness=failed, waiting_since=START)
        assert next_step(loading_it, late, after(900)).action is Action.WAIT
        hear("w2", LoadedVersion.STATE_READY)
        clock.advance(1.5)
        hear("w1", LoadedVersion.STATE_FAILED)
        both = hear("w2", LoadedVersion.STATE_READY)
        assert both == Readiness(2, 1, "w1: full", failed=1)
        assert not both.settling
        clock.advance(10)
    ready = hear("w2", LoadedVersion.STATE_READY)
    assert next_step(loading_it, facts(loading_it, readiness=ready), START).action is Action.WAIT
    clock.advance(1.5)
    alone = hear("w2", LoadedVersion.STATE_READY)
    assert next_step(loading_it, facts(loading_it, readiness=alone), START).action is Action.ENTER
    for _beat in range(2):
        clock.advance(1.6)
        hear("w1", LoadedVersion.STATE_FAILED)
    hopeless = hear("w1", LoadedVersion.STATE_FAILED)
    assert next_step(canary, facts(canary, readiness=hopeless), START).action is Action.ROLL_BACK


def test_what_a_worker_says_can_be_stored() -> None:
    said = heard(w1=(LoadedVersion.STATE_FAILED, "byte \0 at 7" + "x" * 100_000)).error
    assert said.startswith("w1: byte \N{REPLACEMENT CHARACTER} at 7")
    assert len(said) == 2000


@pytest.mark.parametrize(("served", "shadow"), [(("1", "2", "3"), "3"), (("1", "2"), "")])
def test_a_shadow_that_is_not_served_any_more_is_none_again(served: tuple[str, ...], shadow: str) -> None:
    before = ServingConfig(shadow=Shadow(version="3", share=5))
    config = ServingConfig(
        versions=[ServedVersion(version=version) for version in served], shadow=Shadow(version="2", share=9)
    )
    restore_shadow(config, before, "2")
    assert config.shadow.version == shadow
    assert config.HasField("shadow") == bool(shadow)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("-7", -7),
        ("0.5", 0.5),
        ("1e3", 1000.0),
        ("true", True),
        ('"7"', "7"),
        # Python would take these for numbers; no caller who sends JSON does.
        ("1_000", "1_000"),
        (" 7", " 7"),
        ("7\n", "7\n"),
        ("\uff11\uff12", "\uff11\uff12"),
        ("nan", "nan"),
        ("1e999", "1e999"),
        ("9" * 5000, "9" * 5000),
        (str(1 << 63), str(1 << 63)),
    ],
)
def test_what_a_query_says_is_a_number_only_where_json_has_one(text: str, value: object) -> None:
    read = attribute_value(text)
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize("salt", [layer_salt, holdout_salt])
def test_models_with_long_names_are_assigned_independently(salt: Any) -> None:
    one, other = (Buckets(salt("x" * 62 + end)).of for end in "ab")
    units = [f"user-{number}".encode() for number in range(2000)]
    assert sum(one(unit) == other(unit) for unit in units) < 20


def test_every_rollout_meets_other_users_first() -> None:
    units = [f"user-{number}".encode() for number in range(5000)]
    met = []
    for rollout_id in ("rol_1", "rol_2"):
        config = ServingConfig(model="m", salt="m", versions=[ServedVersion(version="1", weight=10_000)])
        begin(config, [ServedVersion(version="2", held=True)], "2", rollout_id)
        assert [served.version for served in config.versions] == ["1", "2"]
        of = Buckets(config.salt).of
        met.append({unit for unit in units if of(unit) < 1000})
    assert len(met[0] & met[1]) < 100  # about 50 by chance, of about 500 each
