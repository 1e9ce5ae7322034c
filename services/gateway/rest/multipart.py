"""multipart/form-data, read as it comes: fields are small and kept, the file goes on piece by piece."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from python_multipart.multipart import MultipartParser, parse_options_header

from services.common.errors import BodyTooLarge, MalformedBody

_MAX_FIELDS = 32
_MAX_FIELD_BYTES = 16 << 10
_MAX_HEADER_BYTES = 16 << 10


class FileSink(Protocol):
    """Where the file of a form goes."""

    async def begin(self, filename: str) -> None: ...

    async def write(self, data: bytes) -> None: ...


async def receive_form(
    content_type: str, body: AsyncIterator[bytes], sink: FileSink, file_field: str = "file"
) -> dict[str, str]:
    """Read `body`; its `file_field` goes to `sink`, the other fields are the result. Raises MalformedBody
    where it is no form, ends early or has no or several files, BodyTooLarge for a field that is too long."""
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise MalformedBody(f"The body is multipart/form-data with `{file_field}`.")
    form = _Form(sink, file_field)
    parser = MultipartParser(options[b"boundary"], form.callbacks())  # type: ignore[arg-type]  # a TypedDict there
    async for chunk in body:
        try:
            parser.write(chunk)
        except ValueError as error:
            raise MalformedBody("The multipart body is malformed.") from error
        await form.act()
    if not form.complete:
        raise MalformedBody("The multipart body ends early.")
    if not form.files:
        raise MalformedBody(f"`{file_field}` is missing.", field=file_field)
    return {name: bytes(value).decode("utf-8", "replace") for name, value in form.fields.items()}


class _Form:
    """Collects the parser's synchronous events of one chunk, then acts on them."""

    def __init__(self, sink: FileSink, file_field: str) -> None:
        self.fields: dict[str, bytearray] = {}
        self.files = 0
        self.complete = False
        self._sink = sink
        self._file_field = file_field
        self._events: list[tuple[str, bytes]] = []
        self._header = self._value = self._disposition = b""
        #: The field that is being read; None: the file.
        self._field: bytearray | None = None

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

        def on_end() -> None:
            self.complete = True

        functions = (
            on_header_field,
            on_header_value,
            on_header_end,
            on_headers_finished,
            on_part_data,
            on_end,
        )
        return {function.__name__: function for function in functions}

    async def act(self) -> None:
        events, self._events = self._events, []
        for kind, data in events:
            if kind == "begin":
                await self._begin(data)
            elif self._field is None:
                await self._sink.write(data)
            else:
                self._field += data
                if len(self._field) > _MAX_FIELD_BYTES:
                    raise BodyTooLarge("A field of the form is too large.")

    async def _begin(self, disposition: bytes) -> None:
        _kind, options = parse_options_header(disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if name == self._file_field:
            self.files += 1
            if self.files > 1:
                raise MalformedBody(f"The form has more than one `{name}`.", field=name)
            self._field = None
            await self._sink.begin(options.get(b"filename", b"").decode("utf-8", "replace"))
            return
        if len(self.fields) >= _MAX_FIELDS:
            raise MalformedBody("The form has too many fields.")
        self._field = self.fields.setdefault(name, bytearray())


def _bound(header: bytes) -> None:
    if len(header) > _MAX_HEADER_BYTES:
        raise ValueError("a header of a part is too long")
