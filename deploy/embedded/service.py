"""One of the six services as a process, `python -m services.<name>` with its environment, or two as one."""

from __future__ import annotations

import http.client
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from deploy.embedded import native
from deploy.embedded.configuration import REPOSITORY
from deploy.embedded.process import Command
from deploy.embedded.server import LOOPBACK, Server

#: How often a port that two processes share is asked, until the one that is meant answers: the kernel draws
#: one for each connection.
_ASKED = 16


class ServiceProcess(Server):
    """Each of `health_ports` answers /health/ready. `environment` is asked at each start: addresses and
    passwords of the embedded servers exist only once those are prepared. With `yields` it takes the processor
    only when nobody else wants it, with `compiled` it runs compiled modules where these are of the present
    sources."""

    def __init__(
        self,
        name: str,
        directory: Path,
        *,
        module: str,
        ports: tuple[int, ...],
        health_ports: tuple[int, ...],
        environment: Callable[[], Mapping[str, str]],
        yields: bool = False,
        compiled: bool = False,
    ) -> None:
        self.name = name
        super().__init__(directory, ports[0])
        self._module = module
        self._ports = ports
        self._health_ports = health_ports
        self._environment = environment
        self._compiled = compiled
        # On one machine the readers of events must not slow down those that answer.
        self._yields = yields

    @property
    def ports(self) -> tuple[int, ...]:
        return self._ports

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    def prepare(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)

    def command(self) -> Command:
        environment = {**self._environment(), "PYTHONUNBUFFERED": "1"}
        # Asked at each start: what was compiled before a source was edited is never run.
        copy = native.find() if self._compiled else None
        if copy is not None:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(copy), environment["PYTHONPATH"])))
        return Command(
            argv=[sys.executable, "-m", self._module],
            env=environment,
            cwd=copy or REPOSITORY,
            yields=self._yields,
        )

    def ready(self) -> bool:
        return all(self._ready(port) for port in self._health_ports)

    def _ready(self, port: int) -> bool:
        for _ in range(_ASKED):
            said = self._asked(port)
            if said is not None:
                return said
        self.detail = f"another process answers on port {port}"
        return False

    def _asked(self, port: int) -> bool | None:
        """Whether it says that it is ready; None where another process answered."""
        self.silent = False
        connection = http.client.HTTPConnection(LOOPBACK, port, timeout=1.0)
        try:
            connection.request("GET", "/health/ready")
            response = connection.getresponse()
            body = response.read(4096)
        except (OSError, http.client.HTTPException) as error:
            self.detail = f"no answer on port {port} ({type(error).__name__})"
            self.silent = isinstance(error, TimeoutError)
            return False
        finally:
            connection.close()
        if response.headers.get("x-process", str(self.pid)) != str(self.pid):
            return None
        self.detail = "" if response.status == 200 else _reasons(body)
        return response.status == 200


def _reasons(body: bytes) -> str:
    """What the service says is not ready yet, in a few words."""
    try:
        said = json.loads(body)
    except ValueError:
        return body.decode(errors="replace")[:200]
    reasons = said.get("reasons") if isinstance(said, dict) else None
    if not isinstance(reasons, dict):
        return "not ready"
    return "; ".join(f"{part}: {reason}" for part, reason in reasons.items())[:300]
