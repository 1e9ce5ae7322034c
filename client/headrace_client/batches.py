"""What calls about batches, files and dead letters return, and each of them as an exchange."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import httpx

from headrace_client.exchange import Exchange, json_of, segment, with_json
from headrace_client.results import Json
from headrace_client.uploads import CHUNK, Progress, quoted

#: What a batch can end as.
FINAL = frozenset({"completed", "failed", "cancelled", "expired"})
Format = Literal["jsonl", "parquet"]


@dataclass(frozen=True, slots=True)
class Batch:
    """A job over many rows. `total` is None until its input was read; `error` says why it failed as a
    whole, `body` is everything the server told."""

    id: str
    model: str
    version: str
    status: str
    total: int | None
    completed: int
    failed: int
    rows_per_s: float | None
    time_left_s: float | None
    error: Json | None
    body: Json = field(repr=False)

    @property
    def ended(self) -> bool:
        """Whether nothing about it changes any more."""
        return self.status in FINAL

    @classmethod
    def read(cls, body: Json) -> Batch:
        """From the JSON of `/v1/batch/{id}`."""
        counts = body["counts"]
        return cls(
            id=body["batch_id"],
            model=body["model"],
            version=body["version"],
            status=body["status"],
            total=counts["total"],
            completed=counts["completed"],
            failed=counts["failed"],
            rows_per_s=body["rows_per_s"],
            time_left_s=body["time_left_s"],
            error=body.get("error"),
            body=body,
        )


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file that the platform keeps. `uri` is what `input_uri` of a batch takes; `size` in bytes."""

    id: str
    filename: str
    purpose: str
    size: int
    created_at: datetime
    uri: str

    @classmethod
    def read(cls, body: Json) -> StoredFile:
        """From the JSON of `/v1/files/{id}`."""
        return cls(
            id=body["id"],
            filename=body["filename"],
            purpose=body["purpose"],
            size=body["bytes"],
            created_at=datetime.fromtimestamp(body["created_at"]).astimezone(),
            uri=body["uri"],
        )


@dataclass(frozen=True, slots=True)
class Pending:
    """A prediction that was asked for asynchronously. `result` is as of `predict` once `status` is
    completed, `error` says why it is failed."""

    id: str
    status: str
    result: Json | None
    error: Json | None

    @property
    def ended(self) -> bool:
        """Whether nothing about it changes any more."""
        return self.status in FINAL

    @classmethod
    def read(cls, body: Json) -> Pending:
        """From the JSON of `/v1/async/{id}`."""
        return cls(body["id"], body["status"], body.get("result"), body.get("error"))


