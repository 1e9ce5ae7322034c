"""Running the rows of a chunk: run after run of the same size, in turns of the version's slot.

A run that fails is halved until the row at fault is alone. Between runs the slot is given back where requests
wait for it, and the job is asked whether it is still wanted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np
import structlog

from services.common.errors import (
    HeadraceError,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from services.worker.batch.results import Answers
from services.worker.batch.rows import Group, Inputs, Rows
from services.worker.best_batch import BestBatch
from services.worker.execution import Runner
from services.worker.item import Item
from services.worker.tensors import Array
from services.worker.turn import BulkTurn

log = structlog.get_logger(__name__)

# A turn ends after this long also where nobody waits.
_TURN_S = 0.05
# Where a job says nothing: this many bytes of input a run, at most this many rows, fewer of unknown size.
_RUN_BYTES = 1 << 20
_RUN_S = 0.003
_RUN_ROWS, _RUN_ROWS_OPEN = 1024, 32
# What is not the row's fault, as far as one can know, is tried again: a row that fails this often, a chunk's
# rows so many times in all, and a turn that is refused for this many times in a row.
_ROW_TRIES = 3
_CHUNK_RETRIES = 24
_REFUSALS = 8
_PAUSE_S, _PAUSE_MAX_S = 0.05, 2.0


class Version(Protocol):
    """A loaded version, or one that is being loaded again."""

    def submit(self, items: Sequence[Item]) -> None: ...

    def cancel(self, item: Item) -> None: ...


@dataclass(slots=True)
class _Task:
    """Rows `first` to before `end` of a group that have yet to run together."""

    group: int
    first: int
    end: int
    tries: int = 1


class _Collected:
    """The answers of one group, copied out of the runs, since a backend may use its arrays again."""

    def __init__(self, group: Group) -> None:
        self._places = group.places
        self._done = np.zeros(len(group.places), bool)
        self._outputs: dict[str, Array] = {}
        # Runs whose rows are of other shapes than the first run's.
        self._others: list[Answers] = []

    def put(self, first: int, outputs: dict[str, Array]) -> None:
        rows = len(next(iter(outputs.values())))
        if not self._outputs:
            count = len(self._places)
            self._outputs = {
                name: np.empty((count, *array.shape[1:]), array.dtype) for name, array in outputs.items()
            }
        part = slice(first, first + rows)
        if any(self._outputs[name].shape[1:] != array.shape[1:] for name, array in outputs.items()):
            copied = {name: array.copy() for name, array in outputs.items()}
            self._others.append(Answers(self._places[part], copied))
            return
        for name, array in outputs.items():
            self._outputs[name][part] = array
        self._done[part] = True

    def answers(self) -> list[tuple[Answers, np.ndarray | None]]:
        """Each with the rows of the group that it answers, None for all of them."""
        found: list[tuple[Answers, np.ndarray | None]] = []
        if self._done.all():
            found.append((Answers(self._places, self._outputs), None))
        elif self._done.any():
            rows = np.flatnonzero(self._done)
            outputs = {name: array[rows] for name, array in self._outputs.items()}
            found.append((Answers(self._places[rows], outputs), rows))
        return found + [(other, np.searchsorted(self._places, other.places)) for other in self._others]


class ChunkRun:
    """The rows of one chunk on their way through a version. `stop` is asked between runs, from a thread:
    what it returns ends the run."""

    def __init__(
        self,
        rows: Rows,
        inputs: Inputs,
        run_rows: int,
        threads: Executor,
        stop: Callable[[], HeadraceError | None],
    ) -> None:
        self.run_rows = run_rows if inputs.batched else 1
        #: Why rows of the run failed, by place.
        self.failures: dict[int, HeadraceError] = {}
        #: Set where the run ended before its last row.
        self.stopped: HeadraceError | None = None
        #: Seconds in which the model ran, and in which a turn was waited for.
        self.ran = 0.0
        self.waited = 0.0
        self._rows = rows
        self._batched = inputs.batched
        self._threads = threads
        self._stop = stop
        self._loop = asyncio.get_running_loop()
        self._collected = [_Collected(group) for group in rows.groups]
        self._tasks = [
            _Task(number, first, min(first + self.run_rows, len(group.places)))
            for number, group in enumerate(rows.groups)
            for first in range(0, len(group.places), self.run_rows)
        ]
        self._tasks.reverse()
        self._over = asyncio.Event()
        self._retries = _CHUNK_RETRIES
        self._retry = False
        self._refusal: HeadraceError | None = None
        self._asked_at = 0.0
        self._abandoned = False

    async def run(self, find: Callable[[], Version], turn_rows: int) -> None:
        """Run to the end, or until `stopped`. `find` gives the version, or raises; a turn counts for at most
        `turn_rows` rows. Raises what keeps the chunk from being run here, after several tries."""
        refusals = 0
        while self._tasks and self.stopped is None:
            self._over.clear()
            self._refusal, self._retry = None, False
            version = find()
            turn = BulkTurn(self, min(self.run_rows, turn_rows))
            self._asked_at = time.monotonic()
            version.submit([turn])
            try:
                await self._over.wait()
            except asyncio.CancelledError:
                self._abandoned = True
                version.cancel(turn)
                raise
            turn.forget()
            refusals = refusals + 1 if self._refusal is not None else 0
            if self._refusal is not None and refusals >= _REFUSALS:
                raise self._refusal
            if self._refusal is not None or self._retry:
                self.stopped = self.stopped or self._stop()
                await asyncio.sleep(min(_PAUSE_S * 2 ** max(0, refusals - 1), _PAUSE_MAX_S))

    def answers(self) -> list[tuple[Answers, dict[str, Array]]]:
        """What was answered, with the inputs of the same rows."""
        found = []
        for group, collected in zip(self._rows.groups, self._collected, strict=True):
            for answers, rows in collected.answers():
                inputs = group.arrays
                if rows is not None:
                    inputs = {name: array[rows] for name, array in group.arrays.items()}
                found.append((answers, dict(inputs)))
        return found

    def begin(self, runner: Runner, urgent: Callable[[], bool], over: Callable[[], object]) -> None:
        """See Bulk."""
        self.waited += time.monotonic() - self._asked_at
        try:
            self._threads.submit(self._turn, runner, urgent, over)
        except RuntimeError:  # the threads are gone: the worker is leaving
            over()
            self.refused(Unavailable("the worker is leaving"))

    def refused(self, error: HeadraceError) -> None:
        """See Bulk."""
        self._refusal = error
        self._over.set()

    def _turn(self, runner: Runner, urgent: Callable[[], bool], over: Callable[[], object]) -> None:
        started = time.monotonic()
        try:
            while self._tasks and not self._abandoned:
                self.stopped = self._stop()
                if self.stopped is not None:
                    break
                if not self._run_next(runner):
                    break
                if urgent() or time.monotonic() - started > _TURN_S:
                    break
        except Exception:  # a fault of this file: the slot must be given back whatever happens
            log.exception("batch_turn_failed")
            self._refusal = Internal("the rows could not be run")
        finally:
            self.ran += time.monotonic() - started
            over()
            self._loop.call_soon_threadsafe(self._over.set)

    def _run_next(self, runner: Runner) -> bool:
        """Run the next rows; False where the turn should end, to go on a little later."""
        task = self._tasks.pop()
        group = self._rows.groups[task.group]
        try:
            self._collected[task.group].put(task.first, self._attempt(runner, group, task))
        except (Unavailable, ResourceExhausted) as error:
            self._tasks.append(task)
            self._refusal = error
            return False
        except Exception as error:  # whatever a model raises, only its row fails
            return self._failed(task, group, error)
        return True

    def _attempt(self, runner: Runner, group: Group, task: _Task) -> dict[str, Array]:
        count = task.end - task.first
        part: slice | int = slice(task.first, task.end) if self._batched else task.first
        outputs = runner.backend.run(
            {name: array[part] for name, array in group.arrays.items()}, self._rows.outputs
        )
        if not self._batched:
            return {name: np.asarray(array)[np.newaxis] for name, array in outputs.items()}
        for name, array in outputs.items():
            if array.ndim == 0 or array.shape[0] != count:
                raise ValueError(f"output {name} has shape {list(array.shape)} for {count} rows of input")
        return outputs

    def _failed(self, task: _Task, group: Group, error: Exception) -> bool:
        if task.end - task.first > 1:
            middle = (task.first + task.end) // 2
            self._tasks.append(_Task(task.group, middle, task.end))
            self._tasks.append(_Task(task.group, task.first, middle))
            return True
        if not isinstance(error, InvalidArgument) and task.tries < _ROW_TRIES and self._retries:
            self._retries -= 1
            self._retry = True
            task.tries += 1
            self._tasks.append(task)
            return False
        if not isinstance(error, HeadraceError):
            log.warning("batch_row_failed", exc_info=error)
            error = Internal("the model failed on this input")
        self.failures[int(group.places[task.first])] = error
        return True


def rows_of_a_run(inputs: Inputs, best: BestBatch) -> int:
    """For a job that says nothing: a power of two, so that workers of like speed agree, with at most a
    megabyte of input. Others wait for a run, so it is short where the model's speed is known."""
    most = _by_size(inputs)
    if best.rows:
        most = min(most, best.rows_within(_RUN_S))
    return 1 << most.bit_length() - 1


def _by_size(inputs: Inputs) -> int:
    if any(spec.text or -1 in spec.shape for spec in inputs.specs):
        return _RUN_ROWS_OPEN
    row = sum(prod(spec.shape) * spec.dtype.itemsize for spec in inputs.specs)
    return max(1, min(_RUN_ROWS, _RUN_BYTES // max(1, row)))
