"""The stack as an object: what the command line and the tests start, ask and stop."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from deploy.embedded import lock
from deploy.embedded.blueprint import draw, make_directories, python_path
from deploy.embedded.configuration import REPOSITORY, Configuration, free_ports
from deploy.embedded.postgres import PostgresServer
from deploy.embedded.preflight import check_disk, check_ports, check_python
from deploy.embedded.process import EmbeddedError
from deploy.embedded.secret_files import load_or_create
from deploy.embedded.status import RENEW_SIGNAL, PartStatus, Phase, StackStatus, State, read_status

#: Exit code of a supervisor that found another one in its home.
ALREADY_RUNS = 3
#: Argument of a supervisor that stops when its standard input ends.
WHILE_STDIN = "--while-stdin"
START_TIMEOUT_S = 240.0
#: Longer than the supervisor gives itself (its STOP_S), with the time to reap what it killed.
STOP_TIMEOUT_S = 90.0
KILLED_TIMEOUT_S = 20.0
#: Three groups of processes start one after the other, and drain.
RENEW_TIMEOUT_S = 240.0
POLL_S = 0.1
#: Of consumers in a stack for a test: groups form, and let go of what died, in half the usual time.
SESSION_TIMEOUT_S = 3.0

Progress = Callable[[StackStatus], None]


class AlreadyRuns(EmbeddedError):
    """Another supervisor holds this home."""


class Stack:
    """The stack of one home folder, whoever started it.

    `environment` decides everything (see `Configuration.read`). With `detached` False the stack ends with
    the process that started it, cleanly; otherwise it outlives it. `supervisor` is the module
    that is run in the background.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        *,
        detached: bool = True,
        supervisor: str = "deploy.embedded.supervise",
    ) -> None:
        self.configuration = Configuration.read(environment)
        self.environment = dict(environment)
        self._detached = detached
        self._module = supervisor
        self._supervisor: subprocess.Popen[bytes] | None = None

    @classmethod
    def on_free_ports(
        cls,
        home: Path,
        *,
        workers: int = 2,
        kafka_home: Path | None = None,
        environment: Mapping[str, str] | None = None,
        supervisor: str = "deploy.embedded.supervise",
    ) -> Stack:
        """A stack for a test: nothing of the caller's own stack is touched or used, but for the bytecode that
        it keeps where Python is told to keep none: compiled anew, it is most of a start. Nor does what mypyc
        compiled decide what a test sees, unless `environment` says so."""
        foreign = ("HEADRACE_", "KAFKA_", "DATABASE_URL", "REDIS_URL", "ARTIFACT_STORE_URL", "OTEL_")
        chosen = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        if chosen.pop("PYTHONDONTWRITEBYTECODE", ""):
            chosen.setdefault("PYTHONPYCACHEPREFIX", str(REPOSITORY / ".headrace" / "bytecode"))
        chosen |= free_ports(workers)
        chosen |= {"HEADRACE_HOME": str(home), "HEADRACE_WORKERS": str(workers), "HEADRACE_NATIVE": "0"}
        chosen["KAFKA_SESSION_TIMEOUT_S"] = str(SESSION_TIMEOUT_S)
        if kafka_home is not None:
            chosen["KAFKA_HOME"] = str(kafka_home)
        return cls(chosen | dict(environment or {}), detached=False, supervisor=supervisor)

    # Addresses.

    @property
    def home(self) -> Path:
        return self.configuration.home

    @property
    def rest_url(self) -> str:
        return self.configuration.rest_url

    @property
    def grpc_address(self) -> str:
        return self.configuration.grpc_address

    @property
    def admin_key(self) -> str:
        return self.configuration.admin_key_file.read_text().strip()

    @property
    def internal_token(self) -> str:
        return load_or_create(self.home).internal_token

    @property
    def database_url(self) -> str:
        given = self.configuration.database_url
        port = self.configuration.ports["POSTGRES_PORT"]
        return given or PostgresServer(self.home / "postgres", port).url

    @property
    def kafka_bootstrap_servers(self) -> str:
        given = self.configuration.kafka_bootstrap_servers
        return given or f"127.0.0.1:{self.configuration.ports['KAFKA_PORT']}"

    def service_url(self, name: str) -> str:
        """REST (or, for router and worker-<i>, health and metrics) of one service, behind the gateway."""
        if name.startswith("worker-"):
            return f"http://127.0.0.1:{self.configuration.worker_port(int(name[7:]), 'OPS')}"
        ports = self.configuration.ports
        port = ports.get(f"{name.upper()}_HTTP_PORT") or ports[f"{name.upper()}_OPS_PORT"]
        return f"http://127.0.0.1:{port}"

    # Its state.

    @property
    def running(self) -> bool:
        """Whether a supervisor, or something it has not ended yet, is there."""
        return lock.held(self._lock_file)

    def status(self) -> StackStatus | None:
        """What the supervisor says, None where there is none."""
        return read_status(self.home / "status.json") if self.running else None

    def part(self, name: str) -> PartStatus:
        """One part's line. Raises KeyError where there is no such part."""
        status = self.status()
        for part in status.parts if status else ():
            if part.name == name:
                return part
        raise KeyError(name)

    def pids(self) -> dict[str, int]:
        """Process id of every part that runs."""
        status = self.status()
        return {part.name: part.pid for part in (status.parts if status else ()) if part.pid is not None}

    # What can be done with it.

    def start(self, timeout: float = START_TIMEOUT_S, progress: Progress = lambda status: None) -> None:
        """Start it and wait until every part is ready. Raises AlreadyRuns, or EmbeddedError with one sentence
        after everything that was started has been stopped again."""
        check_python()
        self._wait_for_leftovers()
        check_disk(self.home)
        make_directories(self.home)
        check_ports(draw(self.configuration, load_or_create(self.home)))
        (self.home / "status.json").unlink(missing_ok=True)
        self._supervisor = self._launch()
        try:
            self._wait_until_up(self._supervisor, time.monotonic() + timeout, progress)
        except AlreadyRuns:
            raise
        except BaseException:
            self.stop()
            raise

    def stop(self, timeout: float = STOP_TIMEOUT_S, progress: Progress = lambda status: None) -> bool:
        """Drain and stop everything; data stays. False where nothing ran. After `timeout` s by force."""
        if not self._anything_left():
            return False
        asked: int | None = None
        deadline = time.monotonic() + timeout
        while self._anything_left() and time.monotonic() < deadline:
            status = self.status()
            pid = self._supervisor.pid if self._supervisor is not None else status.pid if status else None
            if pid is not None and asked is None:
                asked = pid
                _signal(pid, signal.SIGTERM)
            if status is not None:
                progress(status)
            time.sleep(POLL_S)
        if self._anything_left() and asked is not None:
            _signal(asked, signal.SIGKILL)
            self._until(
                lambda: not self._anything_left(),
                KILLED_TIMEOUT_S,
                "The stack did not end when it was killed.",
            )
        return True

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL, *, hold: bool = False) -> int:
        """Send a signal to one part (or to `supervisor`) and return the pid it had.

        With `hold` it stays down until `release`; otherwise the supervisor starts it again.
        """
        if name == "supervisor":
            status = self.status()
            if status is None:
                raise KeyError(name)
            pid = status.pid
        else:
            if hold:
                (self.home / "hold" / name).touch()
            found = self.part(name).pid
            if found is None:
                raise KeyError(name)
            pid = found
        os.kill(pid, number)
        return pid

    def release(self, name: str) -> None:
        """Let a part that was killed with `hold` be started again."""
        (self.home / "hold" / name).unlink(missing_ok=True)

    def wait_ready(self, name: str, *, not_pid: int | None = None, timeout: float = 60.0) -> PartStatus:
        """Wait until a part is ready, as another process than `not_pid` where that is given."""

        def again() -> bool:
            part = self.part(name)
            return part.state is State.READY and part.pid != not_pid

        self._until(again, timeout, f"{name} was not ready again within {timeout:.0f} s.")
        return self.part(name)

    def renew(self, timeout: float = RENEW_TIMEOUT_S) -> bool:
        """Put new processes in the place of gateway, router and workers while requests go on; False where
        nothing runs. Raises EmbeddedError where that did not happen in `timeout` seconds."""
        status = self.status()
        if status is None:
            return False
        before = status.renewed
        _signal(status.pid, RENEW_SIGNAL)

        def renewed() -> bool:
            now = self.status()
            return now is None or now.renewed > before

        log = self.configuration.logs / "supervisor.log"
        self._until(renewed, timeout, f"The data plane was not renewed in time; see {log}.")
        return self.running

    # Inside.

    @property
    def _lock_file(self) -> Path:
        return self.home / "lock"

    def _wait_for_leftovers(self) -> None:
        """Return when nobody holds the home; the rests of a killed supervisor end within seconds."""
        deadline = time.monotonic() + KILLED_TIMEOUT_S
        while self.running:
            status = self.status()
            alive = status is not None and _exists(status.pid)
            if status is not None and alive and status.phase in {Phase.STARTING, Phase.READY}:
                raise AlreadyRuns(f"Headrace runs already: {self.rest_url} (state in {self.home}).")
            if time.monotonic() > deadline:
                raise EmbeddedError(f"Another Headrace in {self.home} is still stopping; try again.")
            time.sleep(POLL_S)

    def _launch(self) -> subprocess.Popen[bytes]:
        environment = self.environment | {"PYTHONPATH": python_path(), "PYTHONUNBUFFERED": "1"}
        with (self.configuration.logs / "supervisor.log").open("ab") as output:
            return subprocess.Popen(  # noqa: S603 - our own module
                [sys.executable, "-m", self._module, *([] if self._detached else [WHILE_STDIN])],
                cwd=REPOSITORY,
                env=environment,
                # Its end is our end, whichever thread of ours started it: the kernel closes the pipe.
                stdin=subprocess.DEVNULL if self._detached else subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait_until_up(
        self, supervisor: subprocess.Popen[bytes], deadline: float, progress: Progress
    ) -> None:
        while True:
            code = supervisor.poll()
            told = read_status(self.home / "status.json")
            status = told if told is not None and told.pid == supervisor.pid else None
            if status is not None:
                progress(status)
            if code == ALREADY_RUNS:
                raise AlreadyRuns(f"Headrace runs already: {self.rest_url} (state in {self.home}).")
            if code is not None:
                why = status.error if status is not None else ""
                log = self.configuration.logs / "supervisor.log"
                raise EmbeddedError(why or f"The supervisor ended with code {code}; see {log}.")
            if status is not None and status.phase is Phase.READY:
                return
            if time.monotonic() > deadline:
                waiting = (
                    ", ".join(part.name for part in status.parts if not part.healthy) if status else "all"
                )
                raise EmbeddedError(f"Headrace was not ready in time; still waiting for: {waiting}.")
            time.sleep(POLL_S)

    def _until(self, done: Callable[[], bool], timeout: float, sentence: str) -> None:
        deadline = time.monotonic() + timeout
        while not done():
            if time.monotonic() > deadline:
                raise EmbeddedError(sentence)
            time.sleep(POLL_S)

    def _anything_left(self) -> bool:
        """The lock is held, or the supervisor that we started has not taken it yet."""
        if self._supervisor is not None and self._supervisor.poll() is None:
            return True
        if self._supervisor is not None and self._supervisor.stdin is not None:
            self._supervisor.stdin.close()
        return self.running


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _exists(pid: int) -> bool:
    """Whether the process is there and not merely waiting to be reaped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
