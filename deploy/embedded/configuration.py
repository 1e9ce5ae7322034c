"""What the environment asks of the stack, decided without touching anything."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.embedded.process import EmbeddedError
from deploy.embedded.server import LOOPBACK, free_port
from services.common.lifecycle import usable_cores

REPOSITORY = Path(__file__).resolve().parents[2]
PLATFORM_ENV = REPOSITORY / "deploy" / "platform.env"
#: The module of a process with both gateway and router.
FRONT = "deploy.embedded.front"
MAX_WORKERS = 64
MAX_FRONTS = 16
WORKER_STRIDE = 3
#: So many, and gateway, router, a worker and who calls them cannot all run at the same time: each change of
#: process costs a request more than a second loop would give.
FEW_CORES = 3
#: Variables that replace a part of the stack by an address.
REPLACEABLE = ("DATABASE_URL", "REDIS_URL", "KAFKA_BOOTSTRAP_SERVERS", "ARTIFACT_STORE_URL")


def read_platform_env(path: Path = PLATFORM_ENV) -> dict[str, str]:
    """`NAME=value` lines; comments and empty lines are left out."""
    lines = (line.strip() for line in path.read_text().splitlines())
    pairs = (line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return {name.strip(): value.strip() for name, value in pairs}


@dataclass(frozen=True, slots=True)
class Configuration:
    """Everything the stack needs to know. Ports are by the names of platform.env."""

    home: Path
    workers: int
    ports: Mapping[str, int]
    shared: Mapping[str, str]
    kafka_home: Path | None
    database_url: str | None
    redis_url: str | None
    kafka_bootstrap_servers: str | None
    artifact_store_url: str
    #: Whether services run compiled modules, where these are there.
    native: bool
    #: Processes that gateway and router share; 0: each has its own.
    fronts: int = 0
    #: Whether these run quick models themselves.
    guests: bool = False

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Configuration:
        """From the environment and platform.env. Raises EmbeddedError with one sentence."""
        platform = read_platform_env()
        home = Path(environment.get("HEADRACE_HOME") or REPOSITORY / ".headrace").absolute()
        kafka_home = environment.get("KAFKA_HOME")
        shared = {
            name: environment.get(name) or value
            for name, value in platform.items()
            if not name.endswith("_PORT")
        }
        joint = _joint(environment.get("HEADRACE_ROUTER") or "auto", shared["GATEWAY_PROCESSES"])
        asked, guests = (environment.get(f"HEADRACE_{name}") or "auto" for name in ("FRONTS", "GUESTS"))
        fronts = _fronts(asked) if joint else 0
        configuration = cls(
            home=home,
            workers=_workers(environment.get("HEADRACE_WORKERS") or "2"),
            ports=_ports(platform, environment),
            shared=shared,
            kafka_home=Path(kafka_home).absolute() if kafka_home else None,
            database_url=environment.get("DATABASE_URL") or None,
            redis_url=environment.get("REDIS_URL") or None,
            kafka_bootstrap_servers=environment.get("KAFKA_BOOTSTRAP_SERVERS") or None,
            artifact_store_url=environment.get("ARTIFACT_STORE_URL") or (home / "artifacts").as_uri(),
            native=environment.get("HEADRACE_NATIVE") != "0",
            fronts=fronts,
            guests=_guests(guests) and joint,
        )
        configuration.check_ports()
        return configuration

    @property
    def joint(self) -> bool:
        """Whether the router runs in the gateway's process."""
        return self.fronts > 0

    def check_ports(self) -> None:
        """Raises EmbeddedError where two parts would listen on one port."""
        taken: dict[int, str] = {self.ports["KAFKA_PORT"] + 1: "KAFKA_PORT + 1"}
        workers = {
            f"{kind} of worker-{index}": self.worker_port(index, kind)
            for index in range(self.workers)
            for kind in ("FRAMES", "GRPC", "OPS")
        }
        others = {name: port for name, port in self.ports.items() if not name.startswith("WORKER_")}
        for name, port in (others | workers).items():
            if port in taken:
                raise EmbeddedError(
                    f"Port {port} would be both {taken[port]} and {name}: change one, or HEADRACE_WORKERS."
                )
            taken[port] = name

    def worker_port(self, index: int, kind: str) -> int:
        """Port of worker `index`, `kind` being FRAMES, GRPC or OPS."""
        return self.ports[f"WORKER_{kind}_PORT"] + WORKER_STRIDE * index

    @property
    def rest_url(self) -> str:
        return f"http://{LOOPBACK}:{self.ports['GATEWAY_HTTP_PORT']}"

    @property
    def grpc_address(self) -> str:
        return f"{LOOPBACK}:{self.ports['GATEWAY_GRPC_PORT']}"

    @property
    def admin_key_file(self) -> Path:
        return self.home / "admin.key"

    @property
    def logs(self) -> Path:
        return self.home / "logs"


