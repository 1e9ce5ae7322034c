"""How far groups are behind, and what lies in their dead-letter queues, for whoever scrapes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import structlog
from prometheus_client import Gauge

from services.common.bus.port import Bus
from services.common.errors import HeadraceError
from services.common.topics import REPLAY, Topic, dead_letters

log = structlog.get_logger(__name__)


async def show_lag(
    bus: Bus,
    wanted: Callable[[], Sequence[tuple[Topic, str]]],
    lag: Gauge,
    set_aside: Gauge,
    period_s: float = 30.0,
) -> None:
    """Ask every `period_s` seconds, until cancelled. Both gauges have the label `topic`, the name of the one
    that a group in `wanted` reads."""
    while True:
        groups = list(wanted())
        asked = groups + [(dead_letters(topic, group), REPLAY) for topic, group in groups]
        try:
            standings = await bus.standings(asked)
            count = len(groups)
            for (topic, _), read, queue in zip(groups, standings[:count], standings[count:], strict=True):
                if read is not None:
                    lag.labels(topic.name).set(read.lag)
                # A queue that is not there holds nothing.
                set_aside.labels(topic.name).set(queue.lag if queue is not None else 0)
        except HeadraceError as error:
            log.info("lag_unknown", reason=error.message)
        except Exception:
            # The broker's client raises of its own, too; without lag the service goes on.
            log.exception("lag_failed")
        await asyncio.sleep(period_s)
