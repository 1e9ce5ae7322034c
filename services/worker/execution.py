"""Running one batch: join, run, cut, and when a run fails, find the member at fault. No event loop here: it
runs inline or in a thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from headrace.v1.tensor_pb2 import Signature

from services.common.errors import DeadlineExceeded, HeadraceError, Internal
from services.worker.backends.port import Backend, KeptBuffers
from services.worker.input_layout import InputLayout, MergeKey
from services.worker.item import Batch, Item
from services.worker.tensors import Array, Buffer, OutputColumn, to_array, to_column


class Part:
    """Members of a batch whose run succeeded together. `inputs` is per input the joined bytes. `key` stands
    in for the members' own where that leaves the length of their rows open."""

    # No dataclass, as nothing is that every batch makes: compiled, theirs would be the one constructor that
    # is not, and take ten times as long.
    __slots__ = ("columns", "inputs", "items", "key", "rows")

    def __init__(
        self,
        items: tuple[Item, ...],
        rows: int,
        inputs: list[Buffer],
        columns: list[OutputColumn],
        key: MergeKey | None = None,
    ) -> None:
        self.items = items
        self.rows = rows
        self.inputs = inputs
        self.columns = columns
        self.key = key


class Execution:
    """What became of a batch: its members in `parts` or in `failures`, each in exactly one. Durations are
    seconds; `infer` is the backend's share of the three. `reruns` counts runs beyond the first, `fault` is
    what was raised where a failure is not the caller's."""

    __slots__ = ("cut", "failures", "fault", "infer", "parts", "prepare", "reruns")

    def __init__(
        self,
        parts: list[Part],
        failures: list[tuple[Item, HeadraceError]],
        prepare: float,
        infer: float,
        cut: float,
        reruns: int = 0,
        fault: Exception | None = None,
    ) -> None:
        self.parts = parts
        self.failures = failures
        self.prepare = prepare
        self.infer = infer
        self.cut = cut
        self.reruns = reruns
        self.fault = fault