def free_ports(workers: int) -> dict[str, str]:
    """Environment that puts a whole stack on free ports, so that several run beside each other."""
    names = [name for name in read_platform_env() if name.endswith("_PORT")]
    chosen = {name: free_port(2 if name == "KAFKA_PORT" else 1) for name in names}
    first = free_port(WORKER_STRIDE * workers)
    for position, kind in enumerate(("FRAMES", "GRPC", "OPS")):
        chosen[f"WORKER_{kind}_PORT"] = first + position
    return {name: str(port) for name, port in chosen.items()}


def inherited_environment(home: Path) -> dict[str, str]:
    """Our own environment for the services, less what would reach into their settings by accident.

    Where Python is told to keep no bytecode beside its sources it is kept in `home`: otherwise each process
    compiles some 2,000 modules at every start.
    """
    settings = {"HOST", "HTTP_PORT", "GRPC_PORT", "FRAMES_PORT", "OPS_PORT", "POOL", "WORKER_ID", "STATE_DIR"}
    settings |= {"FRAMES_SOCKET", "FRAMES_TLS_CERT", "FRAMES_TLS_KEY", "FRAMES_TLS_CA"}
    inherited = {name: value for name, value in os.environ.items() if name not in settings}
    if inherited.pop("PYTHONDONTWRITEBYTECODE", ""):
        inherited.setdefault("PYTHONPYCACHEPREFIX", str(home / "bytecode"))
    return inherited


def _workers(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= MAX_WORKERS:
        raise EmbeddedError(f"HEADRACE_WORKERS is {text!r}; it must be a number from 1 to {MAX_WORKERS}.")
    return int(text)


def _joint(asked: str, processes: str) -> bool:
    """What HEADRACE_ROUTER means beside GATEWAY_PROCESSES."""
    alone = processes == "1" or (processes == "auto" and usable_cores() // 4 <= 1)
    match asked:
        case "apart":
            return False
        case "inside" if alone:
            return True
        case "inside":
            raise EmbeddedError(
                "HEADRACE_ROUTER=inside needs GATEWAY_PROCESSES=1: HEADRACE_FRONTS says how many there are."
            )
        case "auto":
            return alone and usable_cores() <= FEW_CORES
        case _:
            raise EmbeddedError(f"HEADRACE_ROUTER is {asked!r}; it must be auto, inside or apart.")


def _fronts(asked: str) -> int:
    """What HEADRACE_FRONTS means: processes of gateway and router."""
    if asked == "auto":
        return min(usable_cores(), FEW_CORES)
    if not asked.isdecimal() or not 1 <= int(asked) <= MAX_FRONTS:
        raise EmbeddedError(
            f"HEADRACE_FRONTS is {asked!r}; it must be auto or a number from 1 to {MAX_FRONTS}."
        )
    return int(asked)


def _guests(asked: str) -> bool:
    """What HEADRACE_GUESTS means."""
    if asked not in {"auto", "off"}:
        raise EmbeddedError(f"HEADRACE_GUESTS is {asked!r}; it must be auto or off.")
    return asked == "auto"


def _ports(platform: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, int]:
    offset = _number("HEADRACE_PORT_OFFSET", environment.get("HEADRACE_PORT_OFFSET") or "0")
    ports: dict[str, int] = {}
    for name, default in platform.items():
        if not name.endswith("_PORT"):
            continue
        chosen = environment.get(name)
        port = _number(name, chosen) if chosen else _number(name, default) + offset
        if not 1 <= port <= 65535:
            raise EmbeddedError(f"{name} would be {port}, which is no TCP port.")
        ports[name] = port
    return ports


def _number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise EmbeddedError(f"{name} is {text!r}; it must be a number.") from None
