"""`headrace experiments` and `headrace rollouts`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Annotated, Any

import typer

from headrace_client.client import DEFAULT_URL, Headrace
from headrace_client.commands import (
    AsJson,
    Attributes,
    CommandFailed,
    Key,
    Url,
    attributes_of,
    connected,
    pair_of,
    percent_of,
    print_json,
    print_table,
    share_of,
    value_of,
)
from headrace_client.experiments import variants_of
from headrace_client.results import Json

experiments_app = typer.Typer(help="Which version is better, honestly.", no_args_is_help=True)
rollouts_app = typer.Typer(help="New versions, step by step or back.", no_args_is_help=True)

Spec = Annotated[str | None, typer.Option(help="More of it as JSON, @file or -, as the API takes it.")]
OfModel = Annotated[str | None, typer.Option("--model", help="Only of this model.")]
InState = Annotated[str | None, typer.Option("--status", help="Only in this state.")]
AtMost = Annotated[int, typer.Option("--limit", help="So many at most.")]
Why = Annotated[str, typer.Option("--reason", help="Kept with the decision.")]
Watch = Annotated[bool, typer.Option("--watch", help="Follow it to its end, with its reasons.")]


# Experiments.


@experiments_app.command("create")
def create(  # noqa: PLR0913 - options of a command line
    model: str,
    variants: Annotated[list[str], typer.Argument(help="NAME=VERSION …, the control first.")],
    *,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="NAME=increase or NAME=decrease: what success is; may be repeated."),
    ] = None,
    weight: Annotated[list[float] | None, typer.Option(help="Percent, one for each variant.")] = None,
    traffic: Annotated[float, typer.Option(help="Percent of the units that it is about.")] = 100.0,
    unit: Annotated[str | None, typer.Option(help="user, session or request.")] = None,
    name: Annotated[str | None, typer.Option(help="What people call it.")] = None,
    spec: Spec = None,
    start: Annotated[bool, typer.Option("--start", help="Let it assign at once.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """A new experiment; prints its id."""
    options = _object(spec, "--spec", "model", "variants", "start")
    if traffic != 100.0:
        options["traffic"] = share_of(traffic)
    if metric:
        options["metrics"] = [*options.get("metrics", []), *map(_success, metric)]
    options |= {field: value for field, value in (("unit", unit), ("name", name)) if value is not None}
    pairs = [pair_of(text, "A variant") for text in variants]
    shares = variants_of(dict(pairs))
    if weight is not None:
        if len(weight) != len(shares):
            raise CommandFailed(f"{len(weight)} weights for {len(shares)} variants.")
        shares = [
            share | {"weight": share_of(percent)} for share, percent in zip(shares, weight, strict=True)
        ]
    with connected(url, key) as client:
        made = client.experiments.create(model, shares, start=start, **options)
    typer.echo(made["experiment_id"])


@experiments_app.command("list")
def list_experiments(
    model: OfModel = None,
    status: InState = None,
    limit: AtMost = 50,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Experiments."""
    with connected(url, key) as client:
        found = list(islice(client.experiments.list(model=model, status=status), limit))
    if as_json:
        print_json(found)
        return
    rows = [
        (one["experiment_id"], one["model"], one["name"], one["status"], _shares(one["variants"]))
        for one in found
    ]
    print_table(("experiment", "model", "name", "status", "variants"), rows)


