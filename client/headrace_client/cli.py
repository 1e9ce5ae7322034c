"""The `headrace` command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from headrace_client.batch_cli import batch_app, dlq_app, files_app
from headrace_client.client import DEFAULT_URL, Headrace
from headrace_client.commands import (
    AsJson,
    Attributes,
    CommandFailed,
    Key,
    Url,
    attributes_of,
    connected,
    moment_of,
    pair_of,
    print_json,
    print_table,
    value_of,
)
from headrace_client.errors import ConnectionFailed, HeadraceError, NotFound, Unavailable
from headrace_client.experiment_cli import experiments_app, rollouts_app
from headrace_client.model_cli import models_app, split_of

app = typer.Typer(help="Headrace: serve models, split their traffic, watch them.", no_args_is_help=True)
keys_app = typer.Typer(help="API keys.", no_args_is_help=True)
app.add_typer(models_app, name="models")
app.add_typer(keys_app, name="keys")
app.add_typer(experiments_app, name="experiments")
app.add_typer(rollouts_app, name="rollouts")
app.add_typer(batch_app, name="batch")
app.add_typer(files_app, name="files")
app.add_typer(dlq_app, name="dlq")


#: Of a deployment, beside its versions.
_OPTIONS = (
    "pool", "batching", "balancing", "log_payloads", "default_timeout_ms",
    "fallback", "cache", "shadow", "hedging",
)  # fmt: skip


def main() -> None:
    """Entry of the console script."""
    try:
        app()
    except HeadraceError as error:
        about = [f"field {error.field}"] if error.field else []
        about += [error.code] if error.code else []
        about += [f"request {error.request_id}"] if error.request_id else []
        _refuse(error.message + (f" ({', '.join(about)})" if about else "") + _advice(error))
    except CommandFailed as failure:
        _refuse(str(failure))
    except OSError as error:  # of files that were named
        _refuse(f"{error.filename}: {error.strerror}." if error.filename else f"{error}")
    except json.JSONDecodeError:
        _refuse("The answer is no JSON: is what answers at --url a gateway of Headrace?")
    except ValueError as error:  # of what was given
        _refuse(f"{error}")


def _advice(error: HeadraceError) -> str:
    """What somebody new to it would want to be told beside the error."""
    if isinstance(error, ConnectionFailed):
        return " Does it run? `headrace status` says so, `headrace up` starts it here; --url names another."
    if isinstance(error, NotFound) and error.field == "model" and error.message.endswith("in service."):
        return " What was pushed is served once it is deployed: headrace deploy MODEL VERSION=100."
    if error.field in ("fallback.version", "shadow.version"):
        return f" Deploy with --no-{error.field.removesuffix('.version')} to let go of it."
    if isinstance(error, Unavailable) and error.message.startswith("no worker is ready for"):
        if "cannot be loaded" in error.message:
            return " So does `headrace logs worker-0` (load_failed)."
        return " If that lasts, it cannot be loaded, and `headrace logs worker-0` says why (load_failed)."
    return ""


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


# Serving.


@app.command()
def deploy(
    name: str,
    shares: Annotated[list[str], typer.Argument(help="VERSION=PERCENT …, 100 in sum: 1=90 2=10")],
    pool: Annotated[str | None, typer.Option(help="Pool of workers.")] = None,
    *,
    no_fallback: Annotated[bool, typer.Option("--no-fallback", help="Without the fallback so far.")] = False,
    no_shadow: Annotated[bool, typer.Option("--no-shadow", help="Without the shadow so far.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Serve a model by these versions. All else of its deployment stays as it is."""
    weights = dict(_share(text) for text in shares)
    with connected(url, key) as client:
        before = _deployed(client, name)
        dropped = {"fallback": no_fallback, "shadow": no_shadow}
        kept = {
            option: before[option]
            for option in _OPTIONS
            if before.get(option) is not None and not dropped.get(option)
        }
        options = kept | ({"pool": pool} if pool else {})
        deployed = client.deploy(name, weights, variants=_called(before, weights), **options)
    if as_json:
        print_json(deployed)
        return
    Console().print(f"{name}: {split_of(deployed)} (revision {deployed['revision']})", highlight=False)


