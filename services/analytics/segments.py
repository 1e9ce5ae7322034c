"""Parquet objects of the prediction store: their names, their bytes, and where DuckDB finds them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from services.common.objects import ArtifactStore

_FOLDER = "predictions"
_ROWS_A_GROUP = 32_768


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
    """The name for exactly these members (batch ids, or names of joined objects): written twice, the object
    is replaced by the same."""
    day = datetime.fromtimestamp(first_at_us / 1e6, UTC).strftime("%Y-%m-%d")
    digest = hashlib.blake2b(b"\n".join(sorted(members)), digest_size=16).hexdigest()
    return f"{_FOLDER}/{model}/{version or '-'}/{day}/{digest}.parquet"


def encode(table: pa.Table, version: str, layout: str, members: Sequence[bytes]) -> tuple[Segment, bytes]:
    """The object of a table of one model version, sorted by request id so that a look-up skips most of it.
    Blocks; run it in a thread."""
    ordered = table.sort_by("request_id")
    times = pc.min_max(ordered["answered_at_us"]).as_py()
    sink = pa.BufferOutputStream()
    pq.write_table(
        ordered,
        sink,
        compression="zstd",
        row_group_size=_ROWS_A_GROUP,
        use_dictionary=["source", "model", "version", "artifact_digest", "variant"],
        store_schema=True,
    )
    data = sink.getvalue().to_pybytes()
    model = ordered["model"][0].as_py()
    segment = Segment(
        object=object_name(model, version, times["min"], members),
        model=model,
        version=version,
        layout=layout,
        rows=ordered.num_rows,
        size=len(data),
        first_id=ordered["request_id"][0].as_py(),
        last_id=ordered["request_id"][-1].as_py(),
        first_at_us=times["min"],
        last_at_us=times["max"],
    )
    return segment, data


class SegmentFiles:
    """Objects as local files: where the store is a local folder they lie there already, else they are
    fetched into `cache`, at most `cache_bytes` of them, the longest unused going first."""

    def __init__(self, store: ArtifactStore, cache: Path, cache_bytes: int = 4 << 30) -> None:
        self._store = store
        self._cache = cache
        self._cache_bytes = cache_bytes
        self._fetching = asyncio.Semaphore(4)

    async def paths(self, objects: Sequence[str]) -> list[str]:
        """Local files of the objects, in their order."""
        found = list(await asyncio.gather(*(self._path(name) for name in objects)))
        if found and self._store.local_path(objects[0]) is None:
            await asyncio.to_thread(self._evict, {Path(path) for path in found})
        return found

    async def _path(self, name: str) -> str:
        local = self._store.local_path(name)
        if local is not None:
            return str(local)
        path = self._cache / name
        if path.exists():
            path.touch()
        else:
            async with self._fetching:
                await self._store.download(name, path)
        return str(path)

    def _evict(self, wanted: set[Path]) -> None:
        files = sorted(self._cache.rglob("*.parquet"), key=lambda file: file.stat().st_mtime)
        size = sum(file.stat().st_size for file in files)
        for file in files:
            if size <= self._cache_bytes:
                return
            if file not in wanted:
                size -= file.stat().st_size
                file.unlink(missing_ok=True)
