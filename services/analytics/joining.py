"""One Parquet object instead of several, a group of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from services.analytics.columns import CORE
from services.analytics.segments import ROWS_A_GROUP, Segment, encode_ordered
from services.analytics.tables import SegmentRow


def encode_joined(
    rows: Sequence[SegmentRow], files: Sequence[str], *, lasting: bool = True
) -> tuple[Segment, bytes]:
    """One object of what is in several of one version and layout; columns that some lack are null there."""
    # Each is sorted and ids grow with time, so one after another they are sorted well enough for look-ups,
    # which skip groups of rows by their bounds; sorting all again would be half of the work.
    in_order = sorted(zip(rows, files, strict=True), key=lambda pair: pair[0].first_id)
    return encode_ordered(
        _groups([file for _, file in in_order]),
        rows[0].version,
        rows[0].layout,
        [row.object.encode() for row in rows],
        (min(row.first_id for row in rows), max(row.last_id for row in rows)),
        lasting=lasting,
    )


def _groups(files: Sequence[str]) -> Iterator[pa.Table]:
    """The rows of all files in their order, as tables of one schema: a group of rows each, or a little more.
    All of them at once would be hundreds of megabytes."""
    found = pa.unify_schemas([pq.read_schema(file) for file in files], promote_options="default")
    core = [name for name in CORE.names if name in found.names]
    schema = pa.schema([found.field(name) for name in [*core, *(n for n in found.names if n not in core)]])
    waiting = [schema.empty_table()]
    for file in files:
        with pq.ParquetFile(file) as source:
            for group in range(source.num_row_groups):
                # One thread: another would only take the other processor from those who answer requests.
                waiting.append(source.read_row_group(group, use_threads=False))
                if sum(table.num_rows for table in waiting) >= ROWS_A_GROUP:
                    yield _whole(waiting)
                    waiting = [schema.empty_table()]
    if len(waiting) > 1:
        yield _whole(waiting)


def _whole(tables: Sequence[pa.Table]) -> pa.Table:
    """In the schema of the first; columns that others lack are null."""
    joined = pa.concat_tables(tables, promote_options="default").unify_dictionaries()
    return joined.select(tables[0].column_names)
