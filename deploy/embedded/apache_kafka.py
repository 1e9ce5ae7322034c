"""A real Apache Kafka in KRaft mode, one node, from an unpacked distribution. Durable."""

from __future__ import annotations

import base64
import os
import re
import shutil
import signal
import subprocess
import uuid
from collections.abc import Mapping
from pathlib import Path

from deploy.embedded.kafka_probe import answers_kafka
from deploy.embedded.process import Command, EmbeddedError, die_with_parent, plain_environment
from deploy.embedded.server import LOOPBACK, Server, free_port

OLDEST_JAVA = 17
HEAP = "512m"
_LOGGING = """status = error
appender.console.type = Console
appender.console.name = STDERR
appender.console.target = SYSTEM_ERR
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = [%d] %p %m (%c)%n
rootLogger.level = warn
rootLogger.appenderRef.console.ref = STDERR
"""


def find_java() -> Path:
    """A Java of version 17 or later: of JAVA_HOME, else on PATH."""
    home = os.environ.get("JAVA_HOME")
    found = str(Path(home, "bin", "java")) if home else shutil.which("java")
    if found is None or not os.access(found, os.X_OK):
        raise EmbeddedError(f"Apache Kafka needs Java {OLDEST_JAVA} or later, and there is no java on PATH.")
    said = subprocess.run([found, "-version"], capture_output=True, text=True, timeout=30, check=False)  # noqa: S603 - a fixed question to java
    version = re.search(r'version "(?:1\.)?(\d+)', said.stderr + said.stdout)
    if version is None or int(version[1]) < OLDEST_JAVA:
        told = version[1] if version else "unknown"
        raise EmbeddedError(f"Apache Kafka needs Java {OLDEST_JAVA} or later; {found} is version {told}.")
    return Path(found)


class ApacheKafkaServer(Server):
    """Broker and controller in one process. `kafka_home` holds `libs/` as in an unpacked Apache Kafka.

    The controller listens on `controller_port`, by default a free one. Topics are never auto-created.
    """

    name = "kafka"

    def __init__(
        self,
        directory: Path,
        port: int | None = None,
        *,
        kafka_home: Path,
        controller_port: int | None = None,
    ) -> None:
        super().__init__(directory, port)
        self.controller_port = controller_port or free_port()
        self._libs = kafka_home.absolute() / "libs"
        self._properties = self.directory / "server.properties"
        self._log_dir = self.directory / "log"
        self._java = Path("java")

    @property
    def ports(self) -> tuple[int, ...]:
        return (self.port, self.controller_port)

    @property
    def url(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    def prepare(self) -> None:
        if not any(self._libs.glob("kafka_*.jar")):
            raise EmbeddedError(
                f"KAFKA_HOME {self._libs.parent} is no unpacked Apache Kafka: no kafka_*.jar in libs."
            )
        self._java = find_java()
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        (self.directory / "log4j2.properties").write_text(_LOGGING)
        self._properties.write_text("".join(f"{name}={value}\n" for name, value in self._settings().items()))
        if not (self._log_dir / "meta.properties").exists():
            self._format()

    def command(self) -> Command:
        return Command(
            argv=[*self._jvm(), "kafka.Kafka", str(self._properties)],
            env=plain_environment(),
            cwd=self.directory,
        )

    def ready(self) -> bool:
        return answers_kafka(LOOPBACK, self.port)

    def _jvm(self) -> list[str]:
        return [
            str(self._java),
            "-Xms64m",
            f"-Xmx{HEAP}",
            "-XX:+UseSerialGC",
            "-XX:TieredStopAtLevel=1",
            "-Djava.awt.headless=true",
            f"-Dlog4j2.configurationFile={self.directory / 'log4j2.properties'}",
            "-cp",
            f"{self._libs}/*",
        ]

    def _settings(self) -> Mapping[str, object]:
        controller = f"{LOOPBACK}:{self.controller_port}"
        single = dict.fromkeys(
            [
                "offsets.topic.replication.factor",
                "transaction.state.log.replication.factor",
                "transaction.state.log.min.isr",
                "share.coordinator.state.topic.replication.factor",
                "share.coordinator.state.topic.min.isr",
            ],
            1,
        )
        return {
            "process.roles": "broker,controller",
            "node.id": 1,
            "controller.quorum.voters": f"1@{controller}",
            "controller.listener.names": "CONTROLLER",
            "listeners": f"PLAINTEXT://{self.url},CONTROLLER://{controller}",
            "advertised.listeners": f"PLAINTEXT://{self.url}",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
            "log.dirs": self._log_dir,
            "auto.create.topics.enable": "false",
            "offsets.topic.num.partitions": 4,
            "transaction.state.log.num.partitions": 4,
            "group.initial.rebalance.delay.ms": 0,
            "group.min.session.timeout.ms": 1000,
            "broker.session.timeout.ms": 2000,
            "broker.heartbeat.interval.ms": 500,
            "num.network.threads": 2,
            "num.io.threads": 4,
            "log.cleaner.dedupe.buffer.size": 16 << 20,
            **single,
        }

    def _format(self) -> None:
        # An A in front keeps the id from starting with a dash, which the tool would take for an option.
        cluster = "A" + base64.urlsafe_b64encode(uuid.uuid4().bytes).decode()[:21]
        tool = ("kafka.tools.StorageTool", "format")
        done = subprocess.run(  # noqa: S603 - argv is ours
            [*self._jvm(), *tool, "--cluster-id", cluster, "--config", str(self._properties)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=plain_environment(),
            cwd=self.directory,
            preexec_fn=die_with_parent(signal.SIGKILL),
        )
        if done.returncode != 0:
            said = " | ".join((done.stderr or done.stdout).strip().splitlines()[-2:])
            raise EmbeddedError(f"Formatting the storage of Apache Kafka failed: {said}")
