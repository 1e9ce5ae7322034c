"""Rows of a finished job, back to the lines of the OpenAI batch file that they came from. Blocking, in a
thread; memory holds one batch of results."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.types as kinds

from services.common.errors import HeadraceError, Internal
from services.common.problems import http_status
from services.gateway.codecs.openai import TOKENS, embeddings_answer
from services.gateway.codecs.results import Array, nested, result_of_arrays
from services.gateway.errors import openai_error
from services.gateway.jobs.openai_rows import LinePlan, plans
from services.gateway.signature import ModelSignature

Outputs = dict[str, Array]

#: Why a line was not done, by what ended the batch: OpenAI's codes.
LATE = {
    "expired": ("batch_expired", "This request could not be executed before the completion window expired."),
    "cancelled": ("batch_cancelled", "This request was not executed because the batch was cancelled."),
}


@dataclass(frozen=True, slots=True)
class Rendering:
    """How answers of a batch are written. `ended` is what it came to: completed, cancelled, expired."""

    batch_id: str
    model: str
    version: str
    signature: ModelSignature
    embeddings: bool
    ended: str


@dataclass(slots=True)
class Counts:
    """Lines answered, and lines in the error file."""

    completed: int = 0
    failed: int = 0


def shown_of(signature: ModelSignature) -> dict[str, Any]:
    """What of a signature decides how outputs are shown, as JSON."""
    return {
        "batched": signature.batched,
        "task": signature.task,
        "is_classifier": signature.is_classifier,
        "prediction": signature.prediction,
        "probabilities": signature.probabilities,
        "classes": list(signature.classes),
    }


def signature_of(shown: Mapping[str, Any]) -> ModelSignature:
    """A signature that shows outputs in the same way, and says nothing about inputs."""
    return ModelSignature(
        inputs=(),
        outputs=(),
        batched=shown["batched"],
        task=shown["task"],
        is_classifier=shown["is_classifier"],
        prediction=shown["prediction"],
        probabilities=shown["probabilities"],
        classes=tuple(shown["classes"]),
        by_name={},
        output_names=frozenset(),
    )


def write_answers(
    rendering: Rendering,
    plans: Iterable[LinePlan],
    results: Iterator[pa.RecordBatch],
    errors: Iterator[tuple[int, HeadraceError]],
    outputs_to: BinaryIO,
    errors_to: BinaryIO,
) -> Counts:
    """Write a line for every plan to one of the two files, in the order of the input. `results` and `errors`
    come in the order of their rows. The same job gives the same bytes."""
    found, failed = RowReader(results), _ErrorReader(errors)
    counts, first = Counts(), 0
    for number, plan in enumerate(plans):
        end = first + plan.rows
        answer = _answer(rendering, number, plan, found.take(first, end), failed.first(first, end))
        good = answer["error"] is None and answer["response"]["status_code"] == 200
        to = outputs_to if good else errors_to
        to.write(orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))
        counts.completed += good
        counts.failed += not good
        first = end
    return counts


def write_files(
    rendering: Rendering,
    plans_at: Path,
    results: Iterator[pa.RecordBatch],
    errors: Iterator[tuple[int, HeadraceError]],
    outputs_at: Path,
    errors_at: Path,
) -> Counts:
    """The same from the file of plans to the two files."""
    with plans_at.open("rb") as planned, outputs_at.open("wb") as outputs, errors_at.open("wb") as failed:
        return write_answers(rendering, map(plans.decode, planned), results, errors, outputs, failed)


def _answer(
    rendering: Rendering, number: int, plan: LinePlan, outputs: Outputs | None, error: HeadraceError | None
) -> dict[str, Any]:
    line_id = uuid.uuid5(uuid.NAMESPACE_OID, f"{rendering.batch_id}/{number}").hex
    answer: dict[str, Any] = {"id": f"batch_req_{line_id}", "custom_id": plan.custom_id}
    if plan.rows and error is None and outputs is not None:
        body = _body(rendering, line_id, plan, outputs)
        return answer | {"response": _response(200, line_id, body), "error": None}
    if plan.rows and error is None:
        if rendering.ended not in LATE:
            error = Internal("The platform has no answer to this request.")
        else:
            code, message = LATE[rendering.ended]
            return answer | {"response": None, "error": {"code": code, "message": message}}
    if error is None:
        return answer | {"response": _response(plan.status, line_id, {"error": plan.error}), "error": None}
    status = http_status(error)
    status = 400 if status == 422 else status
    return answer | {
        "response": _response(status, line_id, {"error": openai_error(error, status)}),
        "error": None,
    }


def _response(status: int, request_id: str, body: dict[str, Any]) -> dict[str, Any]:
    return {"status_code": status, "request_id": request_id, "body": body}


def _body(rendering: Rendering, request_id: str, plan: LinePlan, outputs: Outputs) -> dict[str, Any]:
    signature = rendering.signature
    if rendering.embeddings:
        vectors, tokens = outputs[signature.prediction], outputs.get(TOKENS)
        return embeddings_answer(rendering.model, vectors, tokens, base64=plan.base64)
    outputs = {name: array for name, array in outputs.items() if name != TOKENS}
    if plan.outputs:
        outputs = {name: array for name, array in outputs.items() if name in plan.outputs}
    return native_body(request_id, rendering.model, rendering.version, signature, outputs, single=plan.single)


def native_body(
    request_id: str, model: str, version: str, signature: ModelSignature, outputs: Outputs, *, single: bool
) -> dict[str, Any]:
    """The answer of the native route, without what only an online request has. For orjson."""
    prediction, given, confidence = result_of_arrays(signature, outputs, single=single)
    body = {
        "request_id": request_id,
        "model": model,
        "version": version,
        "prediction": prediction,
        "outputs": {name: nested(one) if isinstance(one, np.ndarray) else one for name, one in given.items()},
    }
    return body if confidence is None else body | {"confidence": confidence}


class RowReader:
    """Outputs of rows in a row, out of record batches in the order of their column `row`."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches = batches
        #: Row numbers and outputs of what was read and is not behind yet.
        self._held: list[tuple[Array, Mapping[str, Any]]] = []
        self._ended = False

    def take(self, first: int, end: int) -> Outputs | None:
        """Outputs of the rows from `first` to before `end`; None where one of them has none. Each call begins
        at or after the end of the one before."""
        while self._held and self._held[0][0][-1] < first:
            self._held.pop(0)
        while not self._ended and (not self._held or self._held[-1][0][-1] < end - 1):
            batch = next(self._batches, None)
            if batch is None:
                self._ended = True
            elif batch.num_rows:
                self._held.append(_columns(batch))
        pieces: list[Mapping[str, Any]] = []
        count = 0
        for rows, columns in self._held:
            low, high = np.searchsorted(rows, (first, end))
            if low < high:
                count += int(high - low)
                pieces.append({name: column[low:high] for name, column in columns.items()})
        if count < end - first or not pieces:
            return None
        if len(pieces) == 1:
            return dict(pieces[0])
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _columns(batch: pa.RecordBatch) -> tuple[Array, dict[str, Array]]:
    names = [name for name in batch.schema.names if name not in {"row", "custom_id"}]
    return batch.column("row").to_numpy(), {name: array_of_column(batch.column(name)) for name in names}


