"""The broker of docker-compose.yml: a real Apache Kafka starts with its configuration, and gets its topics
the way the job `topics` makes them."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path

import pytest

from deploy.embedded.apache_kafka import ApacheKafkaServer
from deploy.embedded.blueprint import python_path
from deploy.embedded.configuration import REPOSITORY
from services.common.topics import all_topics
from tests.fixtures.servers import kafka_home
from tests.fixtures.waiting import PATIENCE_S
from tests.unit.deploy.test_compose import config


class ComposedKafka(ApacheKafkaServer):
    """With the properties that the image makes of its KAFKA_* variables, and our addresses."""

    def _settings(self) -> Mapping[str, object]:
        given = config()["services"]["kafka"]["environment"]
        settings = {name[6:].lower().replace("_", "."): value for name, value in given.items()}
        controller = f"127.0.0.1:{self.controller_port}"
        here = {
            "listeners": f"PLAINTEXT://{self.url},CONTROLLER://{controller}",
            "advertised.listeners": f"PLAINTEXT://{self.url}",
            "controller.quorum.voters": f"{settings['node.id']}@{controller}",
            "log.dirs": self._log_dir,
        }
        assert here.keys() <= settings.keys()
        return settings | here


@pytest.mark.kafka
def test_the_composed_broker_starts_and_gets_its_topics(servers_directory: Path) -> None:
    home = kafka_home()
    if home is None:
        pytest.skip("no Apache Kafka here: set KAFKA_HOME")
    server = ComposedKafka(servers_directory / f"composed-{uuid.uuid4().hex[:8]}", kafka_home=home)
    server.start(timeout=PATIENCE_S)
    try:
        for made, found in ((len(all_topics()), 0), (0, len(all_topics()))):
            done = subprocess.run(
                [sys.executable, *config()["services"]["topics"]["entrypoint"][1:]],
                env={"KAFKA_BOOTSTRAP_SERVERS": server.url, "PYTHONPATH": python_path()},
                cwd=REPOSITORY,
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            assert done.stdout == f"{made} topics made, {found} were there.\n"
    finally:
        server.kill()
