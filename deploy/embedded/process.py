"""One child process that never outlives the process that started it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deploy.embedded.priority import give_way

PR_SET_PDEATHSIG = 1
#: Loaded before any fork: nothing may be imported or allocated for long between fork and exec.
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class EmbeddedError(Exception):
    """Why a part cannot run: one sentence for the person who started it."""


@dataclass(frozen=True, slots=True)
class Command:
    """What to execute and how it wants to be ended.

    `death_signal` is what the kernel sends when the parent dies; `stop_signal` asks for a clean end.
    `user` and `group` are numeric ids to drop to, None to stay. With `yields` it takes the processor when
    nobody else wants it.
    """

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    user: int | None = None
    group: int | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    death_signal: signal.Signals = signal.SIGKILL
    yields: bool = False


def die_with_parent(death_signal: signal.Signals) -> Callable[[], None]:
    """A `preexec_fn`: the kernel sends `death_signal` when the THREAD that forked ends (Linux only).

    Fork from a thread that lives as long as the program: the main one.
    """
    parent = os.getpid()
    number = int(death_signal)

    def arm() -> None:
        if _LIBC is not None:
            _LIBC.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
            if os.getppid() != parent:  # it died between fork and prctl: nobody would tell us
                os._exit(1)

    return arm


def plain_environment() -> dict[str, str]:
    """The little of our own environment that a foreign server needs; nothing else can leak into it."""
    kept = ("PATH", "HOME", "LANG", "TZ", "TMPDIR", "JAVA_HOME", "LD_LIBRARY_PATH")
    return {name: os.environ[name] for name in kept if name in os.environ}


class Child:
    """A running command in a process group of its own, output appended to `log`.

    It stays in our session: Linux shares the processor between sessions first (autogroups), and priorities
    count within one only, so that in a session of its own no part would make room for another."""

    def __init__(self, command: Command, log: Path) -> None:
        """Start it at once. Call from the main thread (see `die_with_parent`)."""
        self.command = command
        self.log = log
        self.started_at = time.time()
        log.parent.mkdir(parents=True, exist_ok=True)
        identity: dict[str, object] = {}
        if command.user is not None:
            identity = {"user": command.user, "group": command.group, "extra_groups": []}
        with log.open("ab") as output:
            self._process = subprocess.Popen(  # type: ignore[call-overload]  # noqa: S603 - argv is ours
                list(command.argv),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(command.env),
                cwd=command.cwd,
                process_group=0,  # see the class for why it is no session
                preexec_fn=die_with_parent(command.death_signal),  # noqa: PLW1509 - it only calls prctl
                **identity,
            )
        if command.yields:
            give_way(self.pid)

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative signal number when a signal ended it."""
        code: int | None = self._process.poll()
        return code

    @property
    def alive(self) -> bool:
        return self.exit_code is None

    def terminate(self) -> None:
        """Ask it to end in its own clean way."""
        if self.alive:
            self._process.send_signal(self.command.stop_signal)

    def show_stacks(self) -> None:
        """Have one of our services write to its log where its threads are."""
        if self.alive:
            self._process.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        """End it and whatever it started in its group, at once, and reap it. Also what it left behind."""
        # A number is not given out again while a group carries it, so this reaches no stranger.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait(timeout=10)

    def wait(self, timeout: float) -> bool:
        """True when it has ended within `timeout` seconds."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def last_words(self, lines: int = 3, limit: int = 4096) -> str:
        """The end of the log, for the sentence that says why it failed."""
        try:
            with self.log.open("rb") as stream:
                stream.seek(0, os.SEEK_END)
                stream.seek(max(0, stream.tell() - limit))
                text = stream.read().decode(errors="replace")
        except OSError:
            return ""
        return " | ".join(line.strip() for line in text.splitlines()[-lines:] if line.strip())
