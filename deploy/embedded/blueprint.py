"""The parts of a stack: which servers and services there are, with which ports and environment."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.embedded.apache_kafka import ApacheKafkaServer
from deploy.embedded.configuration import FRONT, REPOSITORY, Configuration, inherited_environment
from deploy.embedded.postgres import PostgresServer
from deploy.embedded.secret_files import Secrets
from deploy.embedded.server import LOOPBACK, Server
from deploy.embedded.service import ServiceProcess
from deploy.embedded.tansu import TansuServer
from deploy.embedded.valkey import ValkeyServer

#: What the path of a socket may have on every system.
_SOCKET_PATH_BYTES = 104
#: Groups of the drain order behind those that requests run through (gateway, router, workers).
_BEHIND = 1

NOT_DURABLE = (
    "The embedded event broker keeps events in memory only: what was not consumed is lost when it stops, and "
    "every event stays in memory while it runs, so it grows with traffic. "
    "Set KAFKA_HOME (an unpacked Apache Kafka, Java 17+) or KAFKA_BOOTSTRAP_SERVERS for a durable one."
)


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What to run. `drain_order` groups the services as they are stopped: callers before the called. From the
    first `renewed` groups others like them can take over while requests go on."""

    servers: list[Server]
    services: list[Server]
    drain_order: list[list[Server]]
    broker: Server | None
    bootstrap_servers: str
    external: dict[str, str]
    warnings: list[str]
    renewed: int = 0


def draw(configuration: Configuration, secrets: Secrets) -> Blueprint:
    """Decide the parts; nothing is started. Raises EmbeddedError where a server's binaries are missing."""
    home, ports = configuration.home, configuration.ports
    external: dict[str, str] = {}
    servers: list[Server] = []
    warnings: list[str] = []

    postgres: Server | None = None
    if configuration.database_url is None:
        postgres = PostgresServer(home / "postgres", ports["POSTGRES_PORT"])
        servers.append(postgres)
    else:
        external["postgres"] = "DATABASE_URL"

    valkey: Server | None = None
    if configuration.redis_url is None:
        valkey = ValkeyServer(home / "valkey", ports["VALKEY_PORT"])
        servers.append(valkey)
    else:
        external["valkey"] = "REDIS_URL"

    broker = _broker(configuration)
    if broker is None:
        external["kafka"] = configuration.kafka_bootstrap_servers or ""
    else:
        servers.append(broker)
        if not broker.durable:
            warnings.append(NOT_DURABLE)
    bootstrap = broker.url if broker is not None else configuration.kafka_bootstrap_servers or ""

    def addresses() -> dict[str, str]:
        return {
            "DATABASE_URL": postgres.url if postgres is not None else configuration.database_url or "",
            "REDIS_URL": valkey.url if valkey is not None else configuration.redis_url or "",
            "KAFKA_BOOTSTRAP_SERVERS": bootstrap,
        }

    groups = _services(configuration, secrets, addresses, read_turn(home))
    for server in [*servers, *(service for group in groups for service in group)]:
        server.log = configuration.logs / f"{server.name}.log"
    return Blueprint(
        servers=servers,
        services=[service for group in groups for service in group],
        drain_order=groups,
        broker=broker,
        bootstrap_servers=bootstrap,
        external=external,
        warnings=warnings,
        renewed=len(groups) - _BEHIND,
    )


def _broker(configuration: Configuration) -> Server | None:
    if configuration.kafka_bootstrap_servers is not None:
        return None
    port = configuration.ports["KAFKA_PORT"]
    if configuration.kafka_home is None:
        return TansuServer(configuration.home / "tansu", port)
    return ApacheKafkaServer(
        configuration.home / "kafka", port, kafka_home=configuration.kafka_home, controller_port=port + 1
    )


