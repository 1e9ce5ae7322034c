"""The modules that every request runs through, compiled by mypyc: `python -m deploy.embedded.native`.

What it makes is a copy of `services/` in which these modules stand as C extensions too, beside their source.
Processes that find the copy before the repository run it; all others run the source. A copy is found by a
digest of everything that it was made of, so what was compiled before a source was edited is not found again.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final

from deploy.embedded.configuration import REPOSITORY

#: Older copies beyond so many are removed, once no part was started from them for so long: one that runs may
#: still import from its copy.
KEPT_COPIES: Final = 3
_UNUSED_S: Final = 7 * 86_400.0
_COMPILE_S: Final = 900.0
_FAILED: Final = "failed"
PLAIN: Final = "The hot path runs as plain Python: {}."
_MODULE: Final = "deploy.embedded.native"

#: What is compiled: each group becomes one extension, and those after `frames` use it. Left out is what is no
#: part of a usual request, and what relies on annotations at run time, such as parsed bodies. Protocols that
#: class attributes may be None of stand in modules left out: mypyc would forget that default. So does
#: `codecs/numbers`: simdjson's types say bytes of what is another buffer, and mypyc would insist on them.
GROUPS: Final = {
    "frames": (
        "services/common/assignment.py",
        *(
            f"services/common/frames/{name}.py"
            for name in (
                "client", "client_connection", "connection", "control", "deadlines", "detached",
                "header_blocks", "local", "messages", "outbound", "outbox", "peer", "server_connection",
                "turn", "wire",
            )
        ),
    ),
    "eventlog": tuple(f"services/common/eventlog/{name}.py" for name in ("cursor", "framing", "spool")),
    "router": tuple(
        f"services/router/{name}.py"
        for name in (
            "balancing", "call", "dispatch", "endpoints", "group", "hedging", "outliers", "retry_budget",
            "routed", "routing_table", "span", "stats",
        )
    ),
    "worker": tuple(
        f"services/worker/{name}.py"
        for name in (
            "batch_queue", "batcher", "execution", "input_layout", "item", "loaded_model", "mapped_objects",
            "outcome", "padding", "prediction_log", "priorities", "record_columns", "replies", "run_time",
            "servicer", "serving", "shared_inputs", "stats", "tensors", "turn", "wire",
        )
    ),
    "gateway": tuple(
        f"services/gateway/{name}.py"
        for name in (
            "admission", "call", "codecs/compiled", "codecs/infer_forms", "codecs/tensors",
            "codecs/streamed", "codecs/v2_answers", "codecs/v2_forms", "datatypes",
            "dialects", "hot/deadlines", "hot/exchange", "hot/hardened", "hot/heads", "hot/pipeline",
            "hot/protocol", "hot/receiving", "infer_plans", "keys", "limiter", "oip_dialects", "plans",
            "predict", "reading", "router_client",
            "rpc/connection", "rpc/control", "rpc/exchange", "rpc/heads", "rpc/infer_stream", "rpc/sending",
            "rpc/statuses", "rpc/streams", "rpc/tasks", "signature", "speaking", "targets", "v2_plans",
        )
    ),
}  # fmt: skip


class NativeError(Exception):
    """Nothing was compiled; the text is one sentence that says why."""


def compiled(repository: Path = REPOSITORY) -> str:
    """Compile, unless that is done already; a sentence says what came of it. Nothing is raised: the source
    runs as well."""
    try:
        return f"The hot path is compiled: {build(repository)}."
    except (NativeError, OSError) as error:
        return PLAIN.format(error)


def find(repository: Path = REPOSITORY) -> Path | None:
    """The compiled copy of the sources as they are now; None where there is none."""
    copy = _home(repository) / digest(repository)
    if not (copy / "services").is_dir():
        return None
    with suppress(OSError):
        os.utime(copy)  # it is in use
    return copy


def build(repository: Path = REPOSITORY) -> Path:
    """Compile, unless that is done already. Raises NativeError."""
    home = _home(repository)
    home.mkdir(parents=True, exist_ok=True)
    with (home / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = find(repository)
        if done is not None:
            return done
        if reason := missing():
            raise NativeError(reason)
        with _workshop(home) as folder:
            # The digest is of what is copied, whatever is edited meanwhile.
            shutil.copytree(
                repository / "services", folder / "services", ignore=shutil.ignore_patterns("__pycache__")
            )
            target = home / digest(repository, services=folder / "services")
            try:
                _compile(repository, folder)
                _try_out(repository, folder)
            except NativeError as error:
                (home / _FAILED).write_text(f"{target.name} {error}")
                raise
            os.replace(folder, target)
        _forget_old(home)
        return target


def failure(repository: Path = REPOSITORY) -> str:
    """Why the present sources could not be compiled; empty where nobody tried, or it went well."""
    with suppress(OSError):
        tried, reason = (_home(repository) / _FAILED).read_text().split(" ", 1)
        if tried == digest(repository):
            return reason
    return ""


def digest(repository: Path = REPOSITORY, services: Path | None = None) -> str:
    """Of all that decides the outcome: sources, what they are typed by, Python, mypyc, the compiler."""
    seen = hashlib.sha256(repr((sys.version, sysconfig.get_platform(), _tools())).encode())
    seen.update(Path(__file__).read_bytes())
    sources = services or repository / "services"
    contracts = repository / "proto"
    for root, pattern in ((sources, "*.py"), (contracts, "*.pyi"), (contracts, "*.py")):
        for path in sorted(root.rglob(pattern)):
            content = path.read_bytes()
            seen.update(f"{path.relative_to(root)} {len(content)}\n".encode())
            seen.update(content)
    return seen.hexdigest()[:32]


def _home(repository: Path) -> Path:
    return repository / ".headrace" / "native"


@functools.cache
def _tools() -> tuple[str, ...]:
    """The compiler and mypyc, by their versions; empty texts where they are not there."""
    spec = importlib.util.find_spec("mypy")
    version = Path(spec.origin).with_name("version.py").read_text() if spec and spec.origin else ""
    command = [*_compiler(), "-dumpfullversion", "-dumpversion"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout  # noqa: S603 - the compiler of this Python
    except (OSError, subprocess.SubprocessError):
        said = ""
    return version, " ".join(_compiler()), said


def _compiler() -> list[str]:
    return (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()


def missing() -> str:
    """What compiling needs and is not here; empty where all of it is."""
    for module in ("mypyc", "setuptools"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    if shutil.which(_compiler()[0]) is None:
        return f"there is no C compiler ({_compiler()[0]})"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "the headers of Python are not installed"
    return ""


@contextmanager
def _workshop(home: Path) -> Iterator[Path]:
    """A folder of our own, gone afterwards unless it was renamed; the lock is held."""
    for left in home.glob(".building*"):
        shutil.rmtree(left, ignore_errors=True)
    folder = home / ".building"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _compile(repository: Path, folder: Path) -> None:
    """mypyc and the C compiler, in a process of their own: both leave traces in the one they run in."""
    log = folder.parent / "build.log"
    command = ["-m", _MODULE, "--compile", str(repository / "pyproject.toml")]
    with log.open("wb") as output:
        if _python(command, folder, (REPOSITORY,), output):
            raise NativeError(f"compiling failed; see {log}")
    shutil.rmtree(folder / "build", ignore_errors=True)


def _try_out(repository: Path, folder: Path) -> None:
    """Import every compiled module, from the copy."""
    log = folder.parent / "build.log"
    with log.open("ab") as output:
        if _python(["-c", _imports(GROUPS)], folder, (folder, repository / "proto"), output):
            raise NativeError(f"what was compiled cannot be imported; see {log}")


def _imports(groups: Mapping[str, Sequence[str]]) -> str:
    """A program that fails unless all of them are imported from what was compiled."""
    modules = [path.removesuffix(".py").replace("/", ".") for group in groups.values() for path in group]
    return "\n".join(f"import {module}\nassert {module}.__file__.endswith('.so')" for module in modules)


def install(site: Path) -> None:
    """For images: compile what is here of the sources below the present folder, and put it beside their
    copies in `site`, which modules are imported from. Raises NativeError, or ends the process."""
    groups = present(Path.cwd())
    if not groups:
        raise NativeError("nothing here is compiled")
    if reason := missing():
        raise NativeError(reason)
    _compile_here("pyproject.toml")
    for made in (*Path.cwd().glob("*.so"), *Path("services").absolute().rglob("*.so")):
        shutil.copy2(made, site / made.relative_to(Path.cwd()))
    if _python(["-c", _imports(groups)], site, (site,), sys.stderr.buffer):
        raise NativeError("what was compiled cannot be imported")


def present(folder: Path) -> dict[str, Sequence[str]]:
    """The groups of which the sources are below `folder`: an image has those of its service alone."""
    return {name: paths for name, paths in GROUPS.items() if all((folder / path).is_file() for path in paths)}


def _python(arguments: list[str], folder: Path, path: tuple[Path, ...], output: IO[bytes]) -> int:
    """Run Python in `folder`; its exit code."""
    try:
        done = subprocess.run(  # noqa: S603 - our own module
            [sys.executable, *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=_COMPILE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 1
    return done.returncode


def _forget_old(home: Path) -> None:
    copies = [path for path in home.iterdir() if path.is_dir() and not path.name.startswith(".")]
    used = {path: path.stat().st_mtime for path in copies}
    for old in sorted(copies, key=used.__getitem__, reverse=True)[KEPT_COPIES:]:
        if time.time() - used[old] > _UNUSED_S:
            shutil.rmtree(old, ignore_errors=True)


def _compile_here(configuration: str) -> None:
    """Compile what lies below the present folder, in place. Ends the process where it cannot."""
    from mypyc.build import mypycify  # noqa: PLC0415 - only this process needs it
    from setuptools import setup  # type: ignore[import-untyped]  # noqa: PLC0415

    sys.path.insert(0, os.getcwd())
    groups: list[tuple[list[str], str | None]] = []
    groups += [(list(paths), f"headrace_{name}") for name, paths in present(Path.cwd()).items()]
    # From its cache mypy gives classes without their bodies, and what is compiled then lacks their defaults.
    options = ["--config-file", configuration, "--cache-dir", os.devnull]
    paths = [path for group, _ in groups for path in group]
    extensions = mypycify([*options, *paths], opt_level="2", debug_level="0", separate=groups)
    jobs = str(min(len(GROUPS), os.cpu_count() or 1))
    setup(
        name="headrace-native",
        packages=[],
        py_modules=[],
        ext_modules=extensions,
        script_args=["build_ext", "--inplace", "-j", jobs],
    )


def main() -> int:
    """Build, and say in one sentence what came of it. Never fails, since the source runs as well; but for an
    image, which is what it was said to be or none."""
    parser = argparse.ArgumentParser(
        prog="deploy.embedded.native", description="Compile the hot path with mypyc."
    )
    parser.add_argument("--compile", metavar="CONFIGURATION", help=argparse.SUPPRESS)
    parser.add_argument("--into", metavar="SITE", type=Path, help="for images: compile in place, copy there")
    parser.add_argument(
        "--path", action="store_true", help="say where the copy is; fails where there is none"
    )
    arguments = parser.parse_args()
    if arguments.compile:
        _compile_here(arguments.compile)
        return 0
    if arguments.into:
        try:
            install(arguments.into.absolute())
        except NativeError as error:
            sys.exit(f"The hot path was not compiled: {error}.")
        return 0
    if arguments.path:
        found = find()
        print(found or "")  # noqa: T201 - a command
        return 0 if found else 1
    if os.environ.get("HEADRACE_NATIVE") != "0":
        print(compiled())  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
