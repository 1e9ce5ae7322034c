"""Shared fixtures, re-exported; they are written in tests/fixtures/."""

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
    "database_url",
    "kafka_bootstrap",
    "new_apache_kafka",
    "new_postgres",
    "new_tansu",
    "new_valkey",
    "postgres_server",
    "postgres_url",
    "redis_url",
    "servers_directory",
]
