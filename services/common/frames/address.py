"""Where a frame stream is: `host:port`, `unix:/path` (as gRPC names it) for peers on one machine, whose
messages are spared TCP, or `local:name` for those on one event loop, whose messages are spared the system."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import socket
import ssl as tls
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_UNIX: Final = "unix:"
#: Begins with a letter, lest a port behind a host of that name should be taken for one.
_LOCAL: Final = re.compile(r"local:([A-Za-z][A-Za-z0-9._-]*)")
#: Bytes that a socket's path may have on every system (Linux allows three more).
MAX_PATH_BYTES: Final = 104
_BACKLOG: Final = 512


@dataclass(frozen=True, slots=True)
class Address:
    """One of three: a name, a path, or host and port."""

    host: str
    port: int
    path: str = ""
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raises ValueError."""
        if text.startswith(_UNIX):
            path = text.removeprefix(_UNIX)
            path = path.removeprefix("//") if path.startswith("///") else path
            if not path.startswith("/") or not fits(Path(path)):
                raise ValueError(f"{text!r} is not unix:/path of at most {MAX_PATH_BYTES} bytes")
            return cls("", 0, path)
        named = _LOCAL.fullmatch(text)
        if named is not None:
            return cls("", 0, name=named[1])
        host, separator, port = text.rpartition(":")
        if not separator or not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError(f"{text!r} is none of host:port, unix:/path and local:name")
        return cls(host.removeprefix("[").removesuffix("]"), int(port))

    @property
    def authority(self) -> str:
        """What a request to it names as its authority."""
        if self.path or self.name:
            return "localhost"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    async def connect(self, build: Callable[[], asyncio.Protocol], ssl: tls.SSLContext | None) -> None:
        """Open one connection by a socket. Raises OSError. TLS is for what leaves the machine: a path goes
        without."""
        loop = asyncio.get_running_loop()
        if self.path:
            await loop.create_unix_connection(build, self.path)
        else:
            name = self.host if ssl else None
            await loop.create_connection(build, self.host, self.port, ssl=ssl, server_hostname=name)


def fits(path: Path) -> bool:
    """Whether a socket can be at `path`."""
    return len(os.fsencode(path)) <= MAX_PATH_BYTES


class PathListener:
    """A socket that listens at `path`, for this user only. One that a dead process left is replaced; a lock
    beside it keeps two processes from replacing each other's. Blocks for a moment; raises OSError."""

    def __init__(self, path: Path) -> None:
        if not fits(path):
            raise OSError(f"the path of a socket has at most {MAX_PATH_BYTES} bytes: {path}")
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _locked(path):
                _clear(path)
                with suppress(OSError):  # Linux makes the file with it: others never get in. Not all do it.
                    os.fchmod(self.socket.fileno(), 0o600)
                self.socket.bind(str(path))
                path.chmod(0o600)
                self._identity = _identity(path)
                self.socket.listen(_BACKLOG)  # or it would seem to be a dead process's still
        except OSError:
            self.socket.close()
            raise
        self.socket.setblocking(False)

    def remove(self) -> None:
        """Remove the file, unless another process has put its own there."""
        with suppress(OSError):
            if _identity(self.path) == self._identity:
                self.path.unlink()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone with what is at `path`. The lock's file stays: who removed it could remove one that another
    holds."""
    beside = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(beside, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"{path} is in use: another process begins to listen there") from None
        yield
    finally:
        os.close(beside)


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_ino, status.st_mtime_ns  # inodes are used again at once


def _clear(path: Path) -> None:
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind) or _answers(path):
        raise FileExistsError(f"{path} is in use")
    path.unlink(missing_ok=True)


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.5)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
        return True
