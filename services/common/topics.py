"""Every Kafka topic, with what the broker must be told about it before any client connects."""

from __future__ import annotations

from dataclasses import dataclass

PARTITIONS = 4


@dataclass(frozen=True, slots=True)
class Topic:
    """One topic: its name, its partition count and whether the broker keeps only the last record per key."""

    name: str
    partitions: int = PARTITIONS
    compacted: bool = False


DEPLOYMENTS = Topic("control.deployments.v1", partitions=1, compacted=True)
KEYS = Topic("control.keys.v1", partitions=1, compacted=True)
WORKERS = Topic("control.workers.v1", partitions=1, compacted=True)
PREDICTIONS = Topic("inference.predictions.v1")
OUTCOMES = Topic("inference.outcomes.v1")
ALERTS = Topic("drift.alerts.v1", partitions=1)

#: Consumer groups that read with a dead-letter queue; the queue is `<topic>.<group>.dlq`.
GROUPS = {PREDICTIONS: ("analytics", "drift"), OUTCOMES: ("analytics", "drift"), ALERTS: ("registry",)}

#: Consumer group of whoever replays a dead-letter queue: its lag is what still lies there.
REPLAY = "replay"


def dead_letters(topic: Topic, group: str) -> Topic:
    """The dead-letter queue of `group` reading `topic`."""
    return Topic(f"{topic.name}.{group}.dlq", partitions=1)


def all_topics() -> list[Topic]:
    """Every topic of the platform, dead-letter queues included."""
    sources = [DEPLOYMENTS, KEYS, WORKERS, PREDICTIONS, OUTCOMES, ALERTS]
    return sources + [dead_letters(topic, group) for topic, groups in GROUPS.items() for group in groups]
