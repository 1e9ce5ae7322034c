"""What the environment makes of the stack."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from deploy.embedded.blueprint import draw, write_turn
from deploy.embedded.configuration import Configuration, free_ports, inherited_environment, read_platform_env
from deploy.embedded.process import EmbeddedError
from deploy.embedded.secret_files import Secrets, load_or_create
from deploy.embedded.service import ServiceProcess
from services.common.settings import ServiceSettings, load
from services.gateway.settings import Settings as GatewaySettings
from services.router.settings import Settings as RouterSettings
from services.worker.settings import Settings as WorkerSettings

SECRETS = Secrets("t" * 32, "hr_key")
#: What the embedded servers' addresses are known from only once they have been started.
ELSEWHERE = {"DATABASE_URL": "postgresql://u:p@db/x", "REDIS_URL": "redis://cache/0"}


def read(tmp_path: Path, **environment: str) -> Configuration:
    return Configuration.read({"HEADRACE_HOME": str(tmp_path / "home"), **environment})


def test_an_offset_moves_every_port_and_a_variable_wins(tmp_path: Path) -> None:
    platform = read_platform_env()
    moved = read(tmp_path, HEADRACE_PORT_OFFSET="1000", DRIFT_HTTP_PORT="9999")
    for name, port in moved.ports.items():
        assert port == (9999 if name == "DRIFT_HTTP_PORT" else int(platform[name]) + 1000)
    assert moved.rest_url == "http://127.0.0.1:9000"


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"HEADRACE_WORKERS": "0"}, "HEADRACE_WORKERS is '0'; it must be a number from 1 to"),
        ({"HEADRACE_WORKERS": "many"}, "HEADRACE_WORKERS is 'many'"),
        ({"HEADRACE_WORKERS": "9"}, "would be both .* and .* of worker-3: change one, or HEADRACE_WORKERS"),
        ({"HEADRACE_PORT_OFFSET": "ten"}, "HEADRACE_PORT_OFFSET is 'ten'; it must be a number"),
        ({"HEADRACE_PORT_OFFSET": "60000"}, "GATEWAY_HTTP_PORT would be 68000, which is no TCP port"),
        ({"HEADRACE_ROUTER": "in"}, "HEADRACE_ROUTER is 'in'; it must be auto, inside or apart"),
        ({"HEADRACE_ROUTER": "inside", "GATEWAY_PROCESSES": "2"}, "inside needs GATEWAY_PROCESSES=1"),
        (
            {"HEADRACE_ROUTER": "inside", "HEADRACE_FRONTS": "0"},
            "HEADRACE_FRONTS is '0'; it must be auto or a",
        ),
        ({"HEADRACE_ROUTER": "inside", "HEADRACE_FRONTS": "17"}, "HEADRACE_FRONTS is '17'; .* from 1 to 16"),
        ({"HEADRACE_ROUTER": "inside", "HEADRACE_FRONTS": "-1"}, "HEADRACE_FRONTS is '-1'"),
        ({"HEADRACE_ROUTER": "inside", "HEADRACE_FRONTS": "two"}, "HEADRACE_FRONTS is 'two'"),
        ({"HEADRACE_ROUTER": "inside", "HEADRACE_GUESTS": "on"}, "HEADRACE_GUESTS is 'on'; .* auto or off"),
        ({"VALKEY_PORT": "8000"}, "Port 8000 would be both GATEWAY_HTTP_PORT and VALKEY_PORT"),
    ],
)
def test_what_cannot_be_is_one_sentence(tmp_path: Path, environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(EmbeddedError, match=sentence) as refusal:
        read(tmp_path, **environment)
    assert "\n" not in str(refusal.value)


def test_every_service_gets_the_addresses_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOST", "a-login-shell-sets-this")
    given = {
        "DATABASE_URL": "postgresql://u:p@db/x",
        "REDIS_URL": "redis://cache/0",
        "KAFKA_BOOTSTRAP_SERVERS": "kafka:9092",
        "ARTIFACT_STORE_URL": "s3://bucket/prefix",
    }
    given["HEADRACE_ROUTER"] = "apart"
    configuration = read(tmp_path, HEADRACE_WORKERS="3", LOG_LEVEL="warning", **given)
    del given["HEADRACE_ROUTER"]
    blueprint = draw(configuration, SECRETS)
    assert blueprint.servers == []
    assert blueprint.warnings == []
    names = {"gateway", "router", "worker-0", "worker-1", "worker-2", "registry", "analytics", "drift"}
    assert {service.name for service in blueprint.services} == names
    taken: list[int] = []
    for service in blueprint.services:
        assert isinstance(service, ServiceProcess)
        environment = dict(service.command().env)
        assert given.items() <= environment.items()
        assert environment["HOST"] == "127.0.0.1"
        assert environment["LOG_LEVEL"] == "warning"
        assert environment["INTERNAL_TOKEN"] == SECRETS.internal_token
        assert ("BOOTSTRAP_ADMIN_KEY" in environment) == (service.name == "registry")
        taken += service.ports
    assert len(taken) == len(set(taken))
    order = [[service.name for service in group] for group in blueprint.drain_order]
    assert order[:2] == [["gateway"], ["router"]]
    assert order[2] == ["worker-0", "worker-1", "worker-2"]


@pytest.mark.parametrize(
    ("cores", "environment", "fronts"),
    [
        (1, {}, 1),
        (2, {}, 2),
        (3, {"HEADRACE_ROUTER": "auto", "GATEWAY_PROCESSES": "auto", "HEADRACE_FRONTS": "auto"}, 3),
        (2, {"HEADRACE_FRONTS": "1"}, 1),
        (2, {"HEADRACE_FRONTS": "16"}, 16),
        (2, {"GATEWAY_PROCESSES": "2"}, 0),
        (2, {"HEADRACE_ROUTER": "apart"}, 0),
        (2, {"HEADRACE_ROUTER": "apart", "HEADRACE_FRONTS": "2"}, 0),
        (4, {}, 0),
        (64, {"HEADRACE_ROUTER": "inside"}, 3),
        (64, {"HEADRACE_ROUTER": "inside", "HEADRACE_FRONTS": "5"}, 5),
    ],
)
def test_the_router_is_inside_where_cores_are_few_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int, environment: dict[str, str], fronts: int
) -> None:
    monkeypatch.setattr("deploy.embedded.configuration.usable_cores", lambda: cores)
    configuration = read(tmp_path, **environment)
    assert (configuration.fronts, configuration.joint) == (fronts, fronts > 0)


@pytest.mark.parametrize(
    ("environment", "guests"),
    [
        ({}, True),
        ({"HEADRACE_GUESTS": "auto"}, True),
        ({"HEADRACE_GUESTS": "off"}, False),
        ({"SHARED_MEMORY": "true"}, True),
        ({"HEADRACE_ROUTER": "apart"}, False),
        ({"HEADRACE_ROUTER": "apart", "HEADRACE_GUESTS": "auto"}, False),
    ],
)
def test_processes_with_a_router_have_guests_unless_told_otherwise(
    tmp_path: Path, environment: dict[str, str], guests: bool
) -> None:
    assert read(tmp_path, **{"HEADRACE_ROUTER": "inside", **environment}).guests == guests


@pytest.mark.parametrize("fronts", ["1", "3"])
def test_a_joint_process_has_the_ports_and_the_settings_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fronts: str
) -> None:
    given = {**ELSEWHERE, "DRAIN_S": "7"}
    inside = {"HEADRACE_ROUTER": "inside", "HEADRACE_FRONTS": fronts}
    blueprint = draw(read(tmp_path, **inside, **given), SECRETS)
    apart = draw(read(tmp_path, HEADRACE_ROUTER="apart", **given), SECRETS)
    assert [[service.name for service in group] for group in blueprint.drain_order[: blueprint.renewed]] == [
        ["gateway"], ["worker-0", "worker-1"],
    ]  # fmt: skip
    assert apart.renewed == 3
    ports = {service.name: service.ports for service in apart.services}
    joint = blueprint.services[0]
    assert joint.ports == (*ports["gateway"], *ports["router"])

    for name, value in joint.command().env.items():
        monkeypatch.setenv(name, value)
    parts = json.loads(os.environ["FRONTS"])
    assert len(parts) == int(fronts)
    gateway = load(GatewaySettings)
    routers = [load(RouterSettings, part["router"]) for part in parts]
    guests = [load(WorkerSettings, part["guest"]) for part in parts]
    router = routers[0]
    assert gateway.routers == (f"local:{router.frames_name}",)
    assert (gateway.http_port, gateway.grpc_port, gateway.ops_port) == ports["gateway"]
    assert (router.frames_port, router.grpc_port, router.ops_port) == ports["router"]
    assert gateway.drain_s == router.drain_s == 7
    for one in (*routers, *guests):  # of one installation
        assert one.internal_token == gateway.internal_token
        assert one.state_dir == gateway.state_dir
        assert one.kafka_bootstrap_servers == gateway.kafka_bootstrap_servers
    # What is on disk is one process's, ports they share.
    folders = [*(one.directory for one in routers), *(one.directory for one in guests)]
    assert len(set(folders)) == len(folders)
    own = {"router_id", "predecessor_id", "frames_name", "frames_socket"}
    assert all(other.model_dump(exclude=own) == router.model_dump(exclude=own) for other in routers)
    for service in apart.services[:3]:
        for name, value in service.command().env.items():
            monkeypatch.setenv(name, value)
        kinds: dict[str, tuple[type[ServiceSettings], ServiceSettings]] = {
            "gateway": (GatewaySettings, gateway),
            "router": (RouterSettings, router),
            "worker-0": (WorkerSettings, guests[0]),
        }
        kind, same = kinds[service.name]
        # Nothing else is different from what each has in a process of its own.
        changed = {"router_addresses", "frames_name", "worker_id"}
        if service.name == "worker-0":  # a guest listens nowhere, takes no jobs, and has no log of its own
            changed |= {"predecessor_id", "advertise_host", "frames_port", "frames_socket", "grpc_port"}
            changed |= {"ops_port", "batch_assignment"}
        assert load(kind).model_dump(exclude=changed) == same.model_dump(exclude=changed)


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_each_process_with_a_router_has_names_of_its_own_and_takes_turns_with_its_predecessor(
    tmp_path: Path, turn: int
) -> None:
    configuration = read(tmp_path, HEADRACE_ROUTER="inside", HEADRACE_FRONTS="3", **ELSEWHERE)
    configuration.home.mkdir()
    write_turn(configuration.home, turn)
    environment = draw(configuration, SECRETS).services[0].command().env
    parts = json.loads(environment["FRONTS"])
    mark, other = ("b", "") if turn % 2 else ("", "b")
    routers = [part["router"] for part in parts]
    assert [(one["ROUTER_ID"], one["PREDECESSOR_ID"]) for one in routers] == [
        (f"router-{n}{mark}", f"router-{n}{other}") for n in range(3)
    ]
    assert [one["FRAMES_NAME"] for one in routers] == [one["ROUTER_ID"] for one in routers]
    assert [part["guest"] for part in parts] == [{"WORKER_ID": f"guest-{n}{mark}"} for n in range(3)]
    # A path is one process's; the address of each is its own, which it is given where there are several.
    assert ["FRAMES_SOCKET" in one for one in routers] == [True, False, False]
    assert environment["ROUTER_ADDRESSES"] == f"local:router-0{mark}"
    assert "FRAMES_SOCKET" not in environment


@pytest.mark.parametrize(
    ("environment", "adopted"),
    [
        ({"HEADRACE_ROUTER": "inside", "HEADRACE_FRONTS": "3"}, None),
        ({"HEADRACE_ROUTER": "inside", "HEADRACE_FRONTS": "2"}, "router-router-2b"),
        ({"HEADRACE_ROUTER": "apart"}, "router-router-1,router-router-2b"),
        (
            {"HEADRACE_ROUTER": "inside", "HEADRACE_FRONTS": "1", "HEADRACE_WORKERS": "1"},
            "router-router-1,router-router-2b,worker-worker-1",
        ),
    ],
)
def test_the_first_router_publishes_what_those_left_that_are_not_there_any_more(
    tmp_path: Path, environment: dict[str, str], adopted: str | None
) -> None:
    configuration = read(tmp_path, **ELSEWHERE, **environment)
    for name in (
        "router-router-0",
        "router-router-1",
        "router-router-2b",
        "worker-worker-0b",
        "worker-worker-1",
    ):
        (configuration.home / "state" / name / "spool").mkdir(parents=True)
    (configuration.home / "state" / "worker-guest-7").mkdir()  # has no log
    services = {service.name: service for service in draw(configuration, SECRETS).services}
    if configuration.joint:
        parts = json.loads(services["gateway"].command().env["FRONTS"])
        first, *others = (part["router"] for part in parts)
        assert not any("ADOPTED_LOGS" in other for other in others)
    else:
        first = services["router"].command().env
    assert first.get("ADOPTED_LOGS") == adopted


def test_without_guests_nothing_is_said_of_any(tmp_path: Path) -> None:
    inside = {"HEADRACE_ROUTER": "inside", "HEADRACE_FRONTS": "2", "HEADRACE_GUESTS": "off"}
    configuration = read(tmp_path, **inside, **ELSEWHERE)
    parts = json.loads(draw(configuration, SECRETS).services[0].command().env["FRONTS"])
    assert [set(part) for part in parts] == [{"router"}, {"router"}]


def test_what_has_a_router_apart_knows_of_no_fronts(tmp_path: Path) -> None:
    for service in draw(read(tmp_path, HEADRACE_ROUTER="apart", **ELSEWHERE), SECRETS).services:
        assert "FRONTS" not in service.command().env


def test_the_memory_only_broker_is_announced(tmp_path: Path) -> None:
    blueprint = draw(read(tmp_path), SECRETS)
    assert [server.name for server in blueprint.servers] == ["postgres", "valkey", "tansu"]
    assert len(blueprint.warnings) == 1
    assert "memory only" in blueprint.warnings[0]
    assert "stays in memory while it runs" in blueprint.warnings[0]
    durable = draw(read(tmp_path, KAFKA_HOME=str(tmp_path)), SECRETS)
    assert [server.name for server in durable.servers] == ["postgres", "valkey", "kafka"]
    assert durable.warnings == []


def test_bytecode_that_may_not_lie_beside_its_source_is_kept_in_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    kept = inherited_environment(tmp_path)
    assert "PYTHONDONTWRITEBYTECODE" not in kept
    assert kept["PYTHONPYCACHEPREFIX"] == str(tmp_path / "bytecode")
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE")
    assert "PYTHONPYCACHEPREFIX" not in inherited_environment(tmp_path)


def test_free_ports_hold_a_whole_stack(tmp_path: Path) -> None:
    first, second = (read(tmp_path, HEADRACE_WORKERS="4", **free_ports(4)) for _ in range(2))
    assert set(first.ports.values()).isdisjoint(second.ports.values())


def test_secrets_are_made_once_and_closed(tmp_path: Path) -> None:
    made = load_or_create(tmp_path)
    assert load_or_create(tmp_path) == made
    assert re.fullmatch(r"hr_[a-z2-7]{12}_[A-Za-z0-9_-]{43}", made.admin_key)
    assert len(made.internal_token) >= 32
    for name in ("secrets", "admin.key", "callback.secret"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600


def test_a_secret_left_empty_by_a_crash_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "admin.key").touch()
    assert load_or_create(tmp_path).admin_key.startswith("hr_")
