"""Calls about experiments and rollouts, as exchanges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from headrace_client.exchange import Exchange, json_of, segment, with_json
from headrace_client.results import Json

#: What ends a rollout.
ENDED: Final = frozenset({"completed", "rolled_back", "aborted"})
_EXPERIMENTS: Final = "/v1/experiments"
_ROLLOUTS: Final = "/v1/rollouts"


def create_experiment(
    model: str,
    variants: Mapping[str, str] | Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
) -> Exchange[Json]:
    """`variants`: name → version (equal weights), or as the server reads them; the first is the control."""
    return with_json(
        "POST", _EXPERIMENTS, {"model": model, "variants": variants_of(variants), **options}, json_of
    )


def variants_of(given: Mapping[str, str] | Sequence[Mapping[str, Any]]) -> list[Json]:
    """Variants as the server reads them. Equal weights are cut to 1/10,000, the control gets the rest."""
    if not isinstance(given, Mapping):
        return [dict(variant) for variant in given]
    each = 10_000 // len(given) if given else 0
    shares = [10_000 - each * (len(given) - 1), *[each] * (len(given) - 1)]
    return [
        {"name": name, "version": version, "weight": share / 10_000}
        for (name, version), share in zip(given.items(), shares, strict=True)
    ]


def experiments(model: str | None, status: str | None, after: str) -> Exchange[Json]:
    return _list(_EXPERIMENTS, model, status, after)


def experiment(experiment_id: str) -> Exchange[Json]:
    return Exchange("GET", f"{_EXPERIMENTS}/{segment(experiment_id)}", json_of)


def change_experiment(experiment_id: str, changes: Mapping[str, Any]) -> Exchange[Json]:
    return with_json("PATCH", f"{_EXPERIMENTS}/{segment(experiment_id)}", dict(changes), json_of)


def delete_experiment(experiment_id: str) -> Exchange[None]:
    return Exchange("DELETE", f"{_EXPERIMENTS}/{segment(experiment_id)}", lambda answer: None)


def start_experiment(experiment_id: str) -> Exchange[Json]:
    return Exchange("POST", f"{_EXPERIMENTS}/{segment(experiment_id)}/start", json_of)


def stop_experiment(experiment_id: str, reason: str | None, winner: str | None) -> Exchange[Json]:
    given = {"reason": reason, "winner": winner}
    body = {name: value for name, value in given.items() if value is not None}
    return with_json("POST", f"{_EXPERIMENTS}/{segment(experiment_id)}/stop", body, json_of)


def assignment(
    experiment_id: str,
    unit: str | None,
    session: str | None,
    request_id: str | None,
    attributes: Mapping[str, Any] | None,
) -> Exchange[Json]:
    given = {"unit": unit, "session": session, "request_id": request_id}
    params = {name: value for name, value in given.items() if value is not None}
    params |= {f"attribute.{name}": _text(value) for name, value in (attributes or {}).items()}
    return Exchange("GET", f"{_EXPERIMENTS}/{segment(experiment_id)}/assignment", json_of, params=params)


def history(experiment_id: str, before: int | None) -> Exchange[Json]:
    return _events(f"{_EXPERIMENTS}/{segment(experiment_id)}/history", before)


def results(experiment_id: str) -> Exchange[Json]:
    return Exchange("GET", f"{_EXPERIMENTS}/{segment(experiment_id)}/results", json_of)


def plan(asked: Mapping[str, Any]) -> Exchange[Json]:
    return with_json("POST", f"{_EXPERIMENTS}/plan", dict(asked), json_of)


def holdout(model: str) -> Exchange[Json]:
    return Exchange("GET", f"/v1/models/{segment(model)}/holdout", json_of)


def set_holdout(model: str, share: float) -> Exchange[Json]:
    return with_json("PUT", f"/v1/models/{segment(model)}/holdout", {"share": share}, json_of)


def create_rollout(model: str, version: str, options: Mapping[str, Any]) -> Exchange[Json]:
    return with_json("POST", _ROLLOUTS, {"model": model, "version": version, **options}, json_of)


def rollouts(model: str | None, status: str | None, after: str) -> Exchange[Json]:
    return _list(_ROLLOUTS, model, status, after)


def rollout(rollout_id: str) -> Exchange[Json]:
    return Exchange("GET", f"{_ROLLOUTS}/{segment(rollout_id)}", json_of)


def rollout_events(rollout_id: str, before: int | None) -> Exchange[Json]:
    return _events(f"{_ROLLOUTS}/{segment(rollout_id)}/events", before)


def steer(rollout_id: str, action: str, reason: str) -> Exchange[Json]:
    """`action`: pause, resume, abort or promote."""
    body = {"reason": reason} if reason else {}
    return with_json("POST", f"{_ROLLOUTS}/{segment(rollout_id)}/{action}", body, json_of)


def _list(path: str, model: str | None, status: str | None, after: str) -> Exchange[Json]:
    given = {"model": model, "status": status, "after": after or None}
    params = {name: value for name, value in given.items() if value is not None}
    return Exchange("GET", path, json_of, params=params)


def _events(path: str, before: int | None) -> Exchange[Json]:
    return Exchange("GET", path, json_of, params={} if before is None else {"before": str(before)})


def _text(value: object) -> str:
    return ("true" if value else "false") if isinstance(value, bool) else str(value)
