"""Files of callers in the artifact store: inputs of jobs, and what OpenAI batches came to.

A file is the object `files/<file_id>/<filename>` and a row; the row is written first, marked as incomplete
until the object is there, and removed last, so no object is forgotten. Who asks for somebody else's file is
told that there is none."""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, cast

import structlog
from sqlalchemy import CursorResult, and_, or_, select, update
from sqlalchemy.dialects.postgresql import insert as upsert

from services.common.clock import Clock
from services.common.db import transaction
from services.common.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    HeadraceError,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from services.common.ids import id_text, new_id
from services.gateway.jobs.backend import Backend
from services.gateway.jobs.shares import Places
from services.gateway.jobs.tables import FileRow

log = structlog.get_logger(__name__)

#: What callers upload; `data` is ours: an input of any job.
_UPLOADED = ("batch", "data", "user_data")
#: What batches write, and what they keep for themselves while they run.
OUTPUT, INTERNAL = "batch_output", "batch_rows"
BATCH_BYTES = 200 << 20
_HOUR_S, _MOST_S = 3600, 30 * 24 * 3600
_BUFFER = 1 << 20
#: Two of them are held for each reader, however slowly it reads.
_PIECE = 1 << 20
#: As long as the registry gives an upload.
_UPLOAD_S = 3600.0
_SWEEP_S = 60.0
_AT_ONCE = 100
#: An object that is not there after this time never will be: who was writing it is gone.
_WRITTEN_WITHIN = timedelta(hours=6)
_ODD = re.compile(r"[^A-Za-z0-9._-]+")
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MAX_NAME = 128


@dataclass(frozen=True, slots=True)
class Reader:
    """Who asks. `everything`: an admin for all models, who sees the files of all keys."""

    key_id: str
    everything: bool = False


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file; `size` in bytes, `path` within the artifact store."""

    file_id: str
    filename: str
    purpose: str
    size: int
    created_at: datetime
    expires_at: datetime | None

    @property
    def path(self) -> str:
        return f"files/{self.file_id}/{self.filename}"

    @property
    def uri(self) -> str:
        """As `input_uri` names it."""
        return f"store://{self.path}"

    def as_json(self) -> dict[str, Any]:
        """As OpenAI's clients read it; `uri` is ours."""
        return {
            "id": self.file_id,
            "object": "file",
            "bytes": self.size,
            "created_at": int(self.created_at.timestamp()),
            "expires_at": None if self.expires_at is None else int(self.expires_at.timestamp()),
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
            "uri": self.uri,
        }


