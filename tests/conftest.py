"""Shared fixtures, re-exported; they are written in tests/fixtures/."""

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
