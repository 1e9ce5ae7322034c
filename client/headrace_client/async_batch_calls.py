"""The calls of `batch_calls`, awaited, for the async client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import httpx

from headrace_client import batches as calls
from headrace_client.batch_calls import EVENTS_SILENCE_S, RECONNECT_S, STREAM_TIMEOUT_S, silence_until
from headrace_client.batches import Batch, Events, FileUpload, Format, Join, Lines, Pending, StoredFile
from headrace_client.errors import ConnectionFailed, DeadlineExceeded, Unavailable
from headrace_client.exchange import Exchange
from headrace_client.results import Json
from headrace_client.uploads import Progress

T = TypeVar("T")


class Connection(Protocol):
    """What the calls need of the client."""

    async def run(self, call: Exchange[T], timeout: float | None) -> T: ...

    def stream(self, call: Exchange[Any], timeout: float) -> AbstractAsyncContextManager[httpx.Response]: ...


class AsyncBatches:
    """`client.batches`: jobs over many rows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def submit(  # noqa: PLR0913 - what a batch can be asked for
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
        return await self._connection.run(calls.submit(body, idempotency_key), None)

    async def get(self, batch_id: str) -> Batch:
        """How far it is."""
        return await self._connection.run(calls.batch(batch_id), None)

    async def list(self, *, model: str | None = None, status: str | None = None) -> AsyncIterator[Batch]:
        """All of this key, newest first, page by page."""
        after: str | None = None
        while True:
            page = await self._connection.run(calls.batches(model, status, after, 100), None)
            found = [Batch.read(one) for one in page["batches"]]
            for batch in found:
                yield batch
            if not page["has_more"] or not found:
                return
            after = found[-1].id

    async def cancel(self, batch_id: str) -> Batch:
        """Do no more of it; what was done stays."""
        return await self._connection.run(calls.cancel(batch_id), None)

    async def watch(self, batch_id: str, *, timeout: float | None = None) -> AsyncIterator[Batch]:
        """It as it is, then as it changes, the last time when it has ended; over broken connections. Raises
        DeadlineExceeded where that takes longer than `timeout` seconds."""
        events, deadline = Events(), None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                async with self._connection.stream(
                    calls.events(batch_id, events.last_id), silence_until(deadline)
                ) as answer:
                    async for line in _lines_of(answer.aiter_bytes()):
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
            await asyncio.sleep(RECONNECT_S)

    async def wait(self, batch_id: str, *, timeout: float | None = None) -> Batch:
        """It, once it has ended. Raises DeadlineExceeded after `timeout` seconds."""
        last = None
        async for batch in self.watch(batch_id, timeout=timeout):
            last = batch
        return last if last is not None else await self.get(batch_id)

    async def results(self, batch_id: str, *, partial: bool = False) -> AsyncIterator[Json]:
        """`{"row", "custom_id"?, "outputs"}` of every row that has an answer, in the order of the input."""
        async for line in self._lines(calls.results(batch_id, "jsonl", partial=partial)):
            yield line

    async def download(
        self,
        batch_id: str,
        to: Path,
        *,
        format: Format = "jsonl",  # noqa: A002 - as the query has it
        partial: bool = False,
    ) -> int:
        """Write the results to a file, piece by piece; its size."""
        return await _write(self._connection, calls.results(batch_id, format, partial=partial), to)

    async def errors(self, batch_id: str, *, partial: bool = False) -> AsyncIterator[Json]:
        """`{"row", "custom_id"?, "error"}` of every row that failed."""
        async for line in self._lines(calls.errors(batch_id, partial=partial)):
            yield line

    async def join(
        self,
        batch_id: str,
        rows: Iterable[Mapping[str, Any]],
        *,
        on: str = "custom_id",
        partial: bool = False,
    ) -> AsyncIterator[Json]:
        """Each of `rows`, in their order, with what the batch came to for it: `{"custom_id", "input",
        "outputs" | "error"}`, neither of the last two where nothing answers the row. `on` names the field of
        `rows` that holds the custom id. Raises ValueError where ids are missing or not unique."""
        join = Join(on)
        async for line in self.results(batch_id, partial=partial):
            join.add(line)
        async for line in self.errors(batch_id, partial=partial):
            join.add(line)
        for row in rows:
            yield join.joined(row)

    async def _lines(self, call: Exchange[Any]) -> AsyncIterator[Json]:
        async with self._connection.stream(call, STREAM_TIMEOUT_S) as answer:
            async for line in _lines_of(answer.aiter_bytes()):
                if line:
                    yield calls.parsed(line)


class AsyncFiles:
    """`client.files`: inputs of batches, and what OpenAI batches came to."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def upload(
        self, path: Path, *, purpose: str = "data", progress: Progress | None = None
    ) -> StoredFile:
        """Send a file, streamed from disk. `uri` of the answer is what `input_uri` takes."""
        return await self._connection.run(
            calls.upload(FileUpload.of(path, purpose, progress)), STREAM_TIMEOUT_S
        )

    async def get(self, file_id: str) -> StoredFile:
        """What is known of it."""
        return await self._connection.run(calls.file(file_id), None)

    async def list(self, *, purpose: str | None = None) -> AsyncIterator[StoredFile]:
        """All of this key, newest first, page by page."""
        after: str | None = None
        while True:
            page = await self._connection.run(calls.files(purpose, after), None)
            for one in page["data"]:
                yield StoredFile.read(one)
            if not page["has_more"]:
                return
            after = page["last_id"]

    async def download(self, file_id: str, to: Path) -> int:
        """Write it to a file, piece by piece; its size."""
        return await _write(self._connection, calls.content(file_id), to)

    async def delete(self, file_id: str) -> None:
        """Remove it."""
        await self._connection.run(calls.delete_file(file_id), None)


class AsyncDeadLetters:
    """`client.dead_letters`: what consumers could not handle. For admins."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def queues(self) -> list[Json]:
        """`{"topic", "waiting"}` of every queue."""
        return await self._connection.run(calls.queues(), None)

    async def show(self, topic: str, *, limit: int = 20) -> list[Json]:
        """The oldest records that wait, with reason and origin."""
        return await self._connection.run(calls.letters(topic, limit), None)

    async def replay(self, topic: str, *, limit: int = 1000) -> int:
        """Send records back to where they came from; how many they were."""
        return await self._connection.run(calls.replay(topic, limit), None)


class AsyncPendingPredictions:
    """`client.async_predictions`: predictions that nobody waits for on a connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def submit(
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
        return await self._connection.run(calls.predict_async(model, body, idempotency_key), None)

    async def get(self, request_id: str, *, wait_s: float = 0.0) -> Pending:
        """The answer where it is there within `wait_s` seconds (60 at most), else how far it is."""
        return await self._connection.run(calls.pending(request_id, wait_s), wait_s + EVENTS_SILENCE_S)


async def _lines_of(pieces: AsyncIterator[bytes]) -> AsyncIterator[str]:
    cut = Lines()
    async for piece in pieces:
        for line in cut.feed(piece):
            yield line
    for line in cut.rest():
        yield line


async def _write(connection: Connection, call: Exchange[Any], to: Path) -> int:
    size = 0
    file = await asyncio.to_thread(to.open, "wb")
    try:
        async with connection.stream(call, STREAM_TIMEOUT_S) as answer:
            async for piece in answer.aiter_bytes():
                size += await asyncio.to_thread(file.write, piece)
    finally:
        await asyncio.to_thread(file.close)
    return size