class Receiving:
    """A file on its way to a temporary place: `begin`, then `write` as often as needed."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.filename = ""
        self.size = 0
        self.at = folder / "content"
        self._max_bytes = max_bytes
        self._buffer = bytearray()
        self._file: BinaryIO | None = None

    async def begin(self, filename: str) -> None:
        """The file's name as its sender has it."""
        self.filename = safe_name(filename)
        self._file = await asyncio.to_thread(self.at.open, "wb")

    async def write(self, data: bytes) -> None:
        """More of it. Raises BodyTooLarge."""
        self.size += len(data)
        if self.size > self._max_bytes:
            raise BodyTooLarge(f"The file is larger than {self._max_bytes} bytes.", field="file")
        self._buffer += data
        if len(self._buffer) >= _BUFFER:
            await self._flush()

    async def end(self) -> None:
        """It is complete."""
        await self._flush()
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Blocking; what was not written is lost."""
        if self._file is not None:
            self._file.close()
            self._file = None

    async def _flush(self) -> None:
        data, self._buffer = self._buffer, bytearray()
        if self._file is not None:
            await asyncio.to_thread(self._file.write, data)


class Files:
    """Keeps files. Methods raise Unavailable while database or store is away."""

    def __init__(
        self,
        backend: Callable[[], Backend],
        clock: Clock,
        folder: Path,
        *,
        max_bytes: int,
        at_once: int = 8,
        within_s: float = _UPLOAD_S,
    ) -> None:
        """`backend` is asked each time, and says why not; `folder` is for what is on its way. `max_bytes`
        bounds files of other purposes than `batch`. An upload takes `within_s` at most, stored and all."""
        self._backend = backend
        self._clock = clock
        self._folder = folder
        self._max_bytes = max_bytes
        self._places = Places(at_once, "uploads")
        self._within_s = within_s

    @asynccontextmanager
    async def workspace(self) -> AsyncIterator[Path]:
        """A folder that is gone after the block."""
        folder = Path(await asyncio.to_thread(_temporary, self._folder))
        try:
            yield folder
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    @asynccontextmanager
    async def receiving(self, owner: str) -> AsyncIterator[Receiving]:
        """A place for one upload of `owner`. Raises ResourceExhausted where too many are running, of all or
        of this one, DeadlineExceeded where the block takes too long: a sender that trickles would keep its
        place from all others."""
        with self._places.taken(owner):
            async with self.workspace() as folder:
                receiving = Receiving(folder, max(self._max_bytes, BATCH_BYTES))
                try:
                    async with asyncio.timeout(self._within_s) as within:
                        yield receiving
                except TimeoutError:
                    if not within.expired():
                        raise
                    raise DeadlineExceeded(f"The upload took longer than {self._within_s:g} s.") from None
                finally:
                    await asyncio.to_thread(receiving.close)

    async def keep(
        self, received: Receiving, owner: str, purpose: str, expires_after_s: int | None
    ) -> StoredFile:
        """The upload as a file of `owner`. Raises InvalidArgument or BodyTooLarge."""
        if purpose not in _UPLOADED:
            listed = ", ".join(_UPLOADED)
            raise InvalidArgument(f"purpose must be one of {listed}.", field="purpose")
        if not received.size:
            raise InvalidArgument("The file is empty.", field="file")
        limit = BATCH_BYTES if purpose == "batch" else self._max_bytes
        if received.size > limit:
            raise BodyTooLarge(f"A file for {purpose} has at most {limit} bytes.", field="file")
        return await self.store(received.at, received.filename, owner, purpose, expires_after_s)

    async def store(
        self,
        source: Path,
        filename: str,
        owner: str,
        purpose: str,
        expires_after_s: int | None = None,
        file_id: str | None = None,
    ) -> StoredFile:
        """`source` as a file. With `file_id` given, doing it again changes nothing."""
        if expires_after_s is not None:
            check_kept(expires_after_s, "expires_after[seconds]")
        now = self._clock.now()
        file = StoredFile(
            file_id=file_id or f"file-{id_text(new_id())}",
            filename=safe_name(filename),
            purpose=purpose,
            size=(await asyncio.to_thread(source.stat)).st_size,
            created_at=now,
            expires_at=None if expires_after_s is None else now + timedelta(seconds=expires_after_s),
        )
        values = {
            "key_id": owner,
            "purpose": purpose,
            "filename": file.filename,
            "bytes": file.size,
            "created_at": file.created_at,
            "expires_at": file.expires_at,
            "deleted_at": None,
        }
        # One that is there already is written anew with the same bytes, and stays readable meanwhile.
        # Not there yet is said, not left out: who leaves it out is of an older release, and has stored it.
        noted = upsert(FileRow).values(file_id=file.file_id, **values, stored_at=None)
        async with transaction(self._backend().engine) as session:
            await session.execute(noted.on_conflict_do_update(index_elements=["file_id"], set_=values))
        await self._backend().store.put(file.path, source)
        stored = update(FileRow).where(FileRow.file_id == file.file_id, FileRow.deleted_at.is_(None))
        async with transaction(self._backend().engine) as session:
            done = await session.execute(stored.values(stored_at=self._clock.now()))
        if not cast("CursorResult[Any]", done).rowcount:  # it took so long that it was swept away
            await self._backend().store.delete(file.path)
            raise Unavailable("The file could not be stored in time.")
        return file

    async def get(self, file_id: str, reader: Reader) -> StoredFile:
        """Raises NotFound."""
        known = known_id(file_id, "File object")
        async with transaction(self._backend().engine) as session:
            row = await session.get(FileRow, known)
        if row is None or not _visible(row, reader, self._clock.now()):
            raise NotFound(f"No such File object: {known}", field="id")
        return _file(row)

    async def list(
        self, reader: Reader, *, purpose: str | None, limit: int, after: str | None, oldest_first: bool
    ) -> tuple[list[StoredFile], bool]:
        """A page, and whether more follow. Raises NotFound for an `after` that is no file."""
        now = self._clock.now()
        after = None if after is None else known_id(after, "File object", "after")
        if purpose is not None and purpose not in (*_UPLOADED, OUTPUT):
            return [], False
        query = select(FileRow).where(
            FileRow.deleted_at.is_(None),
            FileRow.stored_at.is_not(None),
            FileRow.purpose != INTERNAL,
            or_(FileRow.expires_at.is_(None), FileRow.expires_at > now),
        )
        if not reader.everything:
            query = query.where(FileRow.key_id == reader.key_id)
        if purpose is not None:
            query = query.where(FileRow.purpose == purpose)
        order = (FileRow.created_at, FileRow.file_id)
        async with transaction(self._backend().engine) as session:
            if after is not None:
                last = await session.get(FileRow, after)
                if last is None or (last.key_id != reader.key_id and not reader.everything):
                    raise NotFound(f"No such File object: {after}", field="after")
                same = FileRow.created_at == last.created_at
                if oldest_first:
                    behind = or_(
                        FileRow.created_at > last.created_at, and_(same, FileRow.file_id > last.file_id)
                    )
                else:
                    behind = or_(
                        FileRow.created_at < last.created_at, and_(same, FileRow.file_id < last.file_id)
                    )
                query = query.where(behind)
            ordered = order if oldest_first else tuple(column.desc() for column in order)
            rows = (await session.scalars(query.order_by(*ordered).limit(limit + 1))).all()
        return [_file(row) for row in rows[:limit]], len(rows) > limit

    def content(self, file: StoredFile) -> AsyncIterator[bytes]:
        """The bytes, in pieces."""
        return self._backend().store.stream(file.path, _PIECE)

    async def download(self, file: StoredFile, to: Path) -> None:
        """The bytes as a local file."""
        await self._backend().store.download(file.path, to)

    async def delete(self, file_id: str, reader: Reader) -> None:
        """Raises NotFound."""
        file = await self.get(file_id, reader)
        async with transaction(self._backend().engine) as session:
            await session.execute(
                update(FileRow).where(FileRow.file_id == file.file_id).values(deleted_at=self._clock.now())
            )
        await self._remove(file)

    async def sweep(self) -> None:
        """Remove what expired, and objects of uploads and deletions that were interrupted."""
        now = self._clock.now()
        abandoned = and_(FileRow.stored_at.is_(None), FileRow.created_at <= now - _WRITTEN_WITHIN)
        gone = or_(FileRow.expires_at <= now, FileRow.deleted_at.is_not(None), abandoned)
        async with transaction(self._backend().engine) as session:
            rows = (await session.scalars(select(FileRow).where(gone).limit(_AT_ONCE))).all()
        for row in rows:
            await self._remove(_file(row))

    async def sweeping(self) -> None:
        """`sweep` again and again, until cancelled."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            try:
                await self.sweep()
            except HeadraceError as error:
                log.warning("files_not_swept", reason=error.message)
            except Exception:
                log.exception("files_not_swept")

    async def _remove(self, file: StoredFile) -> None:
        await self._backend().store.delete(file.path)
        async with transaction(self._backend().engine) as session:
            row = await session.get(FileRow, file.file_id)
            if row is not None:
                await session.delete(row)


