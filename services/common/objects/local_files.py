"""Files of this machine that callers name: below allowed folders only, whatever links lie in between."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from services.common.errors import InvalidArgument, NotFound, PermissionDenied, Unavailable

FIELD = "input_uri"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# A FIFO would make the opener wait for its writer.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def resolved(path: Path, allowed: Path) -> Path:
    """Where `path` really lies. Raises PermissionDenied where that is outside `allowed`, NotFound."""
    try:
        real, root = path.resolve(strict=True), allowed.resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound("There is no such input file.", field=FIELD) from None
    except (OSError, RuntimeError):  # RuntimeError: links in a circle
        raise PermissionDenied("The input file cannot be reached.", field=FIELD) from None
    if real != root and not real.is_relative_to(root):
        raise PermissionDenied("The input leads out of the folders that are allowed.", field=FIELD)
    return real


def open_file(path: Path, allowed: Path) -> int:
    """A descriptor of the regular file that `path` leads to, which lies below `allowed` also where links are
    changed meanwhile: no link is followed after the check. Blocks."""
    real, root = resolved(path, allowed), allowed.resolve()
    if real == root:
        return _regular(_opened(real.name, _FILE, real.parent))
    *folders, name = real.relative_to(root).parts
    at = _opened(str(root), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, None)
    try:
        for folder in folders:
            inner = _opened(folder, _FOLDER, at)
            os.close(at)
            at = inner
        return _regular(_opened(name, _FILE, at))
    finally:
        os.close(at)


def etag_of(status: os.stat_result) -> str:
    """What changes when a file is replaced or written to."""
    return f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"


def files_below(folder: Path, allowed: Path, most: int) -> list[tuple[str, os.stat_result]]:
    """Regular files below `folder`, at any depth, by name relative to it; links are not followed. Raises
    InvalidArgument where there are more than `most`. Blocks."""
    found: list[tuple[str, os.stat_result]] = []
    for name, status in _walk(resolved(folder, allowed), ""):
        found.append((name, status))
        if len(found) > most:
            raise InvalidArgument(f"The folder has more than {most} files.", field=FIELD)
    return sorted(found, key=lambda one: one[0])


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
    try:
        entries = list(os.scandir(folder))
    except NotADirectoryError:
        raise InvalidArgument("The input is a file, not a folder.", field=FIELD) from None
    except OSError as error:
        raise PermissionDenied(f"A folder cannot be read: {error.strerror}.", field=FIELD) from None
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(folder / entry.name, f"{prefix}{entry.name}/")
        elif entry.is_file(follow_symlinks=False):
            yield f"{prefix}{entry.name}", entry.stat(follow_symlinks=False)


def _opened(name: str, flags: int, at: int | Path | None) -> int:
    try:
        if isinstance(at, Path):
            return os.open(at / name, flags)
        return os.open(name, flags, dir_fd=at)
    except FileNotFoundError:
        raise NotFound("There is no such input file.", field=FIELD) from None
    except PermissionError:
        raise PermissionDenied("The input file may not be read.", field=FIELD) from None
    except OSError as error:
        # ELOOP, ENOTDIR: somebody put a link where a folder was.
        raise Unavailable(f"The input file cannot be opened: {error.strerror}.", field=FIELD) from None


def _regular(descriptor: int) -> int:
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise InvalidArgument("The input is no file.", field=FIELD)
