"""multipart/form-data as it arrives: one part after another, nothing kept."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from python_multipart.multipart import MultipartParser, parse_options_header

from services.common.errors import MalformedBody

_MAX_HEADER_BYTES = 16 << 10


class Parts(Protocol):
    """Where the parts of a form go, in their order. What it raises ends the reading."""

    async def begin(self, name: str, filename: str) -> None:
        """A part of the field `name` (empty: it has none) comes."""

    async def write(self, data: bytes) -> None:
        """More of that part."""

    async def end(self) -> None:
        """It is complete."""


async def read_parts(content_type: str, body: AsyncIterator[bytes], parts: Parts, wanted: str) -> None:
    """Read `body` into `parts`. Raises MalformedBody where it is no form (of which `wanted` says what is in
    it), breaks the format or ends early."""
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise MalformedBody(f"The body is multipart/form-data with {wanted}.")
    events = _Events()
    try:
        parser = MultipartParser(options[b"boundary"], events.callbacks())  # type: ignore[arg-type]  # a TypedDict there
    except ValueError as error:
        raise MalformedBody("The boundary of the multipart body is too long.") from error
    async for chunk in body:
        try:
            parser.write(chunk)
        except ValueError as error:
            raise MalformedBody("The multipart body is malformed.") from error
        await events.hand_on(parts)
    if not events.complete:
        raise MalformedBody("The multipart body ends early.")


class _Events:
    """Collects the parser's synchronous events of one chunk."""

    def __init__(self) -> None:
        self.complete = False
        self._events: list[tuple[str, bytes]] = []
        self._header = self._value = self._disposition = b""

    def callbacks(self) -> dict[str, object]:
        """What MultipartParser calls."""

        def on_header_field(data: bytes, start: int, end: int) -> None:
            self._header += data[start:end]
            _bound(self._header)

        def on_header_value(data: bytes, start: int, end: int) -> None:
            self._value += data[start:end]
            _bound(self._value)

        def on_header_end() -> None:
            if self._header.lower() == b"content-disposition":
                self._disposition = self._value
            self._header = self._value = b""

        def on_headers_finished() -> None:
            self._events.append(("begin", self._disposition))
            self._disposition = b""

        def on_part_data(data: bytes, start: int, end: int) -> None:
            self._events.append(("data", data[start:end]))

        def on_part_end() -> None:
            self._events.append(("end", b""))

        def on_end() -> None:
            self.complete = True

        functions = (
            on_header_field,
            on_header_value,
            on_header_end,
            on_headers_finished,
            on_part_data,
            on_part_end,
            on_end,
        )
        return {function.__name__: function for function in functions}

    async def hand_on(self, parts: Parts) -> None:
        events, self._events = self._events, []
        for kind, data in events:
            if kind == "begin":
                _kind, options = parse_options_header(data)
                await parts.begin(_text(options.get(b"name")), _text(options.get(b"filename")))
            elif kind == "end":
                await parts.end()
            else:
                await parts.write(data)


def _text(option: bytes | None) -> str:
    return (option or b"").decode("utf-8", "replace")


def _bound(header: bytes) -> None:
    if len(header) > _MAX_HEADER_BYTES:
        raise ValueError("a header of a part is too long")
