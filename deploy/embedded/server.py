"""What every embedded server has in common: prepare, launch, wait until ready, stop or kill, start again."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import socket
import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Self

from deploy.embedded.process import Child, Command, EmbeddedError

LOOPBACK = "127.0.0.1"
#: Below the kernel's ephemeral range, so that no outgoing connection takes a restarting server's port.
FREE_PORTS = range(20_000, 32_000)
_handed_out: set[int] = set()


def port_is_free(port: int, host: str = LOOPBACK) -> bool:
    """Whether a server could listen there now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


class _Claims:
    """Ports that this process has given out, told to its user's other processes by locks on the bytes of one
    file. They end with the process, and children do not inherit them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None

    def take(self, first: int, count: int) -> bool:
        """False where another process has one of them."""
        if self._file is None:
            # Open as long as the process: closing any descriptor of the file would end all of its locks.
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, count, first)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        return True


_claims = _Claims(Path(tempfile.gettempdir()) / f"headrace-ports-{os.getuid()}")


def free_port(count: int = 1) -> int:
    """The first of `count` free neighbouring ports, given out once per process, and to one process at a time:
    between the choice of a port and its use, or while its server is down, others would find it free."""
    for _ in range(1000):
        first = random.choice(FREE_PORTS)
        block = range(first, first + count)
        if (
            _handed_out.isdisjoint(block)
            and all(port_is_free(port) for port in block)
            and _claims.take(first, count)
        ):
            _handed_out.update(block)
            return first
    raise EmbeddedError(f"No {count} free neighbouring ports between {FREE_PORTS[0]} and {FREE_PORTS[-1]}.")


class Server(ABC):
    """One server on 127.0.0.1 with a directory of its own. The same directory goes on where it stopped.

    Used as a context manager, or by `start` and `stop`; a supervisor uses `prepare`, `launch` and `ready`
    itself. All methods block: call them off the event loop, but `launch` always from the main thread.
    """

    name: str
    durable = True

    def __init__(self, directory: Path, port: int | None = None) -> None:
        """`port` None takes a free one, kept over restarts. Nothing is touched before `prepare`."""
        self.directory = directory.absolute()
        self.port = port or free_port()
        self.log = self.directory / f"{self.name}.log"
        self.child: Child | None = None
        #: Why `ready` said no the last time, as far as the server tells.
        self.detail = ""
        #: Whether the last `ready` heard nothing from a server that took its question: it may stand still.
        self.silent = False

    @property
    def ports(self) -> tuple[int, ...]:
        """Every port it listens on."""
        return (self.port,)

    @property
    @abstractmethod
    def url(self) -> str:
        """The address as the services' settings want it."""

    @abstractmethod
    def prepare(self) -> None:
        """Bring the directory into a state to start from; idempotent. Raises EmbeddedError."""

    @abstractmethod
    def command(self) -> Command:
        """What to execute after `prepare`."""

    @abstractmethod
    def ready(self) -> bool:
        """Whether it answers now. Never raises, never blocks longer than a second."""

    @property
    def alive(self) -> bool:
        return self.child is not None and self.child.alive

    @property
    def pid(self) -> int | None:
        return self.child.pid if self.child is not None and self.child.alive else None

    def launch(self, *, beside: bool = False) -> Child:
        """Fork it. Raises EmbeddedError where a port is taken, unless `beside` it is the one that it takes
        over from."""
        for port in self.ports:
            if not beside and not port_is_free(port):
                raise EmbeddedError(f"Port {port} for {self.name} is in use by another program.")
        self.child = Child(self.command(), self.log)
        return self.child

    def wait_ready(self, timeout: float) -> None:
        """Return when it answers. Raises EmbeddedError when it ends or `timeout` seconds pass before."""
        deadline = time.monotonic() + timeout
        child = self.child
        if child is None:
            raise EmbeddedError(f"{self.name} was not started.")
        while not self.ready():
            if not child.alive:
                raise EmbeddedError(
                    f"{self.name} ended with code {child.exit_code} while starting: {child.last_words()}"
                )
            if time.monotonic() > deadline:
                raise EmbeddedError(
                    f"{self.name} did not answer within {timeout:.0f} s: {child.last_words()}"
                )
            time.sleep(0.02)

    def start(self, timeout: float = 30.0) -> None:
        """Prepare, launch and wait; on failure nothing is left running."""
        self.prepare()
        self.launch()
        try:
            self.wait_ready(timeout)
        except BaseException:
            self.kill()
            raise

    def stop(self, grace: float = 15.0) -> None:
        """End it cleanly, by force after `grace` seconds. Its data stays."""
        if self.child is not None:
            self.child.terminate()
            self.child.wait(grace)
            self.child.kill()  # its group too: what it started may not have followed it

    def kill(self) -> None:
        """SIGKILL, as a crash would be. Its data stays as the crash left it."""
        if self.child is not None:
            self.child.kill()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