@dataclass(frozen=True, slots=True)
class FileUpload:
    """A multipart/form-data body of one file, streamed from disk."""

    path: Path
    purpose: str
    boundary: str
    progress: Progress | None = None

    @classmethod
    def of(cls, path: Path, purpose: str, progress: Progress | None) -> FileUpload:
        """With a boundary of its own."""
        return cls(path, purpose, f"headrace-{secrets.token_hex(16)}", progress)

    @property
    def headers(self) -> dict[str, str]:
        """Content type and exact length."""
        length = len(self._head()) + self.path.stat().st_size + len(self._end())
        return {
            "content-type": f"multipart/form-data; boundary={self.boundary}",
            "content-length": str(length),
        }

    def chunks(self) -> Iterator[bytes]:
        """The body, from its start. Reads the file: not on an event loop."""
        total, sent = self.path.stat().st_size, 0
        yield self._head()
        with self.path.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                yield chunk
                sent += len(chunk)
                if self.progress is not None:
                    self.progress(sent, total)
        yield self._end()

    def _head(self) -> bytes:
        part = f'--{self.boundary}\r\nContent-Disposition: form-data; name="'
        return (
            f'{part}purpose"\r\n\r\n{self.purpose}\r\n{part}file"; filename="{quoted(self.path.name)}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        ).encode()

    def _end(self) -> bytes:
        return f"\r\n--{self.boundary}--\r\n".encode()


def submit(body: Mapping[str, Any], idempotency_key: str | None) -> Exchange[str]:
    """Returns the batch's id. With an idempotency key a lost answer can be asked for again."""
    call = with_json("POST", "/v1/batch", body, lambda answer: str(answer.json()["batch_id"]))
    return _once(call, idempotency_key)


def submission(model: str, given: Mapping[str, Any]) -> Json:
    """The body of a submission; what is None is left to the server."""
    return {"model": model} | {name: value for name, value in given.items() if value is not None}


def batch(batch_id: str) -> Exchange[Batch]:
    return Exchange("GET", f"/v1/batch/{segment(batch_id)}", _read(Batch))


def batches(model: str | None, status: str | None, after: str | None, limit: int) -> Exchange[Json]:
    """One page."""
    given = {"model": model, "status": status, "after": after, "limit": str(limit)}
    params = {name: value for name, value in given.items() if value}
    return Exchange("GET", "/v1/batch", json_of, params=params)


def cancel(batch_id: str) -> Exchange[Batch]:
    return Exchange("DELETE", f"/v1/batch/{segment(batch_id)}", _read(Batch))


def results(batch_id: str, format: Format, *, partial: bool) -> Exchange[None]:  # noqa: A002 - as the query has it
    params = {"format": format} | ({"partial": "true"} if partial else {})
    return Exchange("GET", f"/v1/batch/{segment(batch_id)}/results", _nothing, params=params)


def errors(batch_id: str, *, partial: bool) -> Exchange[None]:
    params = {"partial": "true"} if partial else {}
    return Exchange("GET", f"/v1/batch/{segment(batch_id)}/errors", _nothing, params=params)


def events(batch_id: str, last_event_id: str | None) -> Exchange[None]:
    headers = {"accept": "text/event-stream"}
    if last_event_id is not None:
        headers["last-event-id"] = last_event_id
    return Exchange("GET", f"/v1/batch/{segment(batch_id)}/events", _nothing, headers=headers)


def upload(sent: FileUpload) -> Exchange[StoredFile]:
    return Exchange("POST", "/v1/files", _read(StoredFile), headers=sent.headers, content=sent.chunks)


def file(file_id: str) -> Exchange[StoredFile]:
    return Exchange("GET", f"/v1/files/{segment(file_id)}", _read(StoredFile))


def files(purpose: str | None, after: str | None) -> Exchange[Json]:
    """One page."""
    given = {"purpose": purpose, "after": after, "limit": "1000"}
    params = {name: value for name, value in given.items() if value}
    return Exchange("GET", "/v1/files", json_of, params=params)


def content(file_id: str) -> Exchange[None]:
    return Exchange("GET", f"/v1/files/{segment(file_id)}/content", _nothing)


def delete_file(file_id: str) -> Exchange[None]:
    return Exchange("DELETE", f"/v1/files/{segment(file_id)}", _nothing)


def predict_async(model: str, body: Mapping[str, Any], idempotency_key: str | None) -> Exchange[str]:
    """Returns the id."""
    path = f"/v1/models/{segment(model)}/predict:async"
    return _once(with_json("POST", path, body, lambda answer: str(answer.json()["id"])), idempotency_key)


def pending(request_id: str, wait_s: float) -> Exchange[Pending]:
    params = {"wait_s": f"{wait_s:g}"} if wait_s else {}
    return Exchange("GET", f"/v1/async/{segment(request_id)}", _read(Pending), params=params)


def queues() -> Exchange[list[Json]]:
    return Exchange("GET", "/v1/dlq", lambda answer: list(answer.json()["queues"]))


def letters(topic: str, limit: int) -> Exchange[list[Json]]:
    path = f"/v1/dlq/{segment(topic)}"
    return Exchange("GET", path, lambda answer: list(answer.json()["records"]), params={"limit": str(limit)})


def replay(topic: str, limit: int) -> Exchange[int]:
    path = f"/v1/dlq/{segment(topic)}/replay"
    return with_json("POST", path, {"limit": limit}, lambda answer: int(answer.json()["replayed"]))


@dataclass(slots=True)
class Join:
    """Input rows with what became of them, by custom id. Answers are kept in memory, rows are not."""

    on: str
    _answers: dict[str, Json] = field(default_factory=dict)

    def add(self, line: Json) -> None:
        """A line of results or errors. Raises ValueError where its id was there before, or an answer has
        none; a row that could not be read has none either, and is left out."""
        known = line.get("custom_id")
        if known is None:
            if "error" in line:
                return
            raise ValueError(f"Row {line['row']} of the batch has no custom_id.")
        if known in self._answers:
            raise ValueError(f"The custom_id {known!r} stands in several rows of the batch.")
        self._answers[known] = {name: line[name] for name in ("outputs", "error") if name in line}

    def joined(self, row: Mapping[str, Any]) -> Json:
        """`{"custom_id", "input", "outputs" | "error"}`, neither where there is no answer. Raises ValueError
        for a row without an id."""
        if row.get(self.on) is None:
            raise ValueError(f"A row has no {self.on!r}.")
        known = str(row[self.on])
        return {"custom_id": known, "input": dict(row)} | self._answers.get(known, {})


@dataclass(slots=True)
class Lines:
    """Bytes as lines of text, without their ends. Only line feeds end a line: what else Unicode calls a
    line's end (U+2028) may stand in a JSON string."""

    _kept: list[bytes] = field(default_factory=list)

    def feed(self, piece: bytes) -> Iterator[str]:
        """The lines that `piece` completes."""
        *ended, open_one = piece.split(b"\n")
        for line in ended:
            yield _text(b"".join([*self._kept, line]))
            self._kept.clear()
        if open_one:
            self._kept.append(open_one)

    def rest(self) -> Iterator[str]:
        """The last line, where nothing ended it."""
        if self._kept:
            yield _text(b"".join(self._kept))
            self._kept.clear()


@dataclass(slots=True)
class Events:
    """Server-sent events, line by line. `last_id` is that of the last complete event."""

    last_id: str | None = None
    _data: list[str] = field(default_factory=list)

    def feed(self, line: str) -> Batch | None:
        """The batch of the event that `line` completes."""
        if line:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "data":
                self._data.append(value)
            elif name == "id":
                self.last_id = value
            return None
        data, self._data = "\n".join(self._data), []
        return Batch.read(json.loads(data)) if data else None


def _once(call: Exchange[str], idempotency_key: str | None) -> Exchange[str]:
    if idempotency_key is None:
        return call
    headers = {**call.headers, "idempotency-key": idempotency_key}
    return Exchange(call.method, call.path, call.read, call.params, headers, call.content)


def _read(kind: Any) -> Callable[[httpx.Response], Any]:
    return lambda answer: kind.read(answer.json())


def _nothing(_answer: httpx.Response) -> None:
    return None


def _text(line: bytes) -> str:
    return line.removesuffix(b"\r").decode()


def parsed(line: str) -> Json:
    """One line of JSON Lines."""
    body: Json = json.loads(line)
    return body
