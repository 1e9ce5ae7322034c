"""Every Kafka topic, with what the broker must be told about it before any client connects."""

from __future__ import annotations

from dataclasses import dataclass

PARTITIONS = 4


MINUTE_MS = 60_000
DAY_MS = 24 * 60 * MINUTE_MS


@dataclass(frozen=True, slots=True)
class Topic:
    """One topic: its name, its partition count and whether the broker keeps only the last record per key.

    `settings` are Kafka's names and values of what the topic is created with beside that.
    """

    name: str
    partitions: int = PARTITIONS
    compacted: bool = False
    settings: tuple[tuple[str, str], ...] = ()


def _compaction(*, roll_ms: int, tombstones_ms: int) -> tuple[tuple[str, str], ...]:
    """Settings of a compacted topic whose log stays near the size of its state.

    A broker never compacts the segment being written, which by default ends after a week or 1 GiB: it ends
    after `roll_ms` here. `tombstones_ms`: how long a follower may be behind and still see what was deleted.
    """
    return (
        ("segment.ms", str(roll_ms)),
        # Above the largest record, since none may be larger than a segment.
        ("segment.bytes", str(32 << 20)),
        ("min.cleanable.dirty.ratio", "0.1"),
        ("delete.retention.ms", str(tombstones_ms)),
    )


_KEPT = _compaction(roll_ms=60 * MINUTE_MS, tombstones_ms=DAY_MS)

DEPLOYMENTS = Topic("control.deployments.v1", partitions=1, compacted=True, settings=_KEPT)
KEYS = Topic("control.keys.v1", partitions=1, compacted=True, settings=_KEPT)
# A heartbeat a second and worker: a day of ten workers would be a million records to start a router.
WORKERS = Topic(
    "control.workers.v1",
    partitions=1,
    compacted=True,
    settings=_compaction(roll_ms=MINUTE_MS, tombstones_ms=MINUTE_MS),
)
#: What the ids there of a router's guests begin with, whom nobody else reaches: they say what they counted.
GUEST = "local:"
PREDICTIONS = Topic("inference.predictions.v1")
OUTCOMES = Topic("inference.outcomes.v1")
SHADOWS = Topic("inference.shadows.v1")
ALERTS = Topic("drift.alerts.v1", partitions=1)
TRIALS = Topic("control.trials.v1", partitions=1, compacted=True, settings=_KEPT)
VERDICTS = Topic("analytics.verdicts.v1", partitions=1)
JOBS = Topic("batch.jobs.v1")
JOB_RESULTS = Topic("batch.results.v1")
JOB_CONTROL = Topic("control.jobs.v1", partitions=1, compacted=True, settings=_KEPT)

#: Consumer groups that read with a dead-letter queue; the queue is `<topic>.<group>.dlq`.
GROUPS = {
    PREDICTIONS: ("analytics", "drift"),
    OUTCOMES: ("analytics", "drift"),
    SHADOWS: ("analytics",),
    ALERTS: ("registry",),
    VERDICTS: ("registry",),
    JOBS: ("gateway",),
    JOB_RESULTS: ("gateway",),
}

#: Consumer group of whoever replays a dead-letter queue: its lag is what still lies there.
REPLAY = "replay"


def chunks(pool: str, partitions: int = PARTITIONS) -> Topic:
    """Chunks of batch jobs for the workers of `pool`, who are its consumer group; partitions bound how many
    workers can share the work. Pools come and go with workers, so this one is not among `all_topics`."""
    return Topic(f"batch.chunks.{pool}.v1", partitions)


def dead_letters(topic: Topic, group: str) -> Topic:
    """The dead-letter queue of `group` reading `topic`."""
    return Topic(f"{topic.name}.{group}.dlq", partitions=1)


def all_topics() -> list[Topic]:
    """Every topic of the platform, dead-letter queues included."""
    sources = [
        DEPLOYMENTS,
        KEYS,
        WORKERS,
        PREDICTIONS,
        OUTCOMES,
        SHADOWS,
        ALERTS,
        TRIALS,
        VERDICTS,
        JOBS,
        JOB_RESULTS,
        JOB_CONTROL,
    ]
    return sources + [dead_letters(topic, group) for topic, groups in GROUPS.items() for group in groups]
