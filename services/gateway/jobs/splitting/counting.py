"""How many rows an input has, roughly and at once: tables say it, of texts the first lines are measured."""

from __future__ import annotations

import asyncio

from headrace.v1.batch_pb2 import InputFormat

from services.common.objects import InputSources
from services.gateway.jobs.splitting.cutting import GROUPS, TEXTS, Input
from services.gateway.jobs.splitting.lines import csv_ends, json_ends

_SAMPLE = 256 << 10


async def about_rows(sources: InputSources, of: Input) -> float | None:
    """None where nothing can be said: no line ends within the sample. Raises as `cuts` does."""
    if of.format in GROUPS:
        file = await sources.open(of.uri)
        try:
            groups = await asyncio.to_thread(GROUPS[of.format], file)
        finally:
            file.close()
        return sum(group.rows for group in groups)
    if of.format in TEXTS:
        size = (await sources.stat(of.uri)).size
        sample = await sources.read(of.uri, 0, min(size, _SAMPLE))
        return rows_of_sample(sample, of.format, size)
    return len(await sources.list(of.uri))


def rows_of_sample(sample: bytes, kind: InputFormat, size: int) -> float | None:
    """Rows of a text of `size` bytes that begins with `sample`, if all its rows were as long as these. Raises
    InvalidArgument where lines could be read in two ways."""
    is_csv, whole = kind == InputFormat.INPUT_FORMAT_CSV, len(sample) >= size
    ends = csv_ends(sample, 1, last=whole) if is_csv else json_ends(sample, last=whole)
    if not len(ends.at):
        return 0.0 if whole else None
    first = 1 if is_csv else 0  # the names of the columns
    rows = int(ends.rows[-1]) - first
    if whole or rows <= 0:
        return float(max(0, rows)) if whole else None
    begin = int(ends.at[0]) if is_csv else 0
    return rows * (size - begin) / (int(ends.at[-1]) - begin)
