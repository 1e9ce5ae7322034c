"""Where rows end in a piece of text. Pure, and by whole arrays: a gigabyte of lines is a matter of seconds.

JSON Lines: a row is a line that holds more than white space (space, tab, CR). CSV: as RFC 4180 has it, also
with line ends inside quotes; a quote is either around a whole value or doubled within one. Empty lines are no
rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.gateway.jobs.splitting.port import refused

_LF, _CR, _QUOTE, _COMMA = 10, 13, 34, 44
_BLANKS = np.isin(np.arange(256), (9, 10, 13, 32))
_BEFORE_OPENING = np.isin(np.arange(256), (_COMMA, _LF, _QUOTE))
_AFTER_CLOSING = np.isin(np.arange(256), (_COMMA, _LF, _CR, _QUOTE))

Positions = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Ends:
    """Ends of complete lines (exclusive, after the newline), and the number of rows up to each."""

    at: Positions
    rows: Positions


def json_ends(text: bytes, *, last: bool) -> Ends:
    """The lines of `text`, which begins at one. With `last`, what stands behind the last newline is a line
    too."""
    at = _closed(np.flatnonzero(_array(text) == _LF) + 1, text, last=last)
    data, starts = _array(text), _starts(at)
    if not _BLANKS[data[starts]].any():
        return Ends(at, np.arange(1, len(at) + 1))
    visible = np.add.reduceat(~_BLANKS[data[: at[-1]]], starts, dtype=np.int64)
    return Ends(at, np.cumsum(visible > 0))


def csv_ends(text: bytes, line: int, *, last: bool) -> Ends:
    """The records of `text`, which begins at one, on line `line` of the file (from 1). Raises InvalidArgument
    where quotes or line ends could be read in two ways."""
    data = _array(text)
    newlines = np.flatnonzero(data == _LF)
    quotes = np.flatnonzero(data == _QUOTE)
    if len(quotes):
        _check_quotes(data, quotes, newlines, line)
        ending = newlines[np.searchsorted(quotes, newlines) % 2 == 0]
        if last and len(quotes) % 2:
            number = _line_of(newlines, int(quotes[-1]), line)
            raise refused(f"Line {number}: a quoted value is not closed.")
    else:
        ending = newlines
    if b"\r" in text:
        _check_returns(data, quotes, newlines, line)
    at = _closed(ending + 1, text, last=last)
    starts = _starts(at)
    content = at - starts
    content -= data[at - 1] == _LF
    ends_in_return = (content > 0) & (data[np.maximum(starts + content - 1, 0)] == _CR)
    content -= ends_in_return
    return Ends(at, np.cumsum(content > 0))


def _array(text: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(text, dtype=np.uint8)


def _closed(at: Any, text: bytes, *, last: bool) -> Positions:
    if last and text and (not len(at) or at[-1] < len(text)):
        return np.append(at, len(text))
    found: Positions = at
    return found


def _starts(at: Positions) -> Positions:
    return np.concatenate((np.zeros(1, dtype=np.int64), at[:-1])) if len(at) else at


def _check_quotes(data: NDArray[np.uint8], quotes: Positions, newlines: Positions, line: int) -> None:
    opening, closing = quotes[0::2], quotes[1::2]
    opening = opening[opening > 0]
    closing = closing[closing + 1 < len(data)]
    wrong = np.concatenate(
        (
            opening[~_BEFORE_OPENING[data[opening - 1]]],
            closing[~_AFTER_CLOSING[data[closing + 1]]],
        )
    )
    if len(wrong):
        at = _line_of(newlines, int(wrong.min()), line)
        raise refused(f"Line {at}: a quote stands inside a value; put the value in quotes and double it.")


def _check_returns(data: NDArray[np.uint8], quotes: Positions, newlines: Positions, line: int) -> None:
    returns = np.flatnonzero(data[:-1] == _CR)
    alone = returns[data[returns + 1] != _LF]
    alone = alone[np.searchsorted(quotes, alone) % 2 == 0]
    if len(alone):
        at = _line_of(newlines, int(alone[0]), line)
        raise refused(f"Line {at}: a carriage return without a line feed, outside quotes.")


def _line_of(newlines: Positions, position: int, line: int) -> int:
    return line + int(np.searchsorted(newlines, position))
