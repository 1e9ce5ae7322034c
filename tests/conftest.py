"""Shared fixtures, re-exported; they are written in tests/fixtures/. And how long a test may take, and when.

What is expected of a test:
- It waits with tests/fixtures/waiting.py, never with a deadline of its own, and never sleeps a fixed time.
- Servers are those of its process (tests/fixtures/servers.py). Consumers that form groups get a session of
  two seconds: `KafkaBus(…, session_timeout=2.0)`, `kafka_session_timeout_s=2.0`.
- A whole platform is for what nothing smaller can show. Use `platform`, in a file that is named in
  tests/fixtures/scheduling.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.fixtures import examples, forks, reruns
from tests.fixtures.platform import (
    SharedPlatform,
    _shared_platform,
    bare_platform,
    new_platform,
    platform,
    stacks_directory,
)
from tests.fixtures.scheduling import LongestFirst, in_order, unit_of
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
    "_shared_platform",
    "_started",
    "apache_kafka",
    "bare_platform",
    "database_url",
    "examples",
    "forks",
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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reruns.summary(terminalreporter)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Longest first. The limit of pyproject.toml is for one test; starting a whole platform has limits of its
    own."""
    in_order(items)
    reruns.allow(config, items)
    for item in items:
        if _uses(item, _PLATFORMS) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(WITH_A_PLATFORM_S))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    """See tests/fixtures/scheduling.py."""
    config.option.loadscopereorder = False
    return LongestFirst(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """The shared platform is stopped behind the last test that wants it, behind its second run where it has
    one: idle, it still keeps a core busy."""
    try:
        return (yield)
    finally:
        if nextitem is None or unit_of(nextitem.nodeid) != unit_of(item.nodeid):
            SharedPlatform.stop_all()


def _uses(item: pytest.Item, fixtures: set[str]) -> bool:
    return bool(fixtures & set(getattr(item, "fixturenames", ())))
