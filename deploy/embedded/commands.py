"""The verbs of the command line, each returning its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping

from rich.console import Console

from deploy.embedded import log_files, view
from deploy.embedded.blueprint import python_path
from deploy.embedded.configuration import REPOSITORY, Configuration
from deploy.embedded.process import EmbeddedError
from deploy.embedded.stack import AlreadyRuns, Stack

EXAMPLES_TIMEOUT_S = 300.0


def up(environment: Mapping[str, str], *, examples: bool = True) -> int:
    """Start, wait, register the examples, say what to try. 0 also where it runs already."""
    console = Console()
    stack = Stack(environment)
    began = time.monotonic()
    try:
        with view.progress(console) as progress:
            stack.start(progress=progress)
    except AlreadyRuns as runs:
        console.print(str(runs), highlight=False, soft_wrap=True)
        return 0
    if examples:
        register_examples(console, stack, environment)
    told = stack.status()
    if told is None:
        raise EmbeddedError(f"The stack ended right after its start; see {stack.configuration.logs}.")
    view.welcome(console, stack, told, time.monotonic() - began)
    return 0


def register_examples(console: Console, stack: Stack, environment: Mapping[str, str]) -> None:
    """Run `python -m examples.register` against the public REST API; it skips what is registered already.

    Raises EmbeddedError where that fails; the stack goes on running.
    """
    log = stack.configuration.logs / "examples.log"
    command = [sys.executable, "-m", "examples.register", "--url", stack.rest_url]
    command += ["--key-file", str(stack.configuration.admin_key_file)]
    with console.status("registering the example models"), log.open("wb") as output:
        try:
            done = subprocess.run(  # noqa: S603 - our own module
                command,
                cwd=REPOSITORY,
                env={**environment, "PYTHONPATH": python_path()},
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=EXAMPLES_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise EmbeddedError(
                f"Registering the examples took over {EXAMPLES_TIMEOUT_S:.0f} s; see {log}."
            ) from None
    if done.returncode != 0:
        last = " | ".join(log.read_text(errors="replace").strip().splitlines()[-1:])
        raise EmbeddedError(f"The stack runs, but registering the examples failed ({last}); see {log}.")


def down(environment: Mapping[str, str]) -> int:
    """Drain and stop; 0 also where nothing ran."""
    console = Console()
    stack = Stack(environment)
    with view.progress(console) as progress:
        stopped = stack.stop(progress=progress)
    what = f"Headrace is stopped; its data stays in {stack.home}." if stopped else "Headrace is not running."
    console.print(what, highlight=False, soft_wrap=True)
    return 0


def status(environment: Mapping[str, str]) -> int:
    """The table; 0 only where every part is healthy."""
    console = Console()
    stack = Stack(environment)
    told = stack.status()
    if told is None:
        console.print("Headrace is not running. Start it with: make up")
        return 1
    if not _alive(told.pid):
        console.print("The supervisor of Headrace was killed; what it started ends now. Start anew: make up")
        return 1
    console.print(f"Headrace is {told.phase.value}: {stack.rest_url}", highlight=False)
    console.print(view.table(told))
    if stack.configuration.joint:
        console.print(_together(stack.configuration), highlight=False, soft_wrap=True)
    for warning in told.warnings:
        console.print(f"[yellow]Note:[/] {warning}", highlight=False)
    return 0 if told.healthy else 1


def _together(configuration: Configuration) -> str:
    """Which parts of the table share processes, and what else decides about that."""
    several = f"as {configuration.fronts} processes" if configuration.fronts > 1 else "as one process"
    guests = "small models run there" if configuration.guests else "models run in workers only"
    return (
        f"Gateway and router run together, {several} (HEADRACE_ROUTER, HEADRACE_FRONTS); {guests} "
        "(HEADRACE_GUESTS)."
    )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's
    return True


def logs(environment: Mapping[str, str], part: str | None, *, follow: bool) -> int:
    """The last lines, then, with `follow`, the new ones until interrupted."""
    console = Console()
    configuration = Configuration.read(environment)
    folder = configuration.logs
    if part == "router" and configuration.joint:
        part = "gateway"  # which it shares its processes with, and so does a guest
    chosen = log_files.choose(folder, part)
    if not chosen:
        known = ", ".join(log.stem for log in log_files.choose(folder, None)) or "none"
        what = f"No log of {part}" if part else "No logs"
        raise EmbeddedError(f"{what} in {folder} (there are: {known}).")
    several = len(chosen) > 1
    view.show_lines(console, log_files.tail(chosen), prefix=several)
    if follow:
        view.show_lines(console, log_files.follow(folder, part), prefix=several)
    return 0
