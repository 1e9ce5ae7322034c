"""What the peers have in common: an environment, a command, a port, a path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks.environments import PeerEnvironment
from benchmarks.load.requests import Endpoint
from benchmarks.process_tree import ProcessTree
from benchmarks.targets.port import LOOPBACK, Front, Running, answers, free_port
from benchmarks.workload import Dialect, Workload

MODEL = "mlp"
GRPC_PATH = "/inference.GRPCInferenceService/ModelInfer"

Command = tuple[list[str], dict[str, str], Path]


class Ports(NamedTuple):
    """What a server listens on."""

    http: int
    grpc: int


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
    #: Whether it speaks the Open Inference Protocol over gRPC, on the port that `command` is given for it.
    grpc = False

    def __init__(self) -> None:
        self.environment = PeerEnvironment(self.name, self.requirements)

    def install(self) -> None:
        """Make the environment. Raises Unavailable."""
        self.environment.install()

    def versions(self) -> str:
        """Name and version."""
        return f"{self.package} {self.environment.version(self.package)}"

    def command(self, workload: Workload, ports: Ports, folder: Path) -> Command:
        """Arguments, further environment and working directory; `folder` is empty and the server's own.
        Every server has its own; this one stands for none."""
        raise NotImplementedError

    @contextmanager
    def running(self, workload: Workload) -> Iterator[Running]:
        """Start it, wait until it answers, stop it with everything that it started."""
        ports = Ports(free_port(), free_port())
        folder = self.environment.folder / "run" / workload.name
        folder.mkdir(parents=True, exist_ok=True)
        model = folder / "model.onnx"
        model.write_bytes(workload.models[0])
        argv, more, cwd = self.command(workload, ports, folder)
        environment = self.environment.environ() | {
            "BENCH_MODEL": str(model),
            "BENCH_OUTPUT": workload.output,
            "BENCH_PORT": str(ports.http),
            "BENCH_GRPC_PORT": str(ports.grpc),
            "HOME": str(folder),
        }
        tree = ProcessTree(argv, environment=environment | more, cwd=cwd, log=folder / "server.log")
        try:
            tree.wait_until(lambda: answers(ports.http, self.health))
            fronts = [
                Front(f"{self.title}{suffix}", Endpoint(LOOPBACK, ports.http, path, dialect))
                for suffix, path, dialect in self.fronts
            ]
            if self.grpc:
                endpoint = Endpoint(LOOPBACK, ports.grpc, GRPC_PATH, Dialect.GRPC)
                fronts.append(Front(f"{self.title}, gRPC", endpoint))
            yield Running(fronts, lambda: {self.name: tree.pids()})
        finally:
            tree.stop()
