"""Model files as a multipart body: streamed from disk, its length known beforehand, progress told."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHUNK = 256 << 10

Progress = Callable[[int, int], None]


def files_below(paths: Sequence[Path]) -> dict[str, Path]:
    """Each file with the name it gets in the version: folders are taken with what is in them, under names
    relative to the folder. Raises FileNotFoundError; ValueError where two files get one name."""
    found: dict[str, Path] = {}
    for path in paths:
        inside = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
        for file in inside:
            name = file.relative_to(path).as_posix() if path.is_dir() else file.name
            if not file.is_file():
                raise FileNotFoundError(f"There is no file {file}.")
            if found.setdefault(name, file) != file:
                raise ValueError(f"{found[name]} and {file} would both be {name}.")
    if not found:
        raise FileNotFoundError("There is no file to push.")
    return found


@dataclass(frozen=True, slots=True)
class Upload:
    """A multipart/form-data body: the field `metadata` (JSON) and one part `files` per file.

    `progress(sent, total)` is called with file bytes as they leave.
    """

    metadata: Mapping[str, Any]
    files: Mapping[str, Path]
    boundary: str
    progress: Progress | None = None

    @classmethod
    def of(
        cls, metadata: Mapping[str, Any], paths: Sequence[Path], progress: Progress | None = None
    ) -> Upload:
        """With a boundary of its own."""
        return cls(metadata, files_below(paths), f"headrace-{secrets.token_hex(16)}", progress)

    @property
    def headers(self) -> dict[str, str]:
        """Content type and exact length of the body."""
        return {
            "content-type": f"multipart/form-data; boundary={self.boundary}",
            "content-length": str(self._length()),
        }

    def chunks(self) -> Iterator[bytes]:
        """The body, from its start. Reads the files: not on an event loop."""
        total, sent = self.total, 0
        yield self._metadata_part()
        for name, path in self.files.items():
            yield self._file_head(name)
            with path.open("rb") as stream:
                while chunk := stream.read(CHUNK):
                    yield chunk
                    sent += len(chunk)
                    if self.progress is not None:
                        self.progress(sent, total)
            yield b"\r\n"
        yield self._end()

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files.values())

    def _length(self) -> int:
        heads = sum(len(self._file_head(name)) + 2 for name in self.files)
        return len(self._metadata_part()) + heads + self.total + len(self._end())

    def _metadata_part(self) -> bytes:
        text = json.dumps(self.metadata, allow_nan=False)
        head = f'--{self.boundary}\r\nContent-Disposition: form-data; name="metadata"\r\n'
        return f"{head}Content-Type: application/json\r\n\r\n{text}\r\n".encode()

    def _file_head(self, name: str) -> bytes:
        head = (
            f"--{self.boundary}\r\n"
            f'Content-Disposition: form-data; name="files"; filename="{quoted(name)}"\r\n'
        )
        return f"{head}Content-Type: application/octet-stream\r\n\r\n".encode()

    def _end(self) -> bytes:
        return f"--{self.boundary}--\r\n".encode()


def quoted(name: str) -> str:
    """A file's name as browsers escape it (HTML standard, multipart/form-data encoding)."""
    return name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