def _services(
    configuration: Configuration, secrets: Secrets, addresses: Callable[[], dict[str, str]], turn: int
) -> list[list[Server]]:
    ports = configuration.ports
    # Beside those that they take over from, routers and workers need names of their own: what is on disk, a
    # socket's path and a worker's record belong to one process.
    mark, other = ("b", "") if turn % 2 else ("", "b")
    common = {
        **inherited_environment(configuration.home),
        **configuration.shared,
        "PYTHONPATH": python_path(),
        "HOST": LOOPBACK,
        "REUSE_PORT": "true",
        "STATE_DIR": str(configuration.home / "state"),
        "INTERNAL_TOKEN": secrets.internal_token,
        "ARTIFACT_STORE_URL": configuration.artifact_store_url,
        "BATCH_INPUT_ALLOW": ",".join(
            (configuration.shared["BATCH_INPUT_ALLOW"], f"{(configuration.home / 'data').as_uri()}/")
        ),
    }

    def frames(name: str, port: int) -> tuple[dict[str, object], str]:
        """Where a service has its frame stream, and the address: by path, where that is short enough."""
        listening: dict[str, object] = {"FRAMES_PORT": port}
        path = configuration.home / "run" / f"{name}.sock"
        if len(os.fsencode(path)) > _SOCKET_PATH_BYTES:
            return listening, f"{LOOPBACK}:{port}"
        return {**listening, "FRAMES_SOCKET": path}, f"unix:{path}"

    router_id = f"router-0{mark}"
    router_frames, router_address = frames(f"router{mark}", ports["ROUTER_FRAMES_PORT"])

    def service(
        name: str,
        own: Mapping[str, object],
        *,
        health: str,
        module: str | None = None,
        inner: Mapping[str, object] | None = None,
    ) -> ServiceProcess:
        """`inner` is a second service in the process: its ports are the process's, too."""
        listening = [_listening(variables) for variables in (own, inner) if variables is not None]
        return ServiceProcess(
            name,
            configuration.home / "state",
            module=module or f"services.{name}",
            ports=tuple(port for ports in listening for port in ports.values()),
            health_ports=tuple(ports[health] for ports in listening),
            environment=lambda: common | addresses() | {key: str(value) for key, value in own.items()},
            yields=name in {"analytics", "drift"},
            compiled=configuration.native,
        )

    gateway = {
        "HTTP_PORT": ports["GATEWAY_HTTP_PORT"],
        "GRPC_PORT": ports["GATEWAY_GRPC_PORT"],
        "OPS_PORT": ports["GATEWAY_OPS_PORT"],
        "ROUTER_ADDRESSES": router_address,
        "REGISTRY_URL": f"http://{LOOPBACK}:{ports['REGISTRY_HTTP_PORT']}",
        "ANALYTICS_URL": f"http://{LOOPBACK}:{ports['ANALYTICS_HTTP_PORT']}",
        "DRIFT_URL": f"http://{LOOPBACK}:{ports['DRIFT_HTTP_PORT']}",
        "CALLBACK_ALLOW": f"{configuration.shared['CALLBACK_ALLOW']},{LOOPBACK},localhost",
        "CALLBACK_SECRET": secrets.callback_secret,
    }
    router = {
        **router_frames,
        **_adopted(configuration),
        "ROUTER_ID": router_id,
        "PREDECESSOR_ID": f"router-0{other}",
        "GRPC_PORT": ports["ROUTER_GRPC_PORT"],
        "OPS_PORT": ports["ROUTER_OPS_PORT"],
    }
    registry = {
        "HTTP_PORT": ports["REGISTRY_HTTP_PORT"],
        "GRPC_PORT": ports["REGISTRY_GRPC_PORT"],
        "BOOTSTRAP_ADMIN_KEY": secrets.admin_key,
    }
    tansu = configuration.kafka_bootstrap_servers is None and configuration.kafka_home is None
    workers = [
        {
            "WORKER_ID": f"worker-{index}{mark}",
            "PREDECESSOR_ID": f"worker-{index}{other}",
            "ADVERTISE_HOST": LOOPBACK,
            **frames(f"worker-{index}{mark}", configuration.worker_port(index, "FRAMES"))[0],
            "GRPC_PORT": configuration.worker_port(index, "GRPC"),
            "OPS_PORT": configuration.worker_port(index, "OPS"),
            # Tansu ends a cooperative rebalance with partitions that nobody has.
            "BATCH_ASSIGNMENT": "range" if tansu else "cooperative-sticky",
        }
        for index in range(configuration.workers)
    ]
    front: list[list[Server]] = [
        [service("gateway", gateway, health="OPS_PORT")],
        [service("router", router, health="OPS_PORT")],
    ]
    if configuration.joint:
        fronts = _fronts(configuration, router, (mark, other))
        gateway["ROUTER_ADDRESSES"] = f"local:{router_id}"
        gateway["FRONTS"] = json.dumps(fronts, default=str)
        front = [[service("gateway", gateway, health="OPS_PORT", module=FRONT, inner=router)]]
    return [
        *front,
        [
            service(f"worker-{index}", own, health="OPS_PORT", module="services.worker")
            for index, own in enumerate(workers)
        ],
        [
            service("registry", registry, health="HTTP_PORT"),
            service("analytics", {"HTTP_PORT": ports["ANALYTICS_HTTP_PORT"]}, health="HTTP_PORT"),
            service("drift", {"HTTP_PORT": ports["DRIFT_HTTP_PORT"]}, health="HTTP_PORT"),
        ],
    ]


