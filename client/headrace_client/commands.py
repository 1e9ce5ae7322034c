"""What the commands share: where the gateway is, with which key, and how values are read and printed."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, NoReturn

import httpx
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from headrace_client.client import Headrace

Url = Annotated[str, typer.Option("--url", envvar="HEADRACE_URL", help="Where the gateway answers.")]
Key = Annotated[
    str | None,
    typer.Option(
        "--key", envvar="HEADRACE_API_KEY", help="API key; otherwise .headrace/admin.key.", show_default=False
    ),
]
Attributes = Annotated[
    list[str] | None,
    typer.Option("--attribute", help="name=value; may be repeated. 3 and true are no texts."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print what the server answered.")]

_SPAN = re.compile(r"(\d+)([dhm])", re.ASCII)
_SPANS = {"d": "days", "h": "hours", "m": "minutes"}


class CommandFailed(Exception):
    """One sentence for standard error, and exit code 1."""


@contextmanager
def connected(url: str, key: str | None) -> Iterator[Headrace]:
    try:
        client = Headrace(url, key or _kept_key())
    except httpx.InvalidURL as error:
        raise CommandFailed(f"--url {url} is no address: {error}.") from None
    except UnicodeEncodeError:
        raise CommandFailed("No API key has such letters: look at --key or HEADRACE_API_KEY.") from None
    with client:
        yield client


def _kept_key() -> str | None:
    """The key that `up` wrote, of the nearest folder upwards that has one."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        file = folder / ".headrace" / "admin.key"
        if file.is_file():
            try:
                return file.read_text().strip()
            except PermissionError:
                raise CommandFailed(
                    f"{file} belongs to somebody else: give --key or HEADRACE_API_KEY."
                ) from None
    return None


def value_of(text: str, option: str) -> Any:
    """JSON, @file or -. NaN and numbers past all floats, which Python would read, are none."""
    try:
        given = text
        if text == "-":
            given = sys.stdin.read()
        elif text.startswith("@"):
            given = Path(text[1:]).read_text()
        return json.loads(given, parse_constant=_no_number, parse_float=_finite)
    except OSError as error:
        raise CommandFailed(f"{option}: {text[1:]} cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise CommandFailed(f"{option} is not JSON: {error}.") from None


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"it has no {text}")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)


def pair_of(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")  # a value may have more of them
    if not equals or not name:
        raise CommandFailed(f"{option} {text!r} must look like name=value.")
    return name, value


def moment_of(text: str, option: str) -> datetime:
    """`30d`, `12h` or `45m` from now, or a date or time as ISO 8601 writes it, in UTC unless it says more."""
    try:
        if span := _SPAN.fullmatch(text):
            return datetime.now(UTC) + timedelta(**{_SPANS[span[2]]: int(span[1])})
        moment = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise CommandFailed(
            f"{option} {text!r} must look like 30d, 12h, 45m, 2027-01-31 or 2027-01-31T12:00:00Z."
        ) from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def share_of(percent: float) -> float:
    """With the digits that were written and no others, which the server would refuse: 1.1 / 100 is
    0.011000000000000001."""
    return float(Decimal(str(percent)) / 100)


def percent_of(share: float) -> str:
    """A share as people read it: `0.5%`."""
    return f"{100 * share:g}%"


def attributes_of(given: Sequence[str] | None) -> dict[str, Any] | None:
    """Attributes of a request: a value that reads as a number or truth value in JSON is one."""
    return {
        name: _scalar(value) for name, value in (pair_of(text, "--attribute") for text in given or ())
    } or None


def _scalar(text: str) -> str | int | float | bool:
    try:
        value = json.loads(text, parse_constant=str)  # NaN is a text, as JSON has none
    except ValueError:
        return text
    return value if isinstance(value, int | float) else text


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """The first column, which other commands take, is never cut as long as the others can give way."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, no_wrap=place == 0)
    for row in rows:
        table.add_row(*row)
    Console().print(table, markup=False)


def print_json(value: Any) -> None:
    if not isinstance(value, dict):
        typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
        return
    # One line per field: an embedding of hundreds of numbers stays one line.
    lines = [f"  {json.dumps(name)}: {json.dumps(item, ensure_ascii=False)}" for name, item in value.items()]
    typer.echo("{\n" + ",\n".join(lines) + "\n}")


@contextmanager
def upload_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    # Where nobody watches, a bar leaves empty lines.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"pushing {name}", total=None)
        yield lambda sent, total: bar.update(task, completed=sent, total=total)
