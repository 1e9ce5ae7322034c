"""The event bus. Read in this order: port, delivery, memory, admin, kafka, consume, table."""

from services.common.bus.kafka import KafkaBus
from services.common.bus.memory import MemoryBus
from services.common.bus.port import Bus, Handler, Malformed, Record, Table

__all__ = ["Bus", "Handler", "KafkaBus", "Malformed", "MemoryBus", "Record", "Table"]
