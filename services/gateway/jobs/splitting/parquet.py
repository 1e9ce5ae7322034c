"""Parquet by its footer: nothing but metadata is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from services.gateway.jobs.splitting.groups import Group
from services.gateway.jobs.splitting.port import refused

_MAGIC = b"PAR1"
_TRAILER = 8
#: A footer names every column of every row group; a larger one than this is no honest file.
_MAX_FOOTER = 64 << 20
_MAX_REASON = 200


def parquet_groups(file: IO[bytes]) -> Sequence[Group]:
    """The row groups of an open file. Blocks. Raises InvalidArgument where it is no Parquet."""
    size = file.seek(0, 2)
    if size < 2 * len(_MAGIC) + _TRAILER - len(_MAGIC):
        raise refused("The input is no Parquet file: it is too short.")
    file.seek(0)
    if file.read(len(_MAGIC)) != _MAGIC:
        raise refused("The input is no Parquet file: it does not begin with PAR1.")
    file.seek(size - _TRAILER)
    trailer = file.read(_TRAILER)
    if trailer[4:] != _MAGIC:
        raise refused("The Parquet file is cut short: it does not end with PAR1.")
    footer = int.from_bytes(trailer[:4], "little")
    if footer > size - _TRAILER - len(_MAGIC) or footer > _MAX_FOOTER:
        raise refused("The footer of the Parquet file is damaged, or larger than 64 MB.")
    file.seek(0)
    try:
        metadata = pq.read_metadata(file)
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        found = [Group(group.num_rows, group.total_byte_size) for group in groups]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise refused(f"The Parquet file cannot be read: {str(error)[:_MAX_REASON]}") from None
    if any(group.rows < 0 or group.bytes < 0 for group in found):
        raise refused("The footer of the Parquet file is damaged.")
    return found
