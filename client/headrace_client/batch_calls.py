"""The calls about batches, files and dead letters of the sync client."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import httpx

from headrace_client import batches as calls
from headrace_client.batches import Batch, Events, FileUpload, Format, Join, Lines, Pending, StoredFile
from headrace_client.errors import ConnectionFailed, DeadlineExceeded, Unavailable
from headrace_client.exchange import Exchange
from headrace_client.results import Json
from headrace_client.uploads import Progress

T = TypeVar("T")

#: Between two pieces of a stream, or until the answer of an upload.
STREAM_TIMEOUT_S = 600.0
#: Heartbeats come more often than this.
EVENTS_SILENCE_S = 60.0
RECONNECT_S = 1.0


class Connection(Protocol):
    """What the calls need of the client."""

    def run(self, call: Exchange[T], timeout: float | None) -> T: ...

    def stream(self, call: Exchange[Any], timeout: float) -> AbstractContextManager[httpx.Response]: ...


class Batches:
    """`client.batches`: jobs over many rows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def submit(  # noqa: PLR0913 - what a batch can be asked for
        self,
        model: str,
        inputs: Sequence[Any] | None = None,
        *,
        input_uri: str | None = None,
        version: str | None = None,
        input_format: str | None = None,
        output_format: Format | None = None,
        priority: str | None = None,
        callback_url: str | None = None,
        metadata: Mapping[str, str] | None = None,
        exclude_from: Sequence[str] | None = None,
        expires_in_s: int | None = None,
        idempotency_key: str | None = None,
    ) -> str:
        """Accept a job over `inputs` (few rows) or over what lies at `input_uri`; returns its id."""
        body = calls.submission(
            model,
            {
                "inputs": None if inputs is None else list(inputs),
                "input_uri": input_uri,
                "version": version,
                "input_format": input_format,
                "output_format": output_format,
                "priority": priority,
                "callback_url": callback_url,
                "metadata": None if metadata is None else dict(metadata),
                "exclude_from": None if exclude_from is None else list(exclude_from),
                "expires_in_s": expires_in_s,
            },
        )
        return self._connection.run(calls.submit(body, idempotency_key), None)

    def get(self, batch_id: str) -> Batch:
        """How far it is."""
        return self._connection.run(calls.batch(batch_id), None)

    def list(self, *, model: str | None = None, status: str | None = None) -> Iterator[Batch]:
        """All of this key, newest first, page by page."""
        after: str | None = None
        while True:
            page = self._connection.run(calls.batches(model, status, after, 100), None)
            found = [Batch.read(one) for one in page["batches"]]
            yield from found
            if not page["has_more"] or not found:
                return
            after = found[-1].id

    def cancel(self, batch_id: str) -> Batch:
        """Do no more of it; what was done stays."""
        return self._connection.run(calls.cancel(batch_id), None)

    def watch(self, batch_id: str, *, timeout: float | None = None) -> Iterator[Batch]:
        """It as it is, then as it changes, the last time when it has ended; over broken connections. Raises
        DeadlineExceeded where that takes longer than `timeout` seconds."""
        events, deadline = Events(), None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                with self._connection.stream(
                    calls.events(batch_id, events.last_id), silence_until(deadline)
                ) as answer:
                    for line in _lines_of(answer.iter_bytes()):
                        batch = events.feed(line)
                        if batch is not None:
                            yield batch
                            if batch.ended:
                                return
                        if deadline is not None and time.monotonic() > deadline:
                            break
            except (ConnectionFailed, DeadlineExceeded, Unavailable):
                pass  # another look is taken below
            if deadline is not None and time.monotonic() > deadline:
                raise DeadlineExceeded(f"{batch_id} has not ended in time.", code="DEADLINE_EXCEEDED")
            time.sleep(RECONNECT_S)

    def wait(self, batch_id: str, *, timeout: float | None = None) -> Batch:
        """It, once it has ended. Raises DeadlineExceeded after `timeout` seconds."""
        last = None
        for batch in self.watch(batch_id, timeout=timeout):
            last = batch
        return last if last is not None else self.get(batch_id)

    def results(self, batch_id: str, *, partial: bool = False) -> Iterator[Json]:
        """`{"row", "custom_id"?, "outputs"}` of every row that has an answer, in the order of the input."""
        yield from self._lines(calls.results(batch_id, "jsonl", partial=partial))

    def download(
        self,
        batch_id: str,
        to: Path,
        *,
        format: Format = "jsonl",  # noqa: A002 - as the query has it
        partial: bool = False,
    ) -> int:
        """Write the results to a file, piece by piece; its size."""
        return _write(self._connection, calls.results(batch_id, format, partial=partial), to)

    def errors(self, batch_id: str, *, partial: bool = False) -> Iterator[Json]:
        """`{"row", "custom_id"?, "error"}` of every row that failed."""
        yield from self._lines(calls.errors(batch_id, partial=partial))

    def join(
        self,
        batch_id: str,
        rows: Iterable[Mapping[str, Any]],
        *,
        on: str = "custom_id",
        partial: bool = False,
    ) -> Iterator[Json]:
        """Each of `rows`, in their order, with what the batch came to for it: `{"custom_id", "input",
        "outputs" | "error"}`, neither of the last two where nothing answers the row. `on` names the field of
        `rows` that holds the custom id. Raises ValueError where ids are missing or not unique."""
        join = Join(on)
        for line in self.results(batch_id, partial=partial):
            join.add(line)
        for line in self.errors(batch_id, partial=partial):
            join.add(line)
        yield from map(join.joined, rows)

    def _lines(self, call: Exchange[Any]) -> Iterator[Json]:
        with self._connection.stream(call, STREAM_TIMEOUT_S) as answer:
            for line in _lines_of(answer.iter_bytes()):
                if line:
                    yield calls.parsed(line)


