"""What the peers have in common: an environment, a command, a port, a path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.environments import PeerEnvironment
from benchmarks.load.requests import Endpoint
from benchmarks.process_tree import ProcessTree
from benchmarks.targets.port import LOOPBACK, Front, Running, answers, free_port
from benchmarks.workload import Dialect, Workload

MODEL = "mlp"


class Peer:
    """A server that is one command in an environment of its own. Subclasses say which."""

    name: str
    title: str
    setup: str
    #: Distribution whose version is reported.
    package: str
    requirements: tuple[str, ...]
    health = "/"
    #: (suffix of the front's name, path, dialect)
    fronts: Sequence[tuple[str, str, Dialect]] = (("", "/predict", Dialect.PLAIN),)

    def __init__(self) -> None:
        self.environment = PeerEnvironment(self.name, self.requirements)

    def install(self) -> None:
        """Make the environment. Raises Unavailable."""
        self.environment.install()

    def versions(self) -> str:
        """Name and version."""
        return f"{self.package} {self.environment.version(self.package)}"

    def command(self, workload: Workload, port: int, folder: Path) -> tuple[list[str], dict[str, str], Path]:
        """Arguments, further environment and working directory; `folder` is empty and the server's own."""
        raise NotImplementedError

    @contextmanager
    def running(self, workload: Workload) -> Iterator[Running]:
        """Start it, wait until it answers, stop it with everything that it started."""
        port = free_port()
        folder = self.environment.folder / "run" / workload.name
        folder.mkdir(parents=True, exist_ok=True)
        model = folder / "model.onnx"
        model.write_bytes(workload.models[0])
        argv, more, cwd = self.command(workload, port, folder)
        environment = self.environment.environ() | {
            "BENCH_MODEL": str(model),
            "BENCH_OUTPUT": workload.output,
            "BENCH_PORT": str(port),
            "BENCH_GRPC_PORT": str(free_port()),
            "HOME": str(folder),
        }
        tree = ProcessTree(argv, environment=environment | more, cwd=cwd, log=folder / "server.log")
        try:
            tree.wait_until(lambda: answers(port, self.health))
            fronts = [
                Front(f"{self.title}{suffix}", Endpoint(LOOPBACK, port, path, dialect))
                for suffix, path, dialect in self.fronts
            ]
            yield Running(fronts, lambda: {self.name: tree.pids()})
        finally:
            tree.stop()
