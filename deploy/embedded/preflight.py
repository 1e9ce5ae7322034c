"""What is checked before anything is started: each refusal is one sentence, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from deploy.embedded.blueprint import Blueprint
from deploy.embedded.process import EmbeddedError
from deploy.embedded.server import port_is_free

OLDEST_PYTHON = (3, 11)
LEAST_FREE_BYTES = 1 << 30


def check_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> None:
    """Raises EmbeddedError for a Python that is too old."""
    if version[:2] < OLDEST_PYTHON:
        found = ".".join(map(str, version))
        raise EmbeddedError(f"Headrace needs Python 3.11 or later; {sys.executable} is {found}.")


def check_disk(home: Path) -> None:
    """Raises EmbeddedError where state could not be kept: no room, or no permission."""
    existing = next(folder for folder in (home, *home.parents) if folder.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise EmbeddedError(f"{existing} is not writable: set HEADRACE_HOME to a folder of yours.")
    free = shutil.disk_usage(existing).free
    if free < LEAST_FREE_BYTES:
        raise EmbeddedError(
            f"Only {free / 2**20:.0f} MB are free on the disk of {existing}, and the state of Headrace "
            "needs 1 GB: make room, or set HEADRACE_HOME to another disk."
        )


def check_ports(blueprint: Blueprint) -> None:
    """Raises EmbeddedError for the first port that somebody else listens on."""
    for server in (*blueprint.servers, *blueprint.services):
        for port in server.ports:
            if not port_is_free(port):
                raise EmbeddedError(
                    f"Port {port} for {server.name} is in use by another program: stop it, or set "
                    "HEADRACE_PORT_OFFSET=1000 (or the port's variable of deploy/platform.env)."
                )
