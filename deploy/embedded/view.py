"""What `up`, `down`, `status` and `logs` show in a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from deploy.embedded.configuration import REPOSITORY
from deploy.embedded.stack import Progress, Stack
from deploy.embedded.status import PartStatus, StackStatus, State

_COLOURS = {
    State.READY: "green",
    State.EXTERNAL: "cyan",
    State.UNREADY: "yellow",
    State.RESTARTING: "yellow",
    State.HELD: "yellow",
    State.STOPPED: "dim",
}
_PART_COLOURS = (
    "cyan",
    "magenta",
    "green",
    "yellow",
    "blue",
    "bright_cyan",
    "bright_magenta",
    "bright_green",
)


def duration(seconds: float) -> str:
    """`42 s`, `3 min`, `5 h`, `2 d`."""
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{int(seconds) // size} {unit}"
    return f"{int(seconds) // 86_400} d"


def table(status: StackStatus) -> Table:
    """The table of `headrace status`."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("part", "state", "pid", "ports", "uptime", "restarts", ""):
        shown.add_column(column, justify="right" if column in {"pid", "uptime", "restarts"} else "left")
    for part in status.parts:
        alive = part.pid is not None and part.started_at is not None
        shown.add_row(
            part.name,
            Text(part.state.value, style=_COLOURS.get(part.state, "white")),
            str(part.pid or ""),
            ", ".join(map(str, part.ports)),
            duration(time.time() - (part.started_at or 0)) if alive else "",
            str(part.restarts) if part.state is not State.EXTERNAL else "",
            Text(part.detail, style="dim", overflow="ellipsis", no_wrap=True),
        )
    return shown


@contextmanager
def progress(console: Console) -> Iterator[Progress]:
    """Shows every part as it changes: in place on a terminal, one line per change elsewhere."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    with Live(console=console, refresh_per_second=10, transient=True) as live:
        yield lambda status: live.update(_live(status))


def _live(status: StackStatus) -> RenderableType:
    rows = Table.grid(padding=(0, 2))
    for part in status.parts:
        rows.add_row(
            _mark(part), part.name, Text(_words(part), style="dim", overflow="ellipsis", no_wrap=True)
        )
    return Group(rows)


_SPINNER = Spinner("dots")


def _mark(part: PartStatus) -> RenderableType:
    if part.healthy:
        return Text("✓", style="green")
    if part.state in {State.WAITING, State.STOPPED}:
        return Text("·", style="dim")
    return _SPINNER


def _words(part: PartStatus) -> str:
    return f"{part.state.value}: {part.detail}" if part.detail else part.state.value


class _Lines:
    """Progress for a log file: one line when a part's state changes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._seen: dict[str, State] = {}

    def __call__(self, status: StackStatus) -> None:
        for part in status.parts:
            # What is ready when the watching starts is no news.
            before = self._seen.get(part.name, part.state if part.healthy else State.WAITING)
            if before is not part.state:
                self._console.print(f"{part.name}: {_words(part)}", highlight=False, markup=False)
            self._seen[part.name] = part.state


def welcome(console: Console, stack: Stack, status: StackStatus, seconds: float) -> None:
    """Addresses and three commands to try."""
    console.print(f"\n[bold green]Headrace is ready[/] after {seconds:.0f} s.")
    for warning in status.warnings:
        console.print(f"[yellow]Note:[/] {warning}", highlight=False)
    facts = Table.grid(padding=(0, 2))
    facts.add_row("REST", f"{stack.rest_url}   (OpenAPI: {stack.rest_url}/docs)")
    facts.add_row("gRPC", stack.grpc_address)
    facts.add_row("Admin key", str(stack.configuration.admin_key_file))
    facts.add_row("Logs", f"{stack.configuration.logs}   (make logs)")
    console.print(facts, highlight=False)
    console.print("\nThree commands to try:", style="bold")
    for command in commands(stack):
        # soft_wrap: a line that is broken for display cannot be pasted.
        console.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)


def commands(stack: Stack) -> list[str]:
    """What a newcomer pastes first: a prediction, the tour of an experiment, a change of traffic."""
    key_file = stack.configuration.admin_key_file
    usual = stack.rest_url == "http://127.0.0.1:8000" and key_file == REPOSITORY / ".headrace" / "admin.key"
    elsewhere = "" if usual else f" --url {stack.rest_url} --key-file {key_file}"
    by_key = "" if usual else f' --url {stack.rest_url} --key "$(cat {key_file})"'
    bearer = f'-H "Authorization: Bearer $(cat {key_file})"'
    return [
        f"curl -s {stack.rest_url}/v1/predict {bearer} -d @examples/cancer_request.json",
        f".venv/bin/python -m examples.traffic{elsewhere}",
        f".venv/bin/headrace deploy cancer 1=50 2=50{by_key}",
    ]


def show_lines(console: Console, lines: Iterator[tuple[str, str]], *, prefix: bool) -> None:
    """Log lines, each with its part in a colour of its own where several are shown."""
    colours: dict[str, str] = {}
    for part, line in lines:
        colour = colours.setdefault(part, _PART_COLOURS[len(colours) % len(_PART_COLOURS)])
        head = Text(f"{part:<10} ", style=colour) if prefix else Text()
        console.print(head + Text(line), soft_wrap=True)