def _deployed(client: Headrace, model: str) -> dict[str, Any]:
    """How `model` is deployed, empty where it is not: a PUT would set all of it back, without a word."""
    try:
        return client.deployment(model)
    except NotFound:
        return {}


def _called(deployed: dict[str, Any], weights: Iterable[str]) -> dict[str, str]:
    """Those of `weights`, versions and aliases, that are called otherwise than their version, and how."""
    called = {it["version"]: it.get("variant") or it["version"] for it in deployed.get("versions", ())}
    version_of = {name: deployed.get("aliases", {}).get(name, name) for name in weights}
    return {
        name: called[version]
        for name, version in version_of.items()
        if called.get(version, version) != version
    }


@app.command()
def undeploy(name: str, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Serve a model no longer; its versions stay."""
    with connected(url, key) as client:
        client.undeploy(name)
    Console().print(f"{name} is not served any more.", highlight=False)


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


@app.command()
def compare(
    model: str,
    a: str,
    b: str,
    metric: Annotated[
        str, typer.Option(help="accuracy, error_rate, latency_ms or what outcomes were posted for.")
    ] = "accuracy",
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Is version B better than version A? By the users whom the split sent to each."""
    with connected(url, key) as client:
        found = client.compare(model, a, b, metric)
    if as_json:
        print_json(found)
        return
    console = Console()
    console.print(found["summary"], highlight=False, markup=False, soft_wrap=True)
    for warning in found["warnings"]:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)


@app.command()
def alerts(
    model: Annotated[str | None, typer.Argument(help="Only this model.")] = None,
    state: Annotated[str | None, typer.Option(help="open, acknowledged or resolved.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Which features have drifted, newest first."""
    with connected(url, key) as client:
        found = client.alerts(model, state)
    if as_json:
        print_json(found)
        return
    console = Console()
    for alert in found:
        console.print(
            f"{alert['opened_at'][:19]}  {alert['state']}  {alert['severity']}: {alert['message']}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    if not found:
        Console(stderr=True).print("No alerts.")


@keys_app.command("list")
def list_keys(url: Url = DEFAULT_URL, key: Key = None, as_json: AsJson = False) -> None:
    """All API keys, without their secrets."""
    with connected(url, key) as client:
        found = list(client.keys())
    if as_json:
        print_json(found)
        return
    rows = []
    for one in found:
        rate, models, scopes = one["rate_per_second"], ", ".join(one["models"]), ", ".join(one["scopes"])
        rate_text = f"{rate:g}" if rate else ""
        rows.append((one["key_id"], one["name"], scopes, models or "all", rate_text, _state_of(one)))
    print_table(("key", "name", "scopes", "models", "per second", "state"), rows)


def _state_of(key: dict[str, Any]) -> str:
    if key["revoked"]:
        return "revoked"
    ends = key.get("expires_at")
    return "expired" if ends and datetime.fromisoformat(ends) <= datetime.now(UTC) else "valid"


@keys_app.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(help="As `list` shows it.")],
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Let a key open nothing any more, everywhere within a second."""
    with connected(url, key) as client:
        client.revoke_key(key_id)
    Console().print(f"{key_id} is revoked.", highlight=False)


@keys_app.command("create")
def create_key(
    name: str,
    scope: Annotated[list[str] | None, typer.Option(help="predict, read or admin; may be repeated.")] = None,
    rate: Annotated[float, typer.Option(help="Requests per second; 0: no limit.")] = 0.0,
    burst: Annotated[int, typer.Option(help="Requests at once; 0: one second's worth.")] = 0,
    model: Annotated[list[str] | None, typer.Option(help="Only these models; may be repeated.")] = None,
    expires: Annotated[
        str | None, typer.Option(help="30d, 12h, 45m or a date, 2027-01-31; otherwise never.")
    ] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """A new API key. It is shown this once: on standard output, everything else on standard error."""
    expires_at = None if expires is None else moment_of(expires, "--expires")
    with connected(url, key) as client:
        made = client.create_key(
            name,
            tuple(scope or ("predict",)),
            rate_per_second=rate,
            burst=burst,
            models=tuple(model or ()),
            expires_at=expires_at,
        )
    Console(stderr=True).print(
        f"{made.name}: {', '.join(made.scopes)}; keep it, it is not shown again:",
        highlight=False,
        markup=False,  # what a name may hold would end this before the key was shown
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
