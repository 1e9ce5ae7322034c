"""What librdkafka says of a broker that is away, said once per outage: it tries again by itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

#: Attempts follow each other within a second or two; the first after such a pause is another outage.
_PAUSE_S = 15.0
#: Names of librdkafka's own log events: a connection failed or broke, all brokers are away.
_EVENTS = ("FAIL", "ERROR")


class OncePerOutage(logging.Filter):
    """Lets the first failed connection through as a warning and holds the following ones back. Everything
    else passes as it is."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._now = now
        self._last: float | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        """See logging.Filter."""
        if record.levelno < logging.ERROR or not record.getMessage().startswith(_EVENTS):
            return True
        before, self._last = self._last, self._now()
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        return before is None or self._last - before > _PAUSE_S


#: The logger for clients of librdkafka.
log = logging.getLogger("services.worker.batch.rdkafka")
log.addFilter(OncePerOutage())
