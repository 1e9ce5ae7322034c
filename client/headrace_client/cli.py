"""The `headrace` command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from headrace_client.batch_cli import batch_app, dlq_app, files_app
from headrace_client.client import DEFAULT_URL
from headrace_client.commands import (
    AsJson,
    Attributes,
    CommandFailed,
    Key,
    Url,
    attributes_of,
    connected,
    pair_of,
    print_json,
    upload_bar,
    value_of,
)
from headrace_client.errors import HeadraceError
from headrace_client.experiment_cli import experiments_app, rollouts_app

app = typer.Typer(help="Headrace: serve models, split their traffic, watch them.", no_args_is_help=True)
models_app = typer.Typer(help="Models and their versions.", no_args_is_help=True)
keys_app = typer.Typer(help="API keys.", no_args_is_help=True)
app.add_typer(models_app, name="models")
app.add_typer(keys_app, name="keys")
app.add_typer(experiments_app, name="experiments")
app.add_typer(rollouts_app, name="rollouts")
app.add_typer(batch_app, name="batch")
app.add_typer(files_app, name="files")
app.add_typer(dlq_app, name="dlq")


def main() -> None:
    """Entry of the console script."""
    try:
        app()
    except HeadraceError as error:
        about = [f"field {error.field}"] if error.field else []
        about += [error.code] if error.code else []
        about += [f"request {error.request_id}"] if error.request_id else []
        _refuse(error.message + (f" ({', '.join(about)})" if about else ""))
    except CommandFailed as failure:
        _refuse(str(failure))


def _refuse(sentence: str) -> None:
    sys.stderr.write(f"headrace: {sentence}\n")
    sys.exit(1)


# The stack on this machine.


def _embedded(*arguments: str) -> None:
    repository = _repository()
    if repository is None:
        raise CommandFailed(
            "The embedded stack is part of the repository: run this in a checkout of Headrace."
        )
    command = [sys.executable, "-m", "deploy.embedded", *arguments]
    done = subprocess.run(command, cwd=repository, check=False)  # noqa: S603 - our own module
    raise typer.Exit(done.returncode)


def _repository() -> Path | None:
    own = Path(__file__).resolve().parents[2]
    for folder in (Path.cwd(), *Path.cwd().parents, own):
        if (folder / "deploy" / "embedded" / "__main__.py").is_file():
            return folder
    return None


@app.command()
def up() -> None:
    """Start the platform on this machine and wait until it is ready."""
    _embedded("up")


@app.command()
def down() -> None:
    """Stop it; data stays."""
    _embedded("down")


@app.command()
def status() -> None:
    """What runs; exit code 0 only if all is healthy."""
    _embedded("status")


@app.command()
def logs(
    part: Annotated[str | None, typer.Argument(help="gateway, router, worker-0, postgres, …")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is written.")] = False,
) -> None:
    """What the parts wrote."""
    _embedded("logs", *(["--follow"] if follow else []), *([part] if part else []))


# Models.


@models_app.command("push")
def push(  # noqa: PLR0913 - options of a command line
    name: str,
    files: Annotated[list[Path], typer.Argument(exists=True, help="Files, or a folder of them.")],
    *,
    version: Annotated[str | None, typer.Option(help="Otherwise the next number.")] = None,
    description: str = "",
    backend: Annotated[str | None, typer.Option(help="Otherwise by the files.")] = None,
    metrics: Annotated[str | None, typer.Option(help='JSON, or @file: {"accuracy": 0.97}')] = None,
    feature_names: Annotated[
        str | None, typer.Option(help="Columns of the first input, separated by commas, or @file (JSON).")
    ] = None,
    tag: Annotated[list[str] | None, typer.Option(help="name=value; may be repeated.")] = None,
    alias: Annotated[str | None, typer.Option(help="Let this alias stand for the new version.")] = None,
    input_name: Annotated[str | None, typer.Option(help="The input that --feature-names is about.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Upload a new version of a model; a new model is created."""
    metadata: dict[str, Any] = {}
    if backend:
        metadata["backend"] = backend
    if metrics:
        metadata["metrics"] = value_of(metrics, "--metrics")
    if tag:
        metadata["tags"] = dict(pair_of(text, "--tag") for text in tag)
    if feature_names:
        if input_name is None:
            raise CommandFailed(
                "--feature-names needs --input-name: the model's input that has these columns."
            )
        is_json = feature_names[0] in "@["
        columns = value_of(feature_names, "--feature-names") if is_json else feature_names.split(",")
        metadata["signature"] = {"inputs": [{"name": input_name, "columns": columns}]}
    with connected(url, key) as client, upload_bar(name) as progress:
        pushed = client.push_model(
            name, files, version=version, description=description, metadata=metadata, progress=progress
        )
    if alias:
        with connected(url, key) as client:
            client.set_alias(name, alias, pushed["version"])
    Console().print(
        f"{name} version [bold]{pushed['version']}[/] ({pushed['artifact_digest'][:19]})", highlight=False
    )