class Runner:
    """Runs batches of one model version on its backend, never more than `max_rows` rows at once."""

    def __init__(self, backend: Backend, signature: Signature, layout: InputLayout) -> None:
        self.backend = backend
        self.layout = layout
        given = {spec.name: spec.datatype for spec in signature.outputs}
        self._datatypes = {**given, **layout.extra_outputs}
        self._given = [(spec.name, spec.datatype) for spec in signature.outputs]
        self._kept: KeptBuffers | None = None
        if layout.batched and layout.fixed and isinstance(backend, KeptBuffers):
            self._kept = backend

    def execute(self, batch: Batch, max_rows: int) -> Execution:
        """Run `batch`. Never raises: what fails stands in the result. A member fails only by its own doing:
        when the run of several fails, its halves are run, until who fails is alone."""
        whole = self._attempt(batch.items, batch.rows, max_rows)
        if not whole.failures or len(batch.items) == 1:
            return whole
        return self._isolated(batch.items, whole, max_rows)

    def _isolated(self, items: Sequence[Item], whole: Execution, max_rows: int) -> Execution:
        """The halves of `items`, whose run together was `whole` and failed."""
        middle = len(items) // 2
        halves: list[Execution] = []
        given_up: list[tuple[Item, HeadraceError]] = []
        for half in (items[:middle], items[middle:]):
            if not _wanted(half):
                late = DeadlineExceeded("the deadline passed while the request at fault was looked for")
                given_up += [(item, late) for item in half]
                continue
            attempt = self._attempt(half, sum([item.rows for item in half]), max_rows)
            single = not attempt.failures or len(half) == 1
            halves.append(attempt if single else self._isolated(half, attempt, max_rows))
        return Execution(
            parts=[part for half in halves for part in half.parts],
            failures=[failure for half in halves for failure in half.failures] + given_up,
            prepare=whole.prepare + sum(half.prepare for half in halves),
            infer=whole.infer + sum(half.infer for half in halves),
            cut=whole.cut + sum(half.cut for half in halves),
            reruns=sum(1 + half.reruns for half in halves),
            fault=next((half.fault for half in halves if half.fault is not None), None),
        )

    def run(
        self,
        key: MergeKey,
        data: Sequence[Buffer],
        rows: int,
        max_rows: int,
        wanted: Callable[[], bool] = lambda: True,
    ) -> tuple[list[OutputColumn], float, float]:
        """Outputs for joined input bytes, and the seconds that the arrays and the backend took.

        More rows than `max_rows` run in slices for as long as they are `wanted`. Raises DeadlineExceeded once
        they are not, and whatever the backend raises.
        """
        started = time.perf_counter()
        if self._kept is not None and not key[0] and rows <= max_rows:
            kept = self._kept.run_kept(data, rows)
            if kept is not None:
                return self._kept_columns(kept, rows), 0.0, time.perf_counter() - started
        arrays = self.layout.arrays(key, data, rows)
        prepared = time.perf_counter()
        if not self.layout.batched or rows <= max_rows:
            outputs = self.backend.run(arrays, key[0])
        else:
            outputs = self._in_slices(arrays, key[0], rows, max_rows, wanted)
        ran = time.perf_counter()
        batched = self.layout.batched
        columns = [
            to_column(name, self._datatypes[name], array, rows, batched=batched)
            for name, array in outputs.items()
        ]
        return columns, prepared - started, ran - prepared

    def _kept_columns(self, kept: list[tuple[bytes, tuple[int, ...]]], rows: int) -> list[OutputColumn]:
        columns: list[OutputColumn] = []
        for position in range(len(kept)):
            name, datatype = self._given[position]
            data, shape = kept[position]
            columns.append(OutputColumn(name, datatype, shape, data, len(data) // rows))
        return columns

    def _attempt(self, items: Sequence[Item], rows: int, max_rows: int) -> Execution:
        def wanted() -> bool:
            return _wanted(items)

        started = time.perf_counter()
        joined = 0.0
        try:
            key = items[0].key
            if self.layout.padded and self.layout.is_ragged(key):
                return self._attempt_ragged(items, rows, max_rows, wanted)
            data = _joined(items)
            joined = time.perf_counter() - started
            columns, prepare, infer = self.run(key, data, rows, max_rows, wanted)
        except HeadraceError as error:
            failures = [(item, error) for item in items]
            return Execution([], failures, joined, time.perf_counter() - started - joined, 0.0)
        except Exception as error:  # any failure of a model is answered, logged and counted, never fatal
            internal = Internal("the model failed on this input")
            failures = [(item, internal) for item in items]
            return Execution([], failures, joined, time.perf_counter() - started - joined, 0.0, fault=error)
        cut = time.perf_counter() - started - joined - prepare - infer
        return Execution([Part(tuple(items), rows, data, columns)], [], joined + prepare, infer, cut)

    def _attempt_ragged(
        self, items: Sequence[Item], rows: int, max_rows: int, wanted: Callable[[], bool]
    ) -> Execution:
        """Pad to the longest, run once, and give a part for each length. Raises whatever `run` raises."""
        started = time.perf_counter()
        layout, key = self.layout, items[0].key
        by_length: dict[int, list[tuple[int, Item]]] = {}
        first = 0
        for item in items:
            by_length.setdefault(layout.length(item.rows, item.data), []).append((first, item))
            first += item.rows
        longest = max(by_length)
        if len(by_length) == 1:
            data = _joined(items)
        else:
            padded = [
                layout.filled_up(item.data, item.rows, layout.length(item.rows, item.data), longest)
                for item in items
            ]
            data = [b"".join(parts) for parts in zip(*padded, strict=True)]
        joined = time.perf_counter() - started
        columns, prepare, infer = self.run(layout.with_length(key, longest), data, rows, max_rows, wanted)
        if len(by_length) == 1:
            parts = [Part(tuple(items), rows, data, columns, layout.with_length(key, longest))]
        else:
            parts = [
                self._cut_back(columns, rows, members, longest, length)
                for length, members in by_length.items()
            ]
        cut = time.perf_counter() - started - joined - prepare - infer
        return Execution(parts, [], joined + prepare, infer, cut)

    def _cut_back(
        self,
        columns: Sequence[OutputColumn],
        rows: int,
        members: Sequence[tuple[int, Item]],
        longest: int,
        length: int,
    ) -> Part:
        """The members whose rows are `length` long, each with the row it begins at, out of a run of rows that
        were `longest` long."""
        padding = self.backend.padding
        taken = np.concatenate([np.arange(first, first + item.rows) for first, item in members])
        own: list[OutputColumn] = []
        for column in columns:
            array = to_array(column.data, column.datatype, (rows, *column.shape))[taken]
            for axis in padding.outputs[column.name] if padding is not None else ():
                if column.shape[axis] != longest:
                    shape = list(column.shape)
                    raise ValueError(f"output {column.name} has rows of shape {shape} for {longest} of input")
                array = array[(slice(None),) * (axis + 1) + (slice(length),)]
            own.append(to_column(column.name, column.datatype, array, len(taken), batched=True))
        items = tuple(item for _, item in members)
        return Part(items, len(taken), _joined(items), own, self.layout.with_length(items[0].key, length))

    def _in_slices(
        self,
        arrays: dict[str, Array],
        outputs: tuple[str, ...],
        rows: int,
        max_rows: int,
        wanted: Callable[[], bool],
    ) -> dict[str, Array]:
        pieces: list[dict[str, Array]] = []
        for first in range(0, rows, max_rows):
            if first and not wanted():
                raise DeadlineExceeded(f"nobody waited any more after {first} of {rows} rows")
            part = {name: array[first : first + max_rows] for name, array in arrays.items()}
            piece = self.backend.run(part, outputs)
            count = min(max_rows, rows - first)
            for name, array in piece.items():
                if array.ndim == 0 or array.shape[0] != count:
                    raise ValueError(f"output {name} has shape {list(array.shape)} for {count} rows of input")
            pieces.append(piece)
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _wanted(items: Sequence[Item]) -> bool:
    """Whether anybody still waits for one of them."""
    now = time.monotonic()
    return any(not item.done and item.deadline > now for item in items)


def _joined(items: Sequence[Item]) -> list[Buffer]:
    """Per input the bytes of all `items`."""
    if len(items) == 1:
        return list(items[0].data)
    if len(items[0].data) == 1:
        return [b"".join([item.data[0] for item in items])]
    return [b"".join(parts) for parts in zip(*[item.data for item in items], strict=True)]
