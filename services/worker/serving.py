"""What a version is served with, and by."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from services.common.clock import Clock
from services.common.telemetry import Tracing
from services.worker.batch_queue import BatchPolicy
from services.worker.prediction_log import PayloadPolicy


class Log(Protocol):
    """The part of the event log that serving needs."""

    @property
    def usable(self) -> bool: ...

    def append_many(
        self, key: bytes, values: Sequence[bytes], headers: tuple[tuple[str, bytes], ...] = ()
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class Serving:
    """What all versions of a worker share."""

    clock: Clock
    log: Log
    tracing: Tracing
    pool: ThreadPoolExecutor
    #: Batches expected to take longer than this many seconds run in a thread.
    inline_below: float
    #: Batches with more bytes of input do so however fast they are, but for requests that run apart: joining
    #: these bytes, and serialising them for the log, would hold up the event loop.
    inline_bytes: int = 256 << 10
    #: Whole batches that run in less seconds are handed to their thread one ahead.
    ahead_below: float = 0.005


@dataclass(frozen=True, slots=True)
class ServingPolicy:
    """What the deployment says of a version, and may change while it is loaded. `timeout` is seconds."""

    batching: BatchPolicy
    payloads: PayloadPolicy
    timeout: float