@models_app.command("list")
def list_models(url: Url = DEFAULT_URL, key: Key = None, as_json: AsJson = False) -> None:
    """All models with their aliases."""
    with connected(url, key) as client:
        found = list(client.models())
    if as_json:
        print_json(found)
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("model", "aliases", "description"):
        table.add_column(column)
    for model in found:
        aliases = ", ".join(f"{alias} → {version}" for alias, version in model["aliases"].items())
        table.add_row(model["name"], aliases, model["description"])
    Console().print(table)


@app.command()
def deploy(
    name: str,
    shares: Annotated[list[str], typer.Argument(help="VERSION=PERCENT …, 100 in sum: 1=90 2=10")],
    pool: Annotated[str | None, typer.Option(help="Pool of workers.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Serve a model by these versions."""
    weights = dict(_share(text) for text in shares)
    options: dict[str, Any] = {"pool": pool} if pool else {}
    with connected(url, key) as client:
        deployed = client.deploy(name, weights, **options)
    if as_json:
        print_json(deployed)
        return
    split = ", ".join(f"{it['version']} {it['weight']:g}%" for it in deployed["versions"])
    Console().print(f"{name}: {split} (revision {deployed['revision']})", highlight=False)


@app.command()
def predict(
    model: str,
    inputs: Annotated[str, typer.Option(help="JSON, @file or -: rows, columns or a tensor.")],
    *,
    user: Annotated[str | None, typer.Option(help="Keeps a user on one version.")] = None,
    session: Annotated[str | None, typer.Option(help="For experiments that assign sessions.")] = None,
    attribute: Attributes = None,
    version: Annotated[str | None, typer.Option(help="A version or an alias.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """One prediction."""
    with connected(url, key) as client:
        answer = client.predict(
            model,
            value_of(inputs, "--inputs"),
            user_id=user,
            session_id=session,
            attributes=attributes_of(attribute),
            version=version,
        )
    print_json(
        {name: getattr(answer, name) for name in answer.__slots__ if getattr(answer, name) is not None}
    )


@keys_app.command("create")
def create_key(
    name: str,
    scope: Annotated[list[str] | None, typer.Option(help="predict, read or admin; may be repeated.")] = None,
    rate: Annotated[float, typer.Option(help="Requests per second; 0: no limit.")] = 0.0,
    burst: Annotated[int, typer.Option(help="Requests at once; 0: one second's worth.")] = 0,
    model: Annotated[list[str] | None, typer.Option(help="Only these models; may be repeated.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """A new API key. It is shown this once: on standard output, everything else on standard error."""
    with connected(url, key) as client:
        made = client.create_key(
            name, tuple(scope or ("predict",)), rate_per_second=rate, burst=burst, models=tuple(model or ())
        )
    Console(stderr=True).print(
        f"{made.name}: {', '.join(made.scopes)}; keep it, it is not shown again:", highlight=False
    )
    typer.echo(made.key)


def _share(text: str) -> tuple[str, float]:
    version, weight = pair_of(text, "A share")
    try:
        return version, float(weight)
    except ValueError:
        raise CommandFailed(
            f"{text!r}: the weight must be a number of percent, such as {version}=90."
        ) from None