@experiments_app.command("get")
def get(experiment_id: str, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """One experiment with its last verdict."""
    with connected(url, key) as client:
        print_json(client.experiments.get(experiment_id))


@experiments_app.command("change")
def change(
    experiment_id: str,
    changes: Annotated[str, typer.Argument(help='JSON, @file or -: {"traffic": 0.5}')],
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Change a draft, or weights, traffic, overrides and end of one that runs."""
    with connected(url, key) as client:
        print_json(client.experiments.patch(experiment_id, **_object(changes, "What to change")))


@experiments_app.command("start")
def start(experiment_id: str, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Let it assign."""
    with connected(url, key) as client:
        _say(client.experiments.start(experiment_id))


@experiments_app.command("stop")
def stop(
    experiment_id: str,
    reason: Why = "",
    winner: Annotated[str | None, typer.Option(help="The variant that gets all traffic now.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Let it assign no more; takes effect within a second."""
    with connected(url, key) as client:
        _say(client.experiments.stop(experiment_id, reason=reason or None, winner=winner))


@experiments_app.command("delete")
def delete(experiment_id: str, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Remove a draft."""
    with connected(url, key) as client:
        client.experiments.delete(experiment_id)


@experiments_app.command("assignment")
def assignment(
    experiment_id: str,
    user: Annotated[str | None, typer.Argument(help="Whose assignment.")] = None,
    session: Annotated[str | None, typer.Option(help="For experiments that assign sessions.")] = None,
    attribute: Attributes = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Which variant a unit gets, and why."""
    with connected(url, key) as client:
        said = client.experiments.assignment(
            experiment_id, user, session=session, attributes=attributes_of(attribute)
        )
    if as_json:
        print_json(said)
        return
    for step in said["steps"]:
        _line(f"  {step}")
    _line(said["because"])


@experiments_app.command("results")
def results(experiment_id: str, url: Url = DEFAULT_URL, key: Key = None, as_json: AsJson = False) -> None:
    """What it has shown so far, in words; --json has every number."""
    with connected(url, key) as client:
        found = client.experiments.results(experiment_id)
    if as_json:
        print_json(found)
        return
    _line(found["summary"])
    for warning in found["warnings"]:
        _line(f"warning: {warning}")


@experiments_app.command("plan")
def plan(
    asked: Annotated[str, typer.Argument(help='JSON, @file or -: {"baseline": 0.05, …}')],
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """How many units it takes to find an effect."""
    with connected(url, key) as client:
        print_json(client.experiments.plan(**_object(asked, "What is planned")))


# Rollouts.


@rollouts_app.command("start")
def start_rollout(  # noqa: PLR0913 - options of a command line
    model: str,
    version: str,
    *,
    strategy: Annotated[str | None, typer.Option(help="canary, blue_green or shadow_canary.")] = None,
    steps: Annotated[str | None, typer.Option(help="Percent, separated by commas: 1,5,25,100")] = None,
    min_duration: Annotated[
        float | None, typer.Option(help="Seconds that each step of --steps lasts.")
    ] = None,
    min_requests: Annotated[int | None, typer.Option(help="That the new version answers in each.")] = None,
    bake: Annotated[float | None, typer.Option(help="Seconds at 100% with the old version warm.")] = None,
    spec: Spec = None,
    watch: Watch = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Give a new version traffic step by step, and take it back where it does harm; prints its id."""
    options = _object(spec, "--spec", "model", "version")
    limits = {"min_duration_s": min_duration, "min_requests": min_requests}
    if steps is not None:
        options["steps"] = _steps(steps, {name: value for name, value in limits.items() if value is not None})
    elif any(value is not None for value in limits.values()):
        raise CommandFailed("--min-duration and --min-requests are about the steps that --steps names.")
    given = {"strategy": strategy, "bake_s": bake}
    options |= {name: value for name, value in given.items() if value is not None}
    with connected(url, key) as client:
        made = client.rollouts.create(model, version, **options)
        typer.echo(made["rollout_id"])
        if watch:
            _follow(client, made["rollout_id"])


@rollouts_app.command("list")
def list_rollouts(
    model: OfModel = None,
    status: InState = None,
    limit: AtMost = 50,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Rollouts."""
    with connected(url, key) as client:
        found = list(islice(client.rollouts.list(model=model, status=status), limit))
    if as_json:
        print_json(found)
        return
    rows = [
        (
            one["rollout_id"],
            one["model"],
            f"{one['previous_version']} → {one['version']}",
            one["status"],
            percent_of(one["weight"]),
            one["reason"],
        )
        for one in found
    ]
    print_table(("rollout", "model", "versions", "status", "weight", "reason"), rows)


@rollouts_app.command("get")
def get_rollout(rollout_id: str, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Where it stands, why, and what it waits for."""
    with connected(url, key) as client:
        print_json(client.rollouts.get(rollout_id))


@rollouts_app.command("events")
def events(
    rollout_id: str, limit: AtMost = 50, url: Url = DEFAULT_URL, key: Key = None, as_json: AsJson = False
) -> None:
    """Its decisions with their reasons, oldest first."""
    with connected(url, key) as client:
        found = list(islice(client.rollouts.events(rollout_id), limit))[::-1]
    if as_json:
        print_json(found)
        return
    for event in found:
        _show(event)


@rollouts_app.command("watch")
def watch_rollout(rollout_id: str, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Follow it to its end; exit code 0 only where the new version has all traffic then."""
    with connected(url, key) as client:
        _follow(client, rollout_id)


@rollouts_app.command("pause")
def pause(rollout_id: str, reason: Why = "", url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Stay at this step."""
    with connected(url, key) as client:
        _say(client.rollouts.pause(rollout_id, reason))


@rollouts_app.command("resume")
def resume(rollout_id: str, reason: Why = "", url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Go on."""
    with connected(url, key) as client:
        _say(client.rollouts.resume(rollout_id, reason))


@rollouts_app.command("abort")
def abort(rollout_id: str, reason: Why = "", url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Take the new version back."""
    with connected(url, key) as client:
        _say(client.rollouts.abort(rollout_id, reason))


@rollouts_app.command("promote")
def promote(rollout_id: str, reason: Why = "", url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Take the next step without waiting."""
    with connected(url, key) as client:
        _say(client.rollouts.promote(rollout_id, reason))


def _follow(client: Headrace, rollout_id: str) -> None:
    for event in client.rollouts.watch(rollout_id):
        _show(event)
    ended = client.rollouts.get(rollout_id)
    if ended["status"] != "completed":
        raise CommandFailed(f"{rollout_id} is {ended['status']}: {ended['reason']}")


def _show(event: Json) -> None:
    when = str(event["at"])[11:19]
    _line(f"{when}  {percent_of(event['weight']):>4}  {event['action']}: {event['reason']}")


def _say(one: Json) -> None:
    name = one.get("experiment_id") or one["rollout_id"]
    why = one.get("stopped_because") or one.get("waiting_for") or one.get("reason")
    _line(f"{name} is {one['status']}" + (f": {why}" if why else ""))


def _line(text: str) -> None:
    """Words of the server as they are, however wide."""
    typer.echo(text)


def _object(text: str | None, option: str, *said: str) -> Json:
    """`said` is what other words of the command say already."""
    value = {} if text is None else value_of(text, option)
    if not isinstance(value, dict):
        raise CommandFailed(f"{option} must be a JSON object.")
    twice = sorted(value.keys() & set(said))
    if twice:
        raise CommandFailed(f"{option} has {', '.join(twice)}, which other words of the command say.")
    return value


def _success(text: str) -> Json:
    name, equals, direction = text.partition("=")
    if not equals or not name:
        raise CommandFailed(f"--metric {text!r} must look like {name or 'accuracy'}=increase or …=decrease.")
    return {"name": name, "role": "success", "direction": direction}


def _steps(text: str, limits: dict[str, Any]) -> list[Json]:
    """Steps of percents; the last one, 100, waits for nothing of its own."""
    try:
        percents = [float(part) for part in text.split(",")]
    except ValueError:
        raise CommandFailed(f"--steps {text!r} must look like 1,5,25,100.") from None
    return [{"weight": share_of(percent), **(limits if percent < 100 else {})} for percent in percents]


def _shares(variants: Sequence[Json]) -> str:
    return ", ".join(f"{one['name']} ({one['version']}) {percent_of(one['weight'])}" for one in variants)
