"""Every call as an exchange, shared by the sync and the async client."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import httpx
from numpy.typing import ArrayLike

from headrace_client.exchange import Exchange, json_of, segment, with_json
from headrace_client.results import Embeddings, Inference, Json, NewKey, Outcome, Prediction
from headrace_client.tensors import HEADER_LENGTH, decode_answer, encode_request
from headrace_client.uploads import Upload


def predict(
    model: str,
    inputs: Any,
    *,
    user_id: str | int | None = None,
    session_id: str | int | None = None,
    attributes: Mapping[str, Any] | None = None,
    version: str | None = None,
    outputs: Sequence[str] | None = None,
    single: bool = False,
) -> Exchange[Prediction]:
    """`single` sends one row as `input`."""
    body: Json = {"model": model, ("input" if single else "inputs"): inputs}
    said = {"user_id": user_id, "session_id": session_id, "version": version}
    body |= {name: value for name, value in said.items() if value is not None}
    if attributes:
        body["attributes"] = dict(attributes)
    if outputs is not None:
        body["outputs"] = list(outputs)
    return with_json("POST", "/v1/predict", body, lambda answer: Prediction.read(answer.json()))


def embed(model: str, texts: Sequence[str], *, version: str | None = None) -> Exchange[Embeddings]:
    body: Json = {"model": model, "inputs": list(texts)}
    if version is not None:
        body["version"] = version
    return with_json("POST", "/v1/embed", body, lambda answer: Embeddings.read(answer.json()))


def infer(
    model: str,
    inputs: Mapping[str, ArrayLike],
    *,
    version: str | None = None,
    outputs: Sequence[str] = (),
    request_id: str | None = None,
) -> Exchange[Inference]:
    body, json_length = encode_request(inputs, outputs, request_id)
    at = f"/v2/models/{segment(model)}" + (f"/versions/{segment(version)}" if version else "")
    headers = {"content-type": "application/octet-stream", HEADER_LENGTH: str(json_length)}
    return Exchange("POST", f"{at}/infer", _read_inference, headers=headers, content=body)


def outcomes(given: Iterable[Outcome]) -> Exchange[list[str]]:
    """Returns the event ids."""
    body = [outcome.body() for outcome in given]
    return with_json("POST", "/v1/outcomes", body, lambda answer: list(answer.json()["event_ids"]))


def create_model(name: str, description: str = "", tags: Mapping[str, str] | None = None) -> Exchange[Json]:
    body = {"name": name, "description": description, "tags": dict(tags or {})}
    return with_json("POST", "/v1/models", body, json_of)


def push_version(model: str, upload: Upload) -> Exchange[Json]:
    at = f"/v1/models/{segment(model)}/versions"
    return Exchange("POST", at, json_of, headers=upload.headers, content=upload.chunks)


def models(after: str = "") -> Exchange[Json]:
    """One page: `{"models": […], "next": …}`."""
    return Exchange("GET", "/v1/models", json_of, params={"after": after} if after else {})


def model(name: str) -> Exchange[Json]:
    return Exchange("GET", f"/v1/models/{segment(name)}", json_of)


def versions(name: str, after: str = "") -> Exchange[Json]:
    """One page: `{"versions": […], "next": …}`; a registry of an earlier release knows one page only."""
    at = f"/v1/models/{segment(name)}/versions"
    return Exchange("GET", at, json_of, params={"after": after} if after else {})


def delete_model(name: str) -> Exchange[None]:
    return Exchange("DELETE", f"/v1/models/{segment(name)}", lambda answer: None)


def delete_version(model: str, version: str) -> Exchange[None]:
    at = f"/v1/models/{segment(model)}/versions/{segment(version)}"
    return Exchange("DELETE", at, lambda answer: None)


def set_alias(model: str, alias: str, version: str) -> Exchange[Json]:
    at = f"/v1/models/{segment(model)}/aliases/{segment(alias)}"
    return with_json("PUT", at, {"version": version}, json_of)


def deploy(
    model: str,
    weights: Mapping[str, float],
    *,
    variants: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Exchange[Json]:
    named = variants or {}
    shares = [
        {"version": version, "weight": weight, **({"variant": named[version]} if version in named else {})}
        for version, weight in weights.items()
    ]
    return with_json(
        "PUT", f"/v1/deployments/{segment(model)}", {"versions": shares, **(options or {})}, json_of
    )


def deployment(model: str) -> Exchange[Json]:
    return Exchange("GET", f"/v1/deployments/{segment(model)}", json_of)


def undeploy(model: str) -> Exchange[None]:
    return Exchange("DELETE", f"/v1/deployments/{segment(model)}", lambda answer: None)


def compare(model: str, a: str, b: str, metric: str) -> Exchange[Json]:
    at = f"/v1/analytics/models/{segment(model)}/compare"
    return Exchange("GET", at, json_of, params={"a": a, "b": b, "metric": metric})


def alerts(model: str | None = None, state: str | None = None) -> Exchange[list[Json]]:
    given = {"model": model, "state": state}
    params = {name: value for name, value in given.items() if value is not None}
    return Exchange("GET", "/v1/drift/alerts", _items("alerts"), params=params)


def create_key(
    name: str,
    scopes: Sequence[str],
    *,
    rate_per_second: float = 0.0,
    burst: int = 0,
    models: Sequence[str] = (),
    expires_at: datetime | None = None,
) -> Exchange[NewKey]:
    body = {"name": name, "scopes": list(scopes), "rate_per_second": rate_per_second, "burst": burst}
    body["models"] = list(models)
    if expires_at is not None:
        body["expires_at"] = expires_at.isoformat()
    return with_json("POST", "/v1/keys", body, lambda answer: NewKey.read(answer.json()))


def keys(after: str = "") -> Exchange[Json]:
    """One page: `{"keys": […], "next": …}`."""
    return Exchange("GET", "/v1/keys", json_of, params={"after": after} if after else {})


def revoke_key(key_id: str) -> Exchange[None]:
    return Exchange("DELETE", f"/v1/keys/{segment(key_id)}", lambda answer: None)


def _items(name: str) -> Callable[[httpx.Response], list[Json]]:
    return lambda answer: list(answer.json()[name])


def _read_inference(answer: httpx.Response) -> Inference:
    length = answer.headers.get(HEADER_LENGTH)
    return decode_answer(answer.content, None if length is None else int(length))
