"""Parquet objects of the prediction store: their names, their bytes, and where DuckDB finds them."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from services.common.errors import NotFound
from services.common.objects import ArtifactStore

_FOLDER = "predictions"
#: Rows of a group of a Parquet file, which readers skip or read together.
ROWS_A_GROUP = 32_768


@dataclass(frozen=True, slots=True)
class Segment:
    """What is written about one object. Ids are bounds, both included; times are Unix microseconds."""

    object: str
    model: str
    version: str
    layout: str
    rows: int
    size: int
    first_id: bytes
    last_id: bytes
    first_at_us: int
    last_at_us: int


def object_name(model: str, version: str, first_at_us: int, members: Iterable[bytes]) -> str:
    """A new name for an object of these members (batch ids, or names of joined objects). Written again, it
    has another name: who removes what was left of the first time cannot hit the second."""
    day = datetime.fromtimestamp(first_at_us / 1e6, UTC).strftime("%Y-%m-%d")
    digest = hashlib.blake2b(b"\n".join(sorted(members)), digest_size=16).hexdigest()
    return f"{_FOLDER}/{model}/{version or '-'}/{day}/{digest}-{secrets.token_hex(4)}.parquet"


def encode(
    table: pa.Table, version: str, layout: str, members: Sequence[bytes], *, lasting: bool = True
) -> tuple[Segment, bytes]:
    """The object of a table of one model version. A table of more than one group of rows is sorted by request
    id, so that a look-up skips most groups; within one group the order tells it nothing. See
    `encode_ordered`."""
    ids = table["request_id"].combine_chunks()
    if table.num_rows > ROWS_A_GROUP and not _is_sorted(_halves(ids)):
        table = table.sort_by("request_id")
    return encode_ordered([table], version, layout, members, _bounds(ids), lasting=lasting)


def encode_ordered(
    tables: Iterable[pa.Table],
    version: str,
    layout: str,
    members: Sequence[bytes],
    bounds: tuple[bytes, bytes],
    *,
    lasting: bool = True,
) -> tuple[Segment, bytes]:
    """The object of at least one table, all of one schema, their rows as they are, with the first and last
    request id. One that is not `lasting`, since it will be joined with others, is packed in less time and an
    eighth less tightly. No more than one of the tables is asked for at a time. Blocks; run it in a thread."""
    sink = pa.BufferOutputStream()
    rows, times, model, writer = 0, [], "", None
    for table in tables:
        if writer is None:
            model = table["model"][0].as_py()
            writer = pq.ParquetWriter(
                sink,
                table.schema,
                compression="zstd" if lasting else "lz4",
                use_dictionary=["source", "model", "version", "artifact_digest", "variant", "experiment"],
                store_schema=True,
            )
        writer.write_table(table, row_group_size=ROWS_A_GROUP)
        rows += table.num_rows
        times += pc.min_max(table["answered_at_us"]).as_py().values()
    if writer is None:
        raise ValueError("an object has at least one table")
    writer.close()
    data = sink.getvalue().to_pybytes()
    segment = Segment(
        object=object_name(model, version, min(times), members),
        model=model,
        version=version,
        layout=layout,
        rows=rows,
        size=len(data),
        first_id=bounds[0],
        last_id=bounds[1],
        first_at_us=min(times),
        last_at_us=max(times),
    )
    return segment, data


def _halves(ids: pa.Array) -> NDArray[np.uint64]:
    """Ids of 16 bytes, none of them null, as two numbers each: (ids, 2)."""
    return np.frombuffer(ids.buffers()[1], ">u8").reshape(-1, 2)[ids.offset : ids.offset + len(ids)]


def _is_sorted(halves: NDArray[np.uint64]) -> bool:
    """Whether these ids ascend, as those of a job do: to look costs a thirtieth of sorting."""
    high, low = halves[:, 0], halves[:, 1]
    return bool(np.all((high[:-1] < high[1:]) | ((high[:-1] == high[1:]) & (low[:-1] <= low[1:]))))


def _bounds(ids: pa.Array) -> tuple[bytes, bytes]:
    """The first and the last id in their order."""
    halves = _halves(ids)
    high = halves[:, 0]
    ends = []
    for least, pick in ((high.min(), np.argmin), (high.max(), np.argmax)):
        places = np.flatnonzero(high == least)
        ends.append(ids[int(places[pick(halves[places, 1])])].as_py())
    return ends[0], ends[1]


class SegmentFiles:
    """Objects as local files: where the store is a local folder they lie there already, else they are
    fetched into `cache`, at most `cache_bytes` of them that nobody holds, the longest unused going first."""

    def __init__(self, store: ArtifactStore, cache: Path, cache_bytes: int = 4 << 30) -> None:
        self._store = store
        self._cache = cache
        self._cache_bytes = cache_bytes
        self._fetching = asyncio.Semaphore(4)
        self._held: Counter[Path] = Counter()

    @asynccontextmanager
    async def held(self, objects: Sequence[str]) -> AsyncIterator[list[str]]:
        """Local files of the objects, in their order; none of them goes while the block runs. Raises
        FileNotFoundError for an object that is gone."""
        local = [self._store.local_path(name) for name in objects]
        if all(path is not None for path in local):
            yield [str(path) for path in local]
            return
        paths = [self._cache / name for name in objects]
        self._held.update(paths)
        try:
            await asyncio.gather(*map(self._fetch, objects, paths))
            yield [str(path) for path in paths]
        finally:
            self._held.subtract(paths)
            self._held += Counter()  # without those that nobody holds
            await self._evict()

    async def _fetch(self, name: str, path: Path) -> None:
        if await asyncio.to_thread(_touched, path):
            return
        try:
            async with self._fetching:
                await self._store.download(name, path)
        except NotFound as error:
            raise FileNotFoundError(name) from error

    async def _evict(self) -> None:
        for file in await asyncio.to_thread(self._too_many):
            # On the loop, where files are taken hold of, so that none is taken between look and removal.
            if file not in self._held:
                file.unlink(missing_ok=True)

    def _too_many(self) -> list[Path]:
        found = []
        for file in self._cache.rglob("*.parquet"):
            with suppress(FileNotFoundError):  # another question has just removed it
                found.append((file.stat().st_mtime, file.stat().st_size, file))
        found.sort()
        excess = sum(size for _, size, _ in found) - self._cache_bytes
        chosen = []
        for _, size, file in found:
            if excess <= 0:
                break
            if file not in self._held:
                chosen.append(file)
                excess -= size
        return chosen


def _touched(path: Path) -> bool:
    """Whether the file is there; if so, it was used just now."""
    there = path.exists()
    if there:
        path.touch()
    return there
