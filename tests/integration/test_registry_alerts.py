"""Drift alerts reach the models they are about."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from headrace.v1.events_pb2 import DriftAlert

from deploy.embedded.tansu import TansuServer
from services.common.bus import KafkaBus, Record
from services.common.bus.admin import ensure_topics
from services.common.topics import ALERTS, DEPLOYMENTS, KEYS, dead_letters
from services.registry.alerts import GROUP, KEPT
from tests.fixtures.registry import Running, following, registry_settings, running_registry
from tests.fixtures.waiting import eventually_of


def alert(number: int, feature: str, **changes: Any) -> Record:
    event = DriftAlert(
        alert_id=number.to_bytes(16, "big"),
        model="churn",
        version="1",
        feature=feature,
        detector="psi",
        value=0.3,
        threshold=0.2,
        severity=DriftAlert.SEVERITY_CRITICAL,
        window_start_us=1_750_000_000_000_000,
        window_end_us=1_750_000_060_000_000,
    )
    event.MergeFrom(DriftAlert(**changes))
    return Record(ALERTS.name, b"churn", event.SerializeToString())


async def alerts_until(running: Running, condition: Callable[[list[dict[str, Any]]], bool]) -> None:
    async def alerts() -> list[dict[str, Any]]:
        answer = await running.rest.get("/v1/models/churn/alerts", params={"limit": KEPT})
        found: list[dict[str, Any]] = answer.json()["alerts"]
        return found

    await eventually_of(alerts, condition)


async def test_alerts_are_stored_once_and_the_newest_kept(
    database_url: str, new_tansu: Callable[[], TansuServer], tmp_path: Path
) -> None:
    broker = new_tansu()
    dead = dead_letters(ALERTS, GROUP)
    await ensure_topics(broker.url, [DEPLOYMENTS, KEYS, ALERTS, dead])
    async with (
        KafkaBus(broker.url, "test", session_timeout=2.0) as bus,
        running_registry(registry_settings(database_url, broker.url, tmp_path)) as running,
    ):
        await running.make("churn")
        nonsense = Record(ALERTS.name, b"churn", b"\xff\xff")
        await bus.publish([alert(1, "age"), nonsense, alert(1, "age"), alert(2, "income")])
        await alerts_until(running, lambda found: len(found) == 2)
        answer = await running.rest.get("/v1/models/churn/alerts")
        found = {entry["feature"]: entry for entry in answer.json()["alerts"]}
        assert (found["age"]["detector"], found["age"]["value"], found["age"]["severity"]) == (
            "psi",
            0.3,
            "critical",
        )
        assert found["age"]["window_end"] == "2025-06-15T15:07:40Z"
        # It grows worse: drift publishes the same alert anew.
        await bus.publish([alert(1, "age", value=0.7, message="worse"), alert(3, "zip")])
        await alerts_until(running, lambda found: len(found) == 3)
        listed = (await running.rest.get("/v1/models/churn/alerts")).json()["alerts"]
        assert listed[0]["feature"] == "zip"
        (worse,) = (entry for entry in listed if entry["feature"] == "age")
        assert (worse["value"], worse["message"]) == (0.7, "worse")
        await bus.publish([alert(number, "age") for number in range(10, 10 + KEPT)])
        await alerts_until(
            running, lambda found: len(found) == KEPT and all(e["feature"] == "age" for e in found)
        )
        async with following(broker.url, dead) as buried:
            assert list(buried.values()) == [b"\xff\xff"]
        assert (await running.rest.get("/v1/models/nobody/alerts")).status_code == 404
