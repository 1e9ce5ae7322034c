"""Which way an input is cut."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from headrace.v1.batch_pb2 import InputFormat, InputRange

from services.common.objects import InputSources
from services.gateway.jobs.sizing import ChunkLimits
from services.gateway.jobs.splitting.arrow_file import arrow_batches
from services.gateway.jobs.splitting.groups import cut_groups
from services.gateway.jobs.splitting.images import cut_images
from services.gateway.jobs.splitting.parquet import parquet_groups
from services.gateway.jobs.splitting.port import Cursor, Cuts, refused
from services.gateway.jobs.splitting.text import cut_text

#: Formats that say how many rows lie where.
GROUPS = {
    InputFormat.INPUT_FORMAT_PARQUET: parquet_groups,
    InputFormat.INPUT_FORMAT_ARROW: arrow_batches,
}
#: Formats of lines.
TEXTS = (
    InputFormat.INPUT_FORMAT_JSON_LINES,
    InputFormat.INPUT_FORMAT_CSV,
    InputFormat.INPUT_FORMAT_OPENAI,
)


@dataclass(frozen=True, slots=True)
class Input:
    """What a job reads: an address with the etag it had, or `inline` JSON Lines."""

    uri: str
    format: InputFormat
    etag: str
    inline: bytes | None = None


async def cuts(sources: InputSources, of: Input, limits: ChunkLimits, cursor: Cursor | None) -> Cuts:
    """Cut `of` from `cursor` on. Raises as Cuts says."""
    if of.inline is not None:
        text: _Inline | _Object = _Inline(of.inline)
    elif of.format in TEXTS:
        text = _Object(sources, of, (await sources.stat(of.uri)).size)
    elif of.format in GROUPS:
        async for cut in _cut_groups(sources, of, limits, cursor):
            yield cut
        return
    elif of.format == InputFormat.INPUT_FORMAT_IMAGES:
        for cut in cut_images(of.uri, await sources.list(of.uri), limits, cursor):
            yield cut
        return
    else:
        raise refused("The format of the input is not known.")
    async for cut in cut_text(text, of.format, limits, cursor, text.range):
        yield cut


async def _cut_groups(sources: InputSources, of: Input, limits: ChunkLimits, cursor: Cursor | None) -> Cuts:
    file = await sources.open(of.uri, etag=of.etag)
    try:
        groups = await asyncio.to_thread(GROUPS[of.format], file)
    finally:
        file.close()

    def range_of(group: int, offset: int) -> InputRange:
        return InputRange(uri=of.uri, format=of.format, etag=of.etag, group=group, group_offset=offset)

    for cut in cut_groups(groups, limits, cursor, range_of):
        yield cut


class _Inline:
    """Rows that came with the job."""

    def __init__(self, text: bytes) -> None:
        self._text = text
        self.size = len(text)

    async def read(self, start: int, end: int) -> bytes:
        return self._text[start:end]

    def range(self, start: int, end: int, columns: list[str]) -> InputRange:
        return InputRange(format=InputFormat.INPUT_FORMAT_JSON_LINES, inline=self._text[start:end])


class _Object:
    """Rows of a file."""

    def __init__(self, sources: InputSources, of: Input, size: int) -> None:
        self._sources = sources
        self._of = of
        self.size = size

    async def read(self, start: int, end: int) -> bytes:
        return await self._sources.read(self._of.uri, start, end, etag=self._of.etag)

    def range(self, start: int, end: int, columns: list[str]) -> InputRange:
        of = self._of
        return InputRange(
            uri=of.uri, format=of.format, etag=of.etag, first_byte=start, end_byte=end, columns=columns
        )
