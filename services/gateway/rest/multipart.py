"""multipart/form-data, read as it comes: fields are small and kept, the file goes on piece by piece."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from services.common.errors import BodyTooLarge, MalformedBody
from services.common.multipart import read_parts

_MAX_FIELDS = 32
_MAX_FIELD_BYTES = 16 << 10


class FileSink(Protocol):
    """Where the file of a form goes."""

    async def begin(self, filename: str) -> None: ...

    async def write(self, data: bytes) -> None: ...


async def receive_form(
    content_type: str, body: AsyncIterator[bytes], sink: FileSink, file_field: str = "file"
) -> dict[str, str]:
    """Read `body`; its `file_field` goes to `sink`, the other fields are the result. Raises MalformedBody
    where it is no form, ends early or has no or several files, BodyTooLarge for a field that is too long."""
    form = _Form(sink, file_field)
    await read_parts(content_type, body, form, f"`{file_field}`")
    if not form.files:
        raise MalformedBody(f"`{file_field}` is missing.", field=file_field)
    return {name: bytes(value).decode("utf-8", "replace") for name, value in form.fields.items()}


class _Form:
    """The fields, and how many files there were."""

    def __init__(self, sink: FileSink, file_field: str) -> None:
        self.fields: dict[str, bytearray] = {}
        self.files = 0
        self._sink = sink
        self._file_field = file_field
        #: The field that is being read; None: the file.
        self._field: bytearray | None = None

    async def begin(self, name: str, filename: str) -> None:
        if name == self._file_field:
            self.files += 1
            if self.files > 1:
                raise MalformedBody(f"The form has more than one `{name}`.", field=name)
            self._field = None
            await self._sink.begin(filename)
            return
        if len(self.fields) >= _MAX_FIELDS:
            raise MalformedBody("The form has too many fields.")
        self._field = self.fields.setdefault(name, bytearray())

    async def write(self, data: bytes) -> None:
        if self._field is None:
            await self._sink.write(data)
            return
        self._field += data
        if len(self._field) > _MAX_FIELD_BYTES:
            raise BodyTooLarge("A field of the form is too large.")

    async def end(self) -> None:
        """A file ends with its form."""
