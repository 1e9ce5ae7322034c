"""What the environment makes of the stack."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from deploy.embedded.blueprint import draw
from deploy.embedded.configuration import Configuration, free_ports, inherited_environment, read_platform_env
from deploy.embedded.process import EmbeddedError
from deploy.embedded.secret_files import Secrets, load_or_create
from deploy.embedded.service import ServiceProcess
from services.common.settings import load
from services.gateway.settings import Settings as GatewaySettings
from services.router.settings import Settings as RouterSettings

SECRETS = Secrets("t" * 32, "hr_key")


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
    ("cores", "environment", "joint"),
    [
        (2, {}, True),
        (3, {"HEADRACE_ROUTER": "auto", "GATEWAY_PROCESSES": "auto"}, True),
        (2, {"GATEWAY_PROCESSES": "2"}, False),
        (2, {"HEADRACE_ROUTER": "apart"}, False),
        (4, {}, False),
        (64, {"HEADRACE_ROUTER": "inside"}, True),
    ],
)
def test_the_router_is_inside_where_cores_are_few_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int, environment: dict[str, str], joint: bool
) -> None:
    monkeypatch.setattr("deploy.embedded.configuration.usable_cores", lambda: cores)
    assert read(tmp_path, **environment).joint == joint


def test_a_joint_process_has_the_ports_and_the_settings_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"DATABASE_URL": "postgresql://u:p@db/x", "REDIS_URL": "redis://cache/0", "DRAIN_S": "7"}
    blueprint = draw(read(tmp_path, HEADRACE_ROUTER="inside", **given), SECRETS)
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
    gateway, router = load(GatewaySettings), load(RouterSettings, json.loads(os.environ["ROUTER"]))
    assert gateway.routers == (f"local:{router.frames_name}",)
    assert (gateway.http_port, gateway.grpc_port, gateway.ops_port) == ports["gateway"]
    assert (router.frames_port, router.grpc_port, router.ops_port) == ports["router"]
    assert gateway.drain_s == router.drain_s == 7
    for service in apart.services[:2]:
        for name, value in service.command().env.items():
            monkeypatch.setenv(name, value)
        # Nothing else is different from what each has in a process of its own.
        alone = load(GatewaySettings if service.name == "gateway" else RouterSettings)
        other = gateway if service.name == "gateway" else router
        changed = {"router_addresses", "frames_name"}
        assert alone.model_dump(exclude=changed) == other.model_dump(exclude=changed)


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
