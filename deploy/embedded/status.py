"""What the supervisor tells about itself: one JSON file, replaced at once on every change."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path

#: Asks a supervisor for new processes in the place of those that requests run through.
RENEW_SIGNAL = signal.SIGHUP


class Phase(StrEnum):
    """Where the stack as a whole is."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


class State(StrEnum):
    """Where one part is."""

    WAITING = "waiting"
    PREPARING = "preparing"
    STARTING = "starting"
    READY = "ready"
    UNREADY = "not ready"
    RESTARTING = "restarting"
    HELD = "held down"
    STOPPING = "stopping"
    STOPPED = "stopped"
    EXTERNAL = "external"


@dataclass(slots=True)
class PartStatus:
    """One line of `status`. `started_at` is seconds since the Unix epoch; `restarts` counts since `up`."""

    name: str
    state: State = State.WAITING
    pid: int | None = None
    ports: tuple[int, ...] = ()
    started_at: float | None = None
    restarts: int = 0
    detail: str = ""

    @property
    def healthy(self) -> bool:
        return self.state in {State.READY, State.EXTERNAL}


@dataclass(slots=True)
class StackStatus:
    """The whole file."""

    pid: int
    phase: Phase
    error: str = ""
    warnings: list[str] = field(default_factory=list)
    addresses: dict[str, str] = field(default_factory=dict)
    parts: list[PartStatus] = field(default_factory=list)
    #: How often this supervisor renewed the data plane.
    renewed: int = 0

    @property
    def healthy(self) -> bool:
        return self.phase is Phase.READY and all(part.healthy for part in self.parts)

    def write(self, path: Path) -> None:
        """Replace the file; a reader sees the old one or the new one."""
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(asdict(self), indent=1))
        os.replace(temporary, path)


def read_status(path: Path) -> StackStatus | None:
    """What the supervisor wrote last, None where there is nothing readable."""
    try:
        told = json.loads(path.read_text())
        parts = [
            PartStatus(**{**part, "state": State(part["state"]), "ports": tuple(part["ports"])})
            for part in told.pop("parts")
        ]
        return StackStatus(**{**told, "phase": Phase(told["phase"]), "parts": parts})
    except (OSError, ValueError, KeyError, TypeError):
        return None
