"""What a container runs: `python entrypoint.py` becomes `python -m services.$SERVICE`.

Replicas of a scaled service share one volume and have no names of their own, but each needs an id that
outlives its container: the prediction log that a killed replica left on the volume is found by the id. So
each takes the first of <service>-0, <service>-1, … that no other replica holds. What holds it is a file
lock, which ends with the process and with nothing else.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

#: Services that are scaled on one volume, with the variable that carries a replica's id.
REPLICATED = {"router": "ROUTER_ID", "worker": "WORKER_ID"}
MOST_REPLICAS = 256


def claim(folder: Path, service: str) -> str:
    """The first free id, held for as long as this process lives, whatever program it becomes."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(MOST_REPLICAS):
        name = f"{service}-{number}"
        held = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(held)
            continue
        os.set_inheritable(held, True)
        return name
    sys.exit(f"All {MOST_REPLICAS} ids of {service} in {folder} are taken.")


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """What the service gets: what the container was given, and what only the running container knows."""
    service = given["SERVICE"]
    added: dict[str, str] = {}
    variable = REPLICATED.get(service)
    if variable is not None and not given.get(variable):
        added[variable] = claim(Path(given["STATE_DIR"]), service)
    if service == "worker":
        # The container's id, under which the others on its network find it.
        added["ADVERTISE_HOST"] = given.get("ADVERTISE_HOST") or socket.gethostname()
    return {**given, **added}


if __name__ == "__main__":
    command = [sys.executable, "-m", f"services.{os.environ['SERVICE']}"]
    os.execve(sys.executable, command, environment(os.environ))  # noqa: S606 - this process becomes the service
