"""A version that is deployed here and not loaded: requests for it wait until it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from services.common.clock import Clock
from services.common.errors import HeadraceError
from services.worker.batcher import Batcher, LoopTurns
from services.worker.input_layout import InputLayout
from services.worker.item import Batch, Item
from services.worker.loaded_model import LoadedModel
from services.worker.run_time import RunTime
from services.worker.serving import ServingPolicy


class Parked:
    """Stands in for a LoadedModel. Its queue has the bounds, priorities and deadlines of the version's own;
    nothing runs. `on_demand` is called when a request waits. Each item is settled exactly once: here with a
    refusal or its deadline, which `failed` counts by the name of the code, or by the model that takes it
    over."""

    def __init__(
        self,
        layout: InputLayout,
        policy: ServingPolicy,
        clock: Clock,
        on_demand: Callable[[], None],
        failed: Counter[str],
    ) -> None:
        self.layout = layout
        self._policy = policy
        self._on_demand = on_demand
        self._successor: LoadedModel | None = None
        self._batcher = Batcher(LoopTurns(clock), policy.batching, RunTime(), _never, slots=0)
        self._batcher.refused = failed

    @property
    def timeout(self) -> float:
        """Seconds that a request has whose caller set no deadline."""
        return self._policy.timeout

    @property
    def queued_rows(self) -> int:
        return self._batcher.queued_rows

    def configure(self, policy: ServingPolicy) -> None:
        """Hold requests by `policy` from now on."""
        self._policy = policy
        self._batcher.policy = policy.batching

    def submit(self, items: Sequence[Item]) -> None:
        """Let requests that arrived together wait."""
        self._batcher.submit(items)
        if self._batcher.queued_rows:
            self._on_demand()

    def cancel(self, item: Item) -> None:
        """Nobody waits for `item` any more, wherever it is by now."""
        if self._successor is not None:
            self._successor.cancel(item)
        else:
            self._batcher.cancel(item)

    def hand_over(self, model: LoadedModel) -> None:
        """The version is loaded: what waits goes on there."""
        self._successor = model
        waiting = self._batcher.withdraw_all()
        self._batcher.close()
        model.submit(waiting)

    def close(self, reason: HeadraceError) -> None:
        """Refuse what waits and what comes."""
        self._batcher.close(reason)


def _never(_batch: Batch) -> None:
    raise AssertionError("a batcher without slots releases nothing")
