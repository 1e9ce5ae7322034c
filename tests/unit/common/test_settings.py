from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import obstore
import pytest

from services.common.objects import ArtifactStore
from services.common.settings import (
    ArtifactSettings,
    CommaSeparated,
    ConfigurationError,
    DatabaseSettings,
    Port,
    ServiceSettings,
    load,
)

_REQUIRED = {
    "KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:9092",
    "INTERNAL_TOKEN": "0123456789abcdef",
    "DATABASE_URL": "postgresql://u:secret@h:1/d",
}


class Settings(ServiceSettings, DatabaseSettings):
    http_port: Port = 8000
    router_addresses: CommaSeparated = ()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "LOG_LEVEL", "STATE_DIR", "HTTP_PORT", "ROUTER_ADDRESSES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in _REQUIRED.items():
        monkeypatch.setenv(name, value)


def test_the_environment_is_read_by_the_common_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PORT", "9000")
    monkeypatch.setenv("ROUTER_ADDRESSES", "a:1, b:2,")
    monkeypatch.setenv("STATE_DIR", "/somewhere")
    settings = load(Settings)
    assert settings.http_port == 9000
    assert settings.router_addresses == ("a:1", "b:2")
    assert settings.state_dir == Path("/somewhere")
    assert settings.database_url == _REQUIRED["DATABASE_URL"]


def test_what_is_given_for_one_of_two_services_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PORT", "9000")
    monkeypatch.setenv("ROUTER_ADDRESSES", "a:1")
    settings = load(Settings, {"HTTP_PORT": "9001", "ROUTER_ADDRESSES": "", "SOMETHING_ELSE": "x"})
    assert settings.http_port == 9001
    assert settings.router_addresses == ("a:1",)  # empty is absent
    with pytest.raises(ConfigurationError, match="HTTP_PORT is wrong"):
        load(Settings, {"HTTP_PORT": "none"})


def test_empty_means_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    monkeypatch.setenv("LOG_LEVEL", "")
    settings = load(Settings)
    assert settings.otel_exporter_otlp_endpoint == ""
    assert settings.log_level == "info"


def test_every_missing_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INTERNAL_TOKEN")
    monkeypatch.setenv("DATABASE_URL", "")
    with pytest.raises(ConfigurationError, match="not set: DATABASE_URL, INTERNAL_TOKEN") as caught:
        load(Settings)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTP_PORT", "65536"),
        ("HTTP_PORT", "http"),
        ("DATABASE_URL", "mysql://u:secret@h/d"),
        ("LOG_LEVEL", "loud"),
        ("OTEL_TRACES_SAMPLE_RATIO", "1.5"),
        ("DRAIN_S", "0"),
        ("INTERNAL_TOKEN", "short-secret"),
    ],
)
def test_a_wrong_variable_is_named_and_its_value_kept_secret(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=f"{name} is wrong") as caught:
        load(Settings)
    assert "secret" not in str(caught.value)


def test_secrets_are_not_in_the_repr() -> None:
    text = repr(load(Settings))
    assert "secret" not in text
    assert _REQUIRED["INTERNAL_TOKEN"] not in text


def test_only_given_options_reach_the_artifact_store(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ARTIFACT_STORE_URL", "s3://bucket/prefix")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    options = load(ArtifactSettings).artifact_store_options()
    assert options == {"endpoint": "http://127.0.0.1:9000", "region": "us-east-1"}


def test_an_empty_address_of_s3_is_aws_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client of S3 reads the variables, too: an empty address became one that no request can go to."""
    monkeypatch.setenv("ARTIFACT_STORE_URL", "s3://bucket/prefix")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    settings = load(ArtifactSettings)
    store = ArtifactStore(settings.artifact_store_url, settings.artifact_store_options())
    address = obstore.sign(store._store, "GET", "x", timedelta(minutes=1))  # type: ignore[call-overload]
    assert urlsplit(address).hostname == "s3.eu-central-1.amazonaws.com"
