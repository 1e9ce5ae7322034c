"""multipart/form-data as it comes, in whatever pieces."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from services.common.errors import BodyTooLarge, MalformedBody
from services.gateway.jobs.openai_files import safe_name
from services.gateway.rest.multipart import receive_form

KIND = "multipart/form-data; boundary=b0"


class Sink:
    def __init__(self) -> None:
        self.name = ""
        self.content = b""

    async def begin(self, filename: str) -> None:
        self.name = filename

    async def write(self, data: bytes) -> None:
        self.content += data


def part(name: str, content: bytes, filename: str | None = None) -> bytes:
    file = f'; filename="{filename}"' if filename is not None else ""
    return f'--b0\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + content + b"\r\n"


async def pieces(body: bytes, size: int) -> AsyncIterator[bytes]:
    for at in range(0, len(body), size):
        yield body[at : at + size]


@pytest.mark.parametrize("size", [1, 7, 100_000])
async def test_fields_are_kept_and_the_file_passes_by(size: int) -> None:
    content = bytes(range(256)) * 4 + b"\r\n--b0x\r\n"
    body = (
        part("purpose", b"batch")
        + part("file", content, "rows.jsonl")
        + part("a[b]", b"\xc3\xa9")
        + b"--b0--\r\n"
    )
    sink = Sink()
    fields = await receive_form(KIND, pieces(body, size), sink)
    assert fields == {"purpose": "batch", "a[b]": "é"}
    assert (sink.name, sink.content) == ("rows.jsonl", content)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b"--b0--"),
        (KIND, b"nonsense"),
        (KIND, part("file", b"x", "f")),  # no end
        (KIND, part("purpose", b"batch") + b"--b0--\r\n"),  # no file
        (KIND, part("file", b"x", "f") + part("file", b"y", "g") + b"--b0--\r\n"),
        (KIND, b"".join(part(f"f{n}", b"") for n in range(40)) + b"--b0--\r\n"),
        (KIND, b"--b0\r\nX: " + b"y" * 20_000 + b"\r\n\r\n"),
    ],
)
async def test_what_is_no_such_form_is_refused(kind: str, body: bytes) -> None:
    with pytest.raises(MalformedBody):
        await receive_form(kind, pieces(body, 50), Sink())


async def test_a_field_has_a_bound() -> None:
    body = part("purpose", b"x" * 20_000) + b"--b0--\r\n"
    with pytest.raises(BodyTooLarge):
        await receive_form(KIND, pieces(body, 1000), Sink())


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("rows.jsonl", "rows.jsonl"),
        ("../../etc/passwd", "passwd"),
        ("C:\\x\\my rows.csv", "my_rows.csv"),
        ("", "file"),
        ("..", "file"),
        (".hidden", "hidden"),
        ("a" * 300 + ".parquet", "a" * 120 + ".parquet"),
        ("Ärzte/é.csv", "_.csv"),
    ],
)
def test_names_of_files_are_single_path_segments(given: str, kept: str) -> None:
    assert safe_name(given) == kept