def array_of_column(column: pa.Array) -> Array:
    """An output column as an array with a row per row: of numbers where rows have a fixed shape, of texts and
    lists as objects otherwise."""
    sizes: list[int] = []
    inner = column
    while kinds.is_fixed_size_list(inner.type):
        sizes.append(inner.type.list_size)
        inner = inner.flatten()
    kind = inner.type
    if kinds.is_floating(kind) or kinds.is_integer(kind) or kinds.is_boolean(kind):
        array: Array = inner.to_numpy(zero_copy_only=False)
    else:
        parts = inner.to_pylist()
        array = np.empty(len(parts), dtype=object)
        for at, one in enumerate(parts):  # one by one: lists of one length would become a dimension
            array[at] = one.decode("utf-8", "replace") if isinstance(one, bytes) else one
    return array.reshape(len(column), *sizes)


class _ErrorReader:
    """The same for errors, of which there are few."""

    def __init__(self, errors: Iterator[tuple[int, HeadraceError]]) -> None:
        self._errors = errors
        self._next = next(errors, None)

    def first(self, first: int, end: int) -> HeadraceError | None:
        """The error of the first row from `first` to before `end` that has one."""
        found = None
        while self._next is not None and self._next[0] < end:
            if found is None and self._next[0] >= first:
                found = self._next[1]
            self._next = next(self._errors, None)
        return found
