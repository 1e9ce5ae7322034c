"""The event bus. Read in this order: port, delivery, memory, admin, kafka, membership, consume, follower,
fetch_wait, topic_log, table, snapshot, followed, dead_letters, lag_gauges,
stopping."""

from services.common.bus.dead_letters import DeadLetters, Letter, Queue
from services.common.bus.followed import followed
from services.common.bus.follower import Follower
from services.common.bus.kafka import KafkaBus
from services.common.bus.memory import MemoryBus
from services.common.bus.port import Bus, Handler, Malformed, Record, Standing, Table

__all__ = [
    "Bus",
    "DeadLetters",
    "Follower",
    "Handler",
    "KafkaBus",
    "Letter",
    "Malformed",
    "MemoryBus",
    "Queue",
    "Record",
    "Standing",
    "Table",
    "followed",
]
