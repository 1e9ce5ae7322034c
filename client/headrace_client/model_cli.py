"""`headrace models`: pushing versions, and what there is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from headrace_client.client import DEFAULT_URL
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
from headrace_client.errors import NotFound

models_app = typer.Typer(help="Models and their versions.", no_args_is_help=True)


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
    console, version = Console(), pushed["version"]
    console.print(f"{name} version [bold]{version}[/] ({pushed['artifact_digest'][:19]})", highlight=False)
    console.print(f"  {taken_and_given(pushed['signature'])}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"  serve it: headrace deploy {name} {version}=100", highlight=False, soft_wrap=True)


@models_app.command("list")
def list_models(url: Url = DEFAULT_URL, key: Key = None, as_json: AsJson = False) -> None:
    """All models with their aliases."""
    with connected(url, key) as client:
        found = list(client.models())
    if as_json:
        print_json(found)
        return
    rows = []
    for model in found:
        aliases = ", ".join(f"{alias} → {version}" for alias, version in model["aliases"].items())
        rows.append((model["name"], aliases, model["description"]))
    print_table(("model", "aliases", "description"), rows)


@models_app.command("show")
def show(name: str, url: Url = DEFAULT_URL, key: Key = None, as_json: AsJson = False) -> None:
    """One model: its versions, what they take and give, and how they are served."""
    with connected(url, key) as client:
        model, versions = client.model(name), client.versions(name)
        try:
            deployment = client.deployment(name)
        except NotFound:
            deployment = None
    if as_json:
        print_json({**model, "versions": versions, "deployment": deployment})
        return
    weights = {it["version"]: it["weight"] for it in deployment["versions"]} if deployment else {}
    names: dict[str, list[str]] = {}
    for alias, version in model["aliases"].items():
        names.setdefault(version, []).append(alias)
    rows = [
        (
            one["version"],
            ", ".join(names.get(one["version"], ())),
            f"{weights[one['version']]:g}%" if one["version"] in weights else "",
            one["created_at"][:10],
            ", ".join(f"{metric} {value:g}" for metric, value in one["metrics"].items()),
            taken_and_given(one["signature"]),
        )
        for one in versions
    ]
    print_table(("version", "aliases", "traffic", "pushed", "metrics", "takes → gives"), rows)


@models_app.command("alias")
def set_alias(
    name: str,
    alias: Annotated[str, typer.Argument(help="ALIAS=VERSION: champion=2")],
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Let an alias stand for a version; who asks for the alias gets it from now on."""
    with connected(url, key) as client:
        called, version = pair_of(alias, "An alias")
        client.set_alias(name, called, version)
    Console().print(f"{name}: {called} → {version}", highlight=False)


@models_app.command("delete")
def delete(
    name: str,
    version: Annotated[str | None, typer.Option(help="Only this version; no other gets its name.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Delete a model with all of its versions, or one version; nothing that is served."""
    with connected(url, key) as client:
        if version is None:
            client.delete_model(name)
        else:
            client.delete_version(name, version)
    what = name if version is None else f"{name} version {version}"
    Console().print(f"{what} is deleted.", highlight=False, markup=False)


def split_of(deployment: dict[str, Any]) -> str:
    """`1 90%, 2 10%`."""
    return ", ".join(f"{it['version']} {it['weight']:g}%" for it in deployment["versions"])


def taken_and_given(signature: dict[str, Any]) -> str:
    """`X FP32[-1,3] → label INT64[-1]`; -1 is any length."""
    return " → ".join(
        ", ".join(
            f"{one['name']} {one['datatype']}[{','.join(map(str, one['shape']))}]" for one in signature[side]
        )
        for side in ("inputs", "outputs")
    )
