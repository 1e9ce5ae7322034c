"""Shared fixtures, re-exported; they are written in tests/fixtures/. And how long a test may take."""

from __future__ import annotations

import pytest

from tests.fixtures.platform import bare_platform, new_platform, platform, stacks_directory
from tests.fixtures.servers import (
    _started,
    apache_kafka,
    database_url,
    kafka_bootstrap,
    new_apache_kafka,
    new_postgres,
    new_tansu,
    new_valkey,
    postgres_server,
    postgres_url,
    redis_url,
    servers_directory,
)

__all__ = [
    "_started",
    "apache_kafka",
    "bare_platform",
    "database_url",
    "kafka_bootstrap",
    "new_apache_kafka",
    "new_platform",
    "new_postgres",
    "new_tansu",
    "new_valkey",
    "platform",
    "postgres_server",
    "postgres_url",
    "redis_url",
    "servers_directory",
    "stacks_directory",
]

#: The first test of a session that wants the platform starts it and registers the examples.
WITH_A_PLATFORM_S = 900
_PLATFORMS = {"bare_platform", "new_platform", "platform"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The limit of pyproject.toml is for one test; starting a whole platform has limits of its own."""
    for item in items:
        if _PLATFORMS & set(getattr(item, "fixturenames", ())) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(WITH_A_PLATFORM_S))