class Files:
    """`client.files`: inputs of batches, and what OpenAI batches came to."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def upload(self, path: Path, *, purpose: str = "data", progress: Progress | None = None) -> StoredFile:
        """Send a file, streamed from disk. `uri` of the answer is what `input_uri` takes."""
        call = calls.upload(FileUpload.of(path, purpose, progress))
        return self._connection.run(call, STREAM_TIMEOUT_S)

    def get(self, file_id: str) -> StoredFile:
        """What is known of it."""
        return self._connection.run(calls.file(file_id), None)

    def list(self, *, purpose: str | None = None) -> Iterator[StoredFile]:
        """All of this key, newest first, page by page."""
        after: str | None = None
        while True:
            page = self._connection.run(calls.files(purpose, after), None)
            yield from (StoredFile.read(one) for one in page["data"])
            if not page["has_more"]:
                return
            after = page["last_id"]

    def download(self, file_id: str, to: Path) -> int:
        """Write it to a file, piece by piece; its size."""
        return _write(self._connection, calls.content(file_id), to)

    def delete(self, file_id: str) -> None:
        """Remove it."""
        self._connection.run(calls.delete_file(file_id), None)


class DeadLetters:
    """`client.dead_letters`: what consumers could not handle. For admins."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def queues(self) -> list[Json]:
        """`{"topic", "waiting"}` of every queue."""
        return self._connection.run(calls.queues(), None)

    def show(self, topic: str, *, limit: int = 20) -> list[Json]:
        """The oldest records that wait, with reason and origin."""
        return self._connection.run(calls.letters(topic, limit), None)

    def replay(self, topic: str, *, limit: int = 1000) -> int:
        """Send records back to where they came from; how many they were."""
        return self._connection.run(calls.replay(topic, limit), None)


class PendingPredictions:
    """`client.async_predictions`: predictions that nobody waits for on a connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def submit(
        self,
        model: str,
        inputs: Any,
        *,
        single: bool = False,
        version: str | None = None,
        outputs: Sequence[str] | None = None,
        callback_url: str | None = None,
        idempotency_key: str | None = None,
    ) -> str:
        """Accept one; returns its id."""
        given = {
            "input" if single else "inputs": inputs,
            "version": version,
            "outputs": None if outputs is None else list(outputs),
            "callback_url": callback_url,
        }
        body = {name: value for name, value in given.items() if value is not None}
        return self._connection.run(calls.predict_async(model, body, idempotency_key), None)

    def get(self, request_id: str, *, wait_s: float = 0.0) -> Pending:
        """The answer where it is there within `wait_s` seconds (60 at most), else how far it is."""
        return self._connection.run(calls.pending(request_id, wait_s), wait_s + EVENTS_SILENCE_S)


def silence_until(deadline: float | None) -> float:
    """For how many seconds a stream of events that is followed until `deadline` may say nothing."""
    left = math.inf if deadline is None else deadline - time.monotonic()
    return min(EVENTS_SILENCE_S, max(left, 0.001))


def _lines_of(pieces: Iterable[bytes]) -> Iterator[str]:
    cut = Lines()
    for piece in pieces:
        yield from cut.feed(piece)
    yield from cut.rest()


def _write(connection: Connection, call: Exchange[Any], to: Path) -> int:
    size = 0
    with connection.stream(call, STREAM_TIMEOUT_S) as answer, to.open("wb") as file:
        for piece in answer.iter_bytes():
            size += file.write(piece)
    return size
