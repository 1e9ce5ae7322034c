"""`headrace batch`, `headrace files` and `headrace dlq`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from headrace_client.batches import Batch, StoredFile
from headrace_client.client import DEFAULT_URL, Headrace
from headrace_client.commands import (
    AsJson,
    CommandFailed,
    Key,
    Url,
    connected,
    pair_of,
    print_json,
    print_table,
    upload_bar,
    value_of,
)

batch_app = typer.Typer(help="Jobs over many rows.", no_args_is_help=True)
files_app = typer.Typer(help="Files that the platform keeps, as inputs of jobs.", no_args_is_help=True)
dlq_app = typer.Typer(help="Records that could not be handled.", no_args_is_help=True)

Output = Annotated[Path | None, typer.Option("--output", "-o", help="A file; otherwise standard output.")]
Partial = Annotated[bool, typer.Option("--partial", help="What is finished so far.")]


# Jobs.


@batch_app.command("submit")
def submit(  # noqa: PLR0913 - options of a command line
    model: str,
    input: Annotated[  # noqa: A002 - the option's name
        str | None,
        typer.Option(help="A local file (uploaded first), store://…, s3://… or file://… on the server."),
    ] = None,
    *,
    inputs: Annotated[str | None, typer.Option(help="Few rows as JSON, @file or -.")] = None,
    version: Annotated[str | None, typer.Option(help="A version or an alias.")] = None,
    input_format: Annotated[
        str | None, typer.Option(help="jsonl, csv, parquet, arrow or images; otherwise by the name.")
    ] = None,
    output_format: Annotated[str | None, typer.Option(help="jsonl or parquet.")] = None,
    priority: Annotated[str | None, typer.Option(help="high, normal or low.")] = None,
    callback_url: Annotated[str | None, typer.Option(help="Told when the job has ended.")] = None,
    metadata: Annotated[list[str] | None, typer.Option(help="name=value; may be repeated.")] = None,
    exclude_from: Annotated[
        list[str] | None, typer.Option(help="drift or experiments; may be repeated.")
    ] = None,
    expires_in_s: Annotated[int | None, typer.Option(help="Otherwise a day.")] = None,
    idempotency_key: Annotated[str | None, typer.Option(help="The same key again is the same job.")] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Follow it to its end; exit code 1 unless all rows have answers.")
    ] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Start a job; prints its id."""
    if (input is None) == (inputs is None):
        raise CommandFailed("Give --input or --inputs, one of them.")
    with connected(url, key) as client:
        batch_id = client.batches.submit(
            model,
            None if inputs is None else value_of(inputs, "--inputs"),
            input_uri=None if input is None else _uri_of(client, input),
            version=version,
            input_format=input_format,
            output_format=output_format,  # type: ignore[arg-type]  # the server says what is wrong
            priority=priority,
            callback_url=callback_url,
            metadata=dict(pair_of(text, "--metadata") for text in metadata) if metadata else None,
            exclude_from=exclude_from,
            expires_in_s=expires_in_s,
            idempotency_key=idempotency_key,
        )
        typer.echo(batch_id)
        if watch:
            _follow(client, batch_id)