def known_id(text: str, kind: str, field: str = "id") -> str:
    """`text`, where an id could be that. Raises NotFound: PostgreSQL takes no zeros within text, and nothing
    here has an id that is longer."""
    if not _ID.fullmatch(text):
        raise NotFound(f"No such {kind}.", field=field)
    return text


def check_kept(seconds: int, field: str) -> None:
    """Raise InvalidArgument where files are not kept for so long, or for longer."""
    if not _HOUR_S <= seconds <= _MOST_S:
        raise InvalidArgument(f"Files are kept {_HOUR_S} to {_MOST_S} seconds.", field=field)


def safe_name(filename: str) -> str:
    """`filename` as the last part of a path: letters, digits, `.`, `_` and `-`, without folders."""
    name = _ODD.sub("_", filename.replace("\\", "/").rpartition("/")[2]).strip(".")[-_MAX_NAME:]
    return name.lstrip(".") or "file"


def _temporary(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    return tempfile.mkdtemp(dir=folder)


def _visible(row: FileRow, reader: Reader, now: datetime) -> bool:
    return row.readable(now) and (reader.everything or row.key_id == reader.key_id)


def _file(row: FileRow) -> StoredFile:
    return StoredFile(row.file_id, row.filename, row.purpose, row.bytes, row.created_at, row.expires_at)
