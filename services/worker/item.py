"""A request on its way through the batcher, and requests that run together."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Final

from headrace.v1.dataplane_pb2 import Origin, PredictRequest

from services.common.errors import HeadraceError
from services.common.tensors import Buffer
from services.worker.input_layout import MergeKey
from services.worker.priorities import Rank, rank_of

_NORMAL: Final = Rank.NORMAL
_ONLINE: Final = Origin.ORIGIN_ONLINE

#: A PredictReply, serialised, or why there is none.
Answer = bytes | HeadraceError


class Release(Enum):
    """Why a batch left the queue; the label of `headrace_worker_batches_total`."""

    FULL = "full"  # as many rows as fit
    PREFERRED = "preferred"  # a size that the deployment names was reached
    TURN = "turn"  # no delay is asked for: what was queued when the event loop turned
    DELAY = "delay"  # the longest wait was over
    DEADLINE = "deadline"  # more rows or more waiting would have made a member late
    ALONE = "alone"  # one request of more rows than a batch has
    DRAIN = "drain"  # the worker is leaving


class Item:
    """One request on its way through the batcher. Settled exactly once, with a reply or an error, unless its
    caller cancelled it."""

    __slots__ = (
        "_settle",
        "data",
        "deadline",
        "done",
        "id",
        "key",
        "nbytes",
        "origin",
        "queue_us",
        "queued_at",
        "rank",
        "request",
        "rows",
    )

    def __init__(
        self,
        request: PredictRequest,
        rows: int,
        key: MergeKey,
        data: tuple[Buffer, ...],
        deadline: float,
        settle: Callable[[PredictRequest, Answer], None],
    ) -> None:
        self.request = request
        self.id = request.id
        self.rows = rows
        self.key = key
        self.data = data
        self.nbytes = len(data[0]) if len(data) == 1 else sum(map(len, data))
        self.deadline = deadline
        self.origin: int = request.origin
        self.rank = rank_of(request) if self.origin > _ONLINE or request.priority else _NORMAL
        self.queued_at = 0.0
        self.queue_us = 0
        self.done = False
        self._settle = settle

    def settle(self, answer: Answer) -> None:
        """Give the caller its answer; nothing happens where it has one or has gone."""
        if not self.done:
            self.done = True
            self._settle(self.request, answer)

    def abandon(self) -> None:
        """Its caller has gone: no answer will be delivered."""
        self.done = True


class Batch:
    """Requests that run together: one merge key, those of one priority class in order of arrival."""

    __slots__ = ("items", "reason", "rows")

    def __init__(self, items: list[Item], rows: int, reason: Release) -> None:
        self.items = items
        self.rows = rows
        self.reason = reason

    def nbytes(self) -> int:
        """Bytes of all inputs."""
        total = 0
        for item in self.items:
            total += item.nbytes
        return total