def _fronts(
    configuration: Configuration, router: Mapping[str, object], marks: tuple[str, str]
) -> list[dict[str, dict[str, object]]]:
    """What routers and guests of the processes that have both read otherwise. Several share the router's
    ports; a socket's path is one process's only."""
    mark, other = marks
    fronts: list[dict[str, dict[str, object]]] = []
    for index in range(configuration.fronts):
        name = f"router-{index}{mark}"
        own = {**router, "ROUTER_ID": name, "PREDECESSOR_ID": f"router-{index}{other}", "FRAMES_NAME": name}
        if index:
            own.pop("FRAMES_SOCKET", None)
            own.pop("ADOPTED_LOGS", None)
        fronts.append({"router": own})
        if configuration.guests:
            fronts[-1]["guest"] = {"WORKER_ID": f"guest-{index}{mark}"}
    return fronts


def _adopted(configuration: Configuration) -> dict[str, object]:
    """Whose prediction logs the first router publishes: those of routers and workers that an earlier start
    had and this one has not."""
    counts = {"router": max(1, configuration.fronts), "worker": configuration.workers}
    here = {
        f"{kind}-{kind}-{index}{mark}"
        for kind, count in counts.items()
        for index in range(count)
        for mark in ("", "b")
    }
    state = configuration.home / "state"
    had = {log.parent.name for kind in counts for log in state.glob(f"{kind}-{kind}-*/spool")}
    return {"ADOPTED_LOGS": ",".join(sorted(had - here))} if had - here else {}


def _listening(variables: Mapping[str, object]) -> dict[str, int]:
    return {name: int(str(value)) for name, value in variables.items() if name.endswith("_PORT")}


def read_turn(home: Path) -> int:
    """How often the data plane has been renewed: a stack that starts goes on with the names that it ended
    with, so that what was not published yet is found by them."""
    try:
        return int((home / "turn").read_text())
    except (OSError, ValueError):
        return 0


def write_turn(home: Path, turn: int) -> None:
    """The names that processes have from now on."""
    (home / "turn").write_text(str(turn))


def python_path() -> str:
    """The repository is importable without being installed, and so is the generated code."""
    folders = [str(folder) for folder in (REPOSITORY, REPOSITORY / "proto", REPOSITORY / "client")]
    inherited = os.environ.get("PYTHONPATH")
    return os.pathsep.join([*folders, inherited] if inherited else folders)


def make_directories(home: Path) -> None:
    """The folders that must be there before anything starts. What holds data is closed to other users; `home`
    itself is not, since PostgreSQL, started by root, runs as one of them in a folder of its own."""
    home.mkdir(parents=True, exist_ok=True)
    for name in ("logs", "state", "artifacts", "data", "run"):
        folder = home / name
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)  # one of an earlier version, too
