"""Long bodies of the Open Inference Protocol in JSON, whose lists of numbers are cut out before the rest is
parsed.

A parser that looks for the end of a list walks through all of it, 2 ms a megabyte, and holds the interpreter
meanwhile. A list of numbers has no quote and no brace in it, so its end is found by a search for these, in a
tenth of that time and less.
"""

from __future__ import annotations

from typing import Final

#: Shorter bodies are parsed in no time.
LONG_BODY_BYTES: Final = 64 << 10
#: What is left of a body without its lists.
_MAX_REST: Final = 16 << 10
_MOST_LISTS: Final = 64
_KEY: Final = b'"data"'
_SPACE: Final = b" \t\r\n"
_STANDS_IN: Final = b'["list '


def stand_in(number: int) -> bytes:
    """What stands in the rest for that list."""
    return b'%b%d"]' % (_STANDS_IN, number)


def cut_out(body: bytes, end: int) -> tuple[bytes, list[memoryview]] | None:
    """The JSON `body[:end]` with a `stand_in` for every list that follows a key `data`, and these as they
    stand: who reads them sees whether they are lists. None where something else follows, or much is left.

    A JSON value may be exchanged for another without a say in how the rest is read. So a body says what its
    rest says, where each list is what some input has for data there."""
    view = memoryview(body)
    kept: list[bytes] = []
    lists: list[memoryview] = []
    at = left = 0
    while (key := body.find(_KEY, at, end)) >= 0:
        span = _list_behind(body, key + len(_KEY), end)
        if span is None or len(lists) == _MOST_LISTS:
            return None
        start, stop = span
        left += start - at
        if left > _MAX_REST:
            return None
        kept += (body[at:start], stand_in(len(lists)))
        lists.append(view[start:stop])
        at = stop
    if not lists or left + end - at > _MAX_REST:
        return None
    rest = b"".join((*kept, body[at:end]))
    return (rest, lists) if rest.count(_STANDS_IN) == len(lists) else None


def _list_behind(body: bytes, at: int, end: int) -> tuple[int, int] | None:
    """Where the list begins and ends that is the value of the key that ends at `at`, if it has numbers in it
    and nothing else."""
    start = body.find(b"[", at, min(end, at + _MAX_REST))
    if start < 0 or body[at:start].strip(_SPACE) != b":":
        return None
    quote = body.find(b'"', start, end)
    brace = body.find(b"}", start, end if quote < 0 else quote)
    limit = brace if brace >= 0 else quote
    stop = body.rfind(b"]", start, limit if limit >= 0 else end) + 1
    return (start, stop) if stop > start else None
