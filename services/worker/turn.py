"""A share of a version's time for work that is no request: it waits in the same queue, at the lowest class,
and has the slot for itself until it gives it back."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Protocol

from headrace.v1.dataplane_pb2 import Origin, PredictRequest

from services.common.errors import HeadraceError
from services.worker.execution import Runner
from services.worker.input_layout import MergeKey
from services.worker.item import Answer, Item


class Bulk(Protocol):
    """The work of one turn. Exactly one of the two is called, once, on the event loop."""

    def begin(self, runner: Runner, urgent: Callable[[], bool], over: Callable[[], object]) -> None:
        """Run the model, in a thread; not for long once `urgent()`, which any thread may ask: others wait for
        the slot. `over` gives it back, and is called once, from any thread. Must not raise."""
        ...

    def refused(self, error: HeadraceError) -> None:
        """There was no turn: the queue is full, the version is being unloaded, it could not be loaded."""
        ...


class BulkTurn(Item):
    """One turn in the queue of a version. It never runs together with requests or with another turn.

    `rows` is what it counts for against other classes: the rows that still run once somebody else waits."""

    __slots__ = ("bulk",)
    # Compiled by mypyc, only attributes named so can be deleted.
    __deletable__ = ("bulk",)

    def __init__(self, bulk: Bulk, rows: int) -> None:
        request = PredictRequest(origin=Origin.ORIGIN_BATCH)
        # No request has such a key, and no other turn.
        key: MergeKey = ((f"turn {id(self)}",), ())
        super().__init__(request, rows, key, (b"",), inf, self._settled)
        self.bulk = bulk

    def forget(self) -> None:
        """Its work is over. An item refers to itself, so what it holds would stay until a collection comes
        by, which with few and large objects is hardly ever."""
        del self.bulk

    def _settled(self, _request: PredictRequest, answer: Answer) -> None:
        if isinstance(answer, HeadraceError):
            self.bulk.refused(answer)
