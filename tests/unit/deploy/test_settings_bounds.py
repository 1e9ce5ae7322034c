"""What operators may set: never a number that fails only once it is used."""

from __future__ import annotations

import importlib
from datetime import UTC, datetime, timedelta

import pytest

from services.common.settings import ConfigurationError, ServiceSettings, load

SERVICES = ("gateway", "router", "worker", "registry", "analytics", "drift")
KEPT = {
    "ANALYTICS_KEEP_DAYS": ("analytics", timedelta(days=1)),
    "ANALYTICS_KEEP_OUTCOMES_DAYS": ("analytics", timedelta(days=1)),
    "REGISTRY_KEEP_TRIALS_DAYS": ("registry", timedelta(days=1)),
    "BATCH_RETENTION_S": ("gateway", timedelta(seconds=1)),
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:9092",
        "INTERNAL_TOKEN": "0123456789abcdef",
        "DATABASE_URL": "postgresql://u:secret@h:1/d",
        "REDIS_URL": "redis://h:1/0",
        "ARTIFACT_STORE_URL": "file:///artifacts",
        "ROUTER_ADDRESSES": "h:1",
    }.items():
        monkeypatch.setenv(name, value)


def kind(service: str) -> type[ServiceSettings]:
    settings: type[ServiceSettings] = importlib.import_module(f"services.{service}.settings").Settings
    return settings


@pytest.mark.parametrize("service", SERVICES)
def test_no_setting_is_infinite(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drain that never ends is no timer, and what is kept for ever begins at no date."""
    numbers = [
        name.upper() for name, field in kind(service).model_fields.items() if field.annotation is float
    ]
    assert "DRAIN_S" in numbers
    for name in numbers:
        with monkeypatch.context() as only:
            only.setenv(name, "inf")
            with pytest.raises(ConfigurationError, match=f"{name} is wrong"):
                load(kind(service))


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_for_longest_still_begins_at_a_date(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    service, unit = KEPT[name]
    century = timedelta(days=36_500)
    monkeypatch.setenv(name, str(century / unit))
    kept = getattr(load(kind(service)), name.lower()) * unit
    assert datetime.now(UTC) - kept < datetime(1950, 1, 1, tzinfo=UTC)
    monkeypatch.setenv(name, str(timedelta(days=1_000_000) / unit))  # meant as: for ever
    with pytest.raises(ConfigurationError, match=f"{name} is wrong"):
        load(kind(service))
