"""Forms as they arrive, in whatever pieces."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import pytest

from services.common.errors import InvalidArgument, MalformedBody
from services.common.multipart import read_parts

TYPE = "multipart/form-data; boundary=b"
BODY = (
    b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.csv"\r\nContent-Type: text/csv\r\n\r\n'
    b"x\r\n--b-\r\n1\r\n--b--\r\n"
)


class Noted:
    """Keeps what came; refuses the field `refused`."""

    def __init__(self, refused: str | None = None) -> None:
        self.parts: list[tuple[str, str, bytes]] = []
        self.ended = 0
        self._refused = refused

    async def begin(self, name: str, filename: str) -> None:
        if name == self._refused:
            raise InvalidArgument("not this one", field=name)
        self.parts.append((name, filename, b""))

    async def write(self, data: bytes) -> None:
        name, filename, before = self.parts[-1]
        self.parts[-1] = name, filename, before + data

    async def end(self) -> None:
        self.ended += 1


async def read(body: bytes, size: int, into: Noted | None = None, content_type: str = TYPE) -> Noted:
    async def pieces() -> AsyncIterator[bytes]:
        for first in range(0, len(body), size):
            yield body[first : first + size]

    noted = into or Noted()
    await read_parts(content_type, pieces(), noted, "`file`")
    return noted


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_parts_come_in_order_and_whole(size: int) -> None:
    noted = await read(BODY, size)
    assert noted.parts == [("purpose", "", b"batch"), ("file", "a.csv", b"x\r\n--b-\r\n1")]
    assert noted.ended == 2


@pytest.mark.parametrize(
    ("body", "content_type", "said"),
    [
        (BODY, "application/json", "with `file`"),
        (BODY, "multipart/form-data", "with `file`"),
        (BODY[:-6], TYPE, "ends early"),
        (b"nonsense", TYPE, "malformed"),
        (BODY.replace(b"text/csv", b"x" * 20_000), TYPE, "malformed"),
    ],
    ids=["another type", "no boundary", "cut", "nonsense", "an endless header"],
)
async def test_what_is_no_form_is_refused(body: bytes, content_type: str, said: str) -> None:
    with pytest.raises(MalformedBody, match=re.escape(said)):
        await read(body, 64, content_type=content_type)


async def test_what_the_parts_refuse_ends_the_reading() -> None:
    noted = Noted(refused="file")
    with pytest.raises(InvalidArgument) as refused:
        await read(BODY, 16, noted)
    assert refused.value.field == "file"
    assert noted.parts == [("purpose", "", b"batch")]
