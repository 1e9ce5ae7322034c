"""What cutting an input is, whatever its format."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from headrace.v1.batch_pb2 import InputRange

from services.common.errors import InvalidArgument

FIELD = "input_uri"
#: Chunks that are handed on, and stored, at once.
CHUNKS_AT_ONCE = 64

#: Where to go on, as JSON; its keys are the format's own.
Cursor = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows `first_row` to before `first_row + rows` of the job, and where they lie."""

    first_row: int
    rows: int
    input: InputRange


@dataclass(frozen=True, slots=True)
class Cut:
    """Some chunks, in order. `cursor` goes on behind them, `rows` counts all rows so far; `done`: there are
    no more."""

    chunks: Sequence[Chunk]
    cursor: Cursor
    rows: int
    done: bool


#: Cuts without gaps; the last one, and only that, is `done`. Raises InvalidArgument with field `input_uri`
#: where the input is not what its format says, and what InputSources raises.
Cuts = AsyncGenerator[Cut, None]


class TextSource(Protocol):
    """Bytes that can be read in pieces."""

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    async def read(self, start: int, end: int) -> bytes:
        """Those from `start` to before `end`."""
        ...


def refused(sentence: str) -> InvalidArgument:
    """The input is not what it should be."""
    return InvalidArgument(sentence, field=FIELD)