@batch_app.command("status")
def status(batch_id: str, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """How far a job is."""
    with connected(url, key) as client:
        print_json(client.batches.get(batch_id).body)


@batch_app.command("list")
def list_batches(
    model: Annotated[str | None, typer.Option(help="Only of this model.")] = None,
    status: Annotated[str | None, typer.Option(help="Only in this state.")] = None,
    limit: Annotated[int, typer.Option(help="So many at most.")] = 50,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Jobs, newest first."""
    with connected(url, key) as client:
        found = list(islice(client.batches.list(model=model, status=status), limit))
    if as_json:
        print_json([batch.body for batch in found])
        return
    rows = [
        (
            batch.id,
            f"{batch.model}/{batch.version}",
            batch.status,
            _done(batch),
            f"{batch.failed:,}",
            "" if batch.rows_per_s is None else f"{batch.rows_per_s:,.0f}",
        )
        for batch in found
    ]
    print_table(("id", "model", "status", "rows", "failed", "rows/s"), rows)


@batch_app.command("watch")
def watch(batch_id: str, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Follow a job to its end; exit code 1 unless it completes and no row failed."""
    with connected(url, key) as client:
        _follow(client, batch_id)


@batch_app.command("results")
def results(
    batch_id: str,
    output: Output = None,
    format: Annotated[str, typer.Option(help="jsonl or parquet.")] = "jsonl",  # noqa: A002 - the option's name
    join: Annotated[
        Path | None, typer.Option(help="JSON Lines to print with what became of each, by custom_id.")
    ] = None,
    partial: Partial = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """The answers, in the order of the input."""
    with connected(url, key) as client:
        if join is not None:
            if format != "jsonl":
                raise CommandFailed("--join gives JSON Lines only.")
            _print_joined(client, batch_id, join, output, partial=partial)
        elif output is not None:
            size = client.batches.download(batch_id, output, format=format, partial=partial)  # type: ignore[arg-type]  # the server says
            Console(stderr=True).print(f"{output}: {size:,} bytes", highlight=False, markup=False)
        elif format != "jsonl":
            raise CommandFailed(f"{format} is for a file: give --output.")
        else:
            _print_lines(client.batches.results(batch_id, partial=partial))


@batch_app.command("errors")
def errors(batch_id: str, partial: Partial = False, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """The rows that failed, and why."""
    with connected(url, key) as client:
        _print_lines(client.batches.errors(batch_id, partial=partial))


@batch_app.command("cancel")
def cancel(batch_id: str, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Do no more of a job; what was done stays."""
    with connected(url, key) as client:
        typer.echo(client.batches.cancel(batch_id).status)


# Files.


@files_app.command("upload")
def upload(
    path: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    purpose: Annotated[str, typer.Option(help="data, or batch for OpenAI batches.")] = "data",
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Upload a file; prints its id and the address that `batch submit --input` takes."""
    with connected(url, key) as client, upload_bar(path.name) as progress:
        kept = client.files.upload(path, purpose=purpose, progress=progress)
    if as_json:
        print_json(_file_json(kept))
    else:
        typer.echo(f"{kept.id} {kept.uri}")


@files_app.command("list")
def list_files(
    purpose: Annotated[str | None, typer.Option(help="Only for this purpose.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Files of this key, newest first."""
    with connected(url, key) as client:
        found = list(client.files.list(purpose=purpose))
    if as_json:
        print_json([_file_json(one) for one in found])
        return
    rows = [
        (one.id, one.filename, one.purpose, f"{one.size:,}", f"{one.created_at:%Y-%m-%d %H:%M}")
        for one in found
    ]
    print_table(("id", "name", "purpose", "bytes", "made"), rows)


@files_app.command("download")
def download(
    file_id: str,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Otherwise the file's name.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Write a file here."""
    with connected(url, key) as client:
        to = output or Path(client.files.get(file_id).filename)
        size = client.files.download(file_id, to)
    Console(stderr=True).print(f"{to}: {size:,} bytes", highlight=False, markup=False)


@files_app.command("delete")
def delete(file_id: str, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Remove a file."""
    with connected(url, key) as client:
        client.files.delete(file_id)


# Dead letters.


@dlq_app.command("list")
def list_queues(url: Url = DEFAULT_URL, key: Key = None, as_json: AsJson = False) -> None:
    """Every queue, and how much waits in it."""
    with connected(url, key) as client:
        found = client.dead_letters.queues()
    if as_json:
        print_json(found)
        return
    for queue in found:
        typer.echo(f"{queue['waiting']:>8}  {queue['topic']}")


@dlq_app.command("show")
def show(
    topic: str,
    limit: Annotated[int, typer.Option(help="So many at most.")] = 20,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """The oldest records that wait, with reason and origin: a JSON line each."""
    with connected(url, key) as client:
        _print_lines(client.dead_letters.show(topic, limit=limit))


@dlq_app.command("replay")
def replay(
    topic: str,
    limit: Annotated[int, typer.Option(help="So many at most.")] = 1000,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Send records back to the topics they came from."""
    with connected(url, key) as client:
        typer.echo(f"{client.dead_letters.replay(topic, limit=limit)} replayed")


def _uri_of(client: Headrace, given: str) -> str:
    if "://" in given:
        return given
    path = Path(given)
    if not path.is_file():
        raise CommandFailed(f"There is no file {given}.")
    with upload_bar(path.name) as progress:
        return client.files.upload(path, progress=progress).uri


def _follow(client: Headrace, batch_id: str) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    last: Batch | None = None
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(batch_id, total=None)
        for last in client.batches.watch(batch_id):
            bar.update(
                task, total=last.total, completed=last.completed + last.failed, description=last.status
            )
    if last is None:
        return
    why = f"; why: headrace batch errors {batch_id}" if last.failed else ""
    told = f"{last.status}: {_done(last)} rows, {last.failed:,} failed{why}"
    console.print(told, highlight=False, markup=False, soft_wrap=True)
    if last.status != "completed":
        reason = (last.error or {}).get("message", "")
        raise CommandFailed(f"{batch_id} is {last.status}. {reason}".strip())
    if last.failed:
        raise typer.Exit(1)


def _print_joined(
    client: Headrace, batch_id: str, inputs: Path, output: Path | None, *, partial: bool
) -> None:
    try:
        with inputs.open("rb") as lines, ExitStack() as closing:
            sink = sys.stdout if output is None else closing.enter_context(output.open("w", encoding="utf-8"))
            rows = (json.loads(line) for line in lines if line.strip())
            _print_lines(client.batches.join(batch_id, rows, partial=partial), sink)
    except (OSError, ValueError, AttributeError) as error:
        raise CommandFailed(f"{inputs}: {error}") from None


def _file_json(file: StoredFile) -> dict[str, Any]:
    return {"id": file.id, "uri": file.uri, "filename": file.filename, "bytes": file.size}


def _done(batch: Batch) -> str:
    done = batch.completed + batch.failed
    return f"{done:,}" if batch.total is None else f"{done:,}/{batch.total:,}"


def _print_lines(items: Iterable[Any], sink: TextIO | None = None) -> None:
    for item in items:
        (sink or sys.stdout).write(json.dumps(item, ensure_ascii=False) + "\n")
