"""The registry over REST on real PostgreSQL and a real broker."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from headrace.v1.control_pb2 import ApiKey, ServingConfig

from deploy.embedded.tansu import TansuServer
from services.common.bus.admin import ensure_topics
from services.common.topics import DEPLOYMENTS, KEYS
from services.registry.bodies import MAX_BODY_BYTES
from tests.fixtures.onnx_files import classifier, encoder, linear, noisy
from tests.fixtures.registry import Running, following, registry_settings, running_registry
from tests.fixtures.waiting import PATIENCE_S, eventually

TOKENIZER = json.dumps({"model": {"type": "WordPiece", "vocab": {}}}).encode()


@pytest.fixture
def kafka_bootstrap(new_tansu: Callable[[], TansuServer]) -> str:
    """A broker of each test's own: a registry overtakes what another one of the same models left behind."""
    return new_tansu().url


@pytest.fixture
async def running(database_url: str, kafka_bootstrap: str, tmp_path: Path) -> AsyncIterator[Running]:
    await ensure_topics(kafka_bootstrap, [DEPLOYMENTS, KEYS])
    async with running_registry(registry_settings(database_url, kafka_bootstrap, tmp_path)) as registry:
        yield registry


def refused(answer: httpx.Response, status: int, code: str, field: str | None) -> None:
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    body = answer.json()
    assert (answer.status_code, body["code"], body.get("field")) == (status, code, field), body


async def test_what_is_deployed_stands_on_the_topic(running: Running, kafka_bootstrap: str) -> None:
    await running.make("churn", linear(weight=1), linear(weight=2))
    deployed = await running.deploy("churn", {"1": 90, "2": 10}, pool="cpu", balancing="round_robin")
    assert deployed.status_code == 200, deployed.text
    view = deployed.json()
    assert [(v["version"], v["weight"], v["variant"]) for v in view["versions"]] == [
        ("1", 90, "1"),
        ("2", 10, "2"),
    ]
    async with following(kafka_bootstrap, DEPLOYMENTS) as known:
        await eventually(lambda: known.get("churn"))
        config = ServingConfig.FromString(known["churn"] or b"")
    assert (config.revision, config.pool, config.salt) == (view["revision"], "cpu", "churn")
    assert [(b.first, b.last, b.version) for b in config.buckets] == [(0, 8999, "1"), (9000, 9999, "2")]
    stored = await running.registry.edge.store.get_blob(config.versions[0].artifact_digest)
    listed = json.loads(stored)["files"]
    assert [(f["path"], f["size"]) for f in listed] == [("model.onnx", len(linear(weight=1)))]
    assert await running.registry.edge.store.get_blob(listed[0]["digest"]) == linear(weight=1)
    again = await running.rest.get("/v1/deployments/churn")
    assert again.json() == view


async def test_growing_a_canary_moves_units_only_into_it(running: Running) -> None:
    await running.make("churn", linear(weight=1), linear(weight=2))
    owners: list[list[str]] = []
    for share in (10, 25.5, 10):
        view = (await running.deploy("churn", {"1": 100 - share, "2": share})).json()
        owners.append([b["version"] for b in view["buckets"] for _ in range(b["first"], b["last"] + 1)])
    moved = [(a, b) for a, b in zip(owners[0], owners[1], strict=True) if a != b]
    assert moved == [("1", "2")] * 1550
    assert owners[2] == owners[0]


async def test_a_deployment_asked_for_again_makes_no_revision(running: Running) -> None:
    await running.make("churn", linear())
    first = (await running.deploy("churn", {"1": 100})).json()
    assert (await running.deploy("churn", {"1": 100})).json() == first


async def test_revisions_are_never_given_twice(running: Running, kafka_bootstrap: str) -> None:
    await running.make("churn", linear(weight=1), linear(weight=2))
    await running.deploy("churn", {"1": 100})
    await running.deploy("churn", {"1": 100, "2": 0})
    assert (await running.rest.delete("/v1/deployments/churn")).status_code == 204
    refused(await running.rest.get("/v1/deployments/churn"), 404, "NOT_FOUND", "model")
    refused(await running.rest.delete("/v1/deployments/churn"), 404, "NOT_FOUND", "model")
    async with following(kafka_bootstrap, DEPLOYMENTS) as known:
        await eventually(lambda: known.get("churn") is None)
    assert (await running.deploy("churn", {"2": 100})).json()["revision"] == 4
    history = (await running.rest.get("/v1/deployments/churn/history", params={"limit": 3})).json()
    assert [(r["revision"], r["reason"]) for r in history["revisions"]] == [
        (4, "deploy"),
        (3, "undeploy"),
        (2, "deploy"),
    ]
    assert history["revisions"][1]["deployment"] is None
    page = (
        await running.rest.get("/v1/deployments/churn/history", params={"before": history["next"]})
    ).json()
    assert [r["revision"] for r in page["revisions"]] == [1]
    assert page["next"] is None
    # also when the model itself came and went
    assert (await running.rest.delete("/v1/deployments/churn")).status_code == 204
    assert (await running.rest.delete("/v1/models/churn")).status_code == 204
    await running.make("churn", linear(weight=3))
    assert (await running.deploy("churn", {"3": 100})).json()["revision"] == 6


BOTH = [{"version": "1", "weight": 0}, {"version": "2", "weight": 100}]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"versions": [{"version": "1", "weight": 99}]}, "versions"),
    ({"versions": [{"version": "1", "weight": 60}, {"version": "2", "weight": 41}]}, "versions"),
    (
        {"versions": [{"version": "1", "weight": 50}, {"version": "1", "weight": 50}]},
        "versions[1].version",
    ),
    ({"versions": [{"version": "7", "weight": 100}]}, "versions[0].version"),
    ({"versions": [{"version": "1", "weight": 33.333}]}, "versions[0].weight"),
    ({"versions": [{"version": "1", "weight": -1}]}, "versions[0].weight"),
    ({"versions": [{"version": "1", "weight": "many"}]}, "versions[0].weight"),
    ({"versions": []}, "versions"),
    ({"versions": [{"version": "1", "weight": 100}], "pool": "No Pool"}, "pool"),
    ({"versions": [{"version": "1", "weight": 100}], "balancing": "best"}, "balancing"),
    ({"versions": [{"version": "1", "weight": 100}], "batching": {"max_rows": -1}}, "batching.max_rows"),
    ({"versions": [{"version": "1", "weight": 100}], "unknown": 1}, "unknown"),
    (
        {"versions": [{"version": "1", "weight": 100}], "fallback": {"version": "1"}},
        "fallback.version",
    ),
    (
        {"versions": [{"version": "1", "weight": 100}], "fallback": {"version": "2"}},
        "fallback.version",
    ),
    (
        {"versions": BOTH, "fallback": {"version": "1", "on": ["CANCELLED"]}},
        "fallback.on[0]",
    ),
    ({"versions": BOTH, "cache": {"ttl_s": 0}}, "cache.ttl_s"),
    ({"versions": BOTH, "shadow": {"version": "3", "share": 1}}, "shadow.version"),
    ({"versions": BOTH, "shadow": {"version": "1", "share": 0}}, "shadow.share"),
    ({"versions": BOTH, "hedging": {"quantile": 0.2}}, "hedging.quantile"),
    ({"versions": BOTH, "hedging": {"quantile": "often"}}, "hedging.quantile"),
    ({"versions": BOTH, "hedging": {"min_delay_ms": -1}}, "hedging.min_delay_ms"),
    ({"versions": BOTH, "hedging": {"after": 5}}, "hedging.after"),
    ({"versions": BOTH, "cache": {"ttl_s": 1, "max_entry_bytes": 0}}, "cache.max_entry_bytes"),
]


async def test_a_wrong_deployment_names_its_field(running: Running) -> None:
    await running.make("churn", linear(weight=1), linear(weight=2))
    for body, field in WRONG:
        answer = await running.rest.put("/v1/deployments/churn", json=body)
        refused(answer, 422, "INVALID_ARGUMENT", field)
    refused(await running.rest.get("/v1/deployments/churn"), 404, "NOT_FOUND", "model")


async def test_a_fallback_is_published_and_shown(running: Running) -> None:
    await running.make("churn", linear(weight=1), linear(weight=2))
    await running.rest.put("/v1/models/churn/aliases/stable", json={"version": "1"})
    wanted = {"version": "stable", "on": ["UNAVAILABLE", "INTERNAL"]}
    answer = await running.deploy("churn", {"1": 0, "2": 100}, fallback=wanted)
    assert answer.json()["fallback"] == {"version": "1", "on": ["INTERNAL", "UNAVAILABLE"]}
    again = await running.deploy("churn", {"1": 0, "2": 100}, fallback=wanted)
    assert again.json()["revision"] == answer.json()["revision"]
    without = await running.deploy("churn", {"1": 0, "2": 100})
    assert without.json()["fallback"] is None
    assert without.json()["revision"] == answer.json()["revision"] + 1


async def test_hedging_is_published_and_shown(running: Running) -> None:
    await running.make("churn", linear(weight=1))
    answer = await running.deploy("churn", {"1": 100}, hedging={"min_delay_ms": 5})
    assert answer.json()["hedging"] == {"quantile": 0.95, "min_delay_ms": 5}
    assert (await running.deploy("churn", {"1": 100})).json()["hedging"] is None


async def test_a_shadow_is_published_and_shown(running: Running) -> None:
    await running.make("churn", linear(weight=1), linear(weight=2))
    asked = {"version": "2", "share": 12.5, "slice_by": "country"}
    answer = await running.deploy("churn", {"1": 100, "2": 0}, shadow=asked)
    assert answer.json()["shadow"] == {
        "version": "2", "share": 12.5, "tolerance": 0.001, "slice_by": "country",
    }  # fmt: skip
    assert (await running.deploy("churn", {"1": 100, "2": 0})).json()["shadow"] is None


async def test_a_cache_is_published_and_shown(running: Running) -> None:
    await running.make("churn", linear(weight=1))
    answer = await running.deploy("churn", {"1": 100}, cache={"ttl_s": 1.5})
    assert answer.json()["cache"] == {"ttl_s": 1.5, "max_entry_bytes": 65_536}
    assert (await running.deploy("churn", {"1": 100})).json()["cache"] is None


async def test_answers_that_inputs_alone_do_not_make_are_not_cached(running: Running) -> None:
    await running.make("churn", linear(weight=1), noisy())
    shown = await running.rest.get("/v1/models/churn/versions/2")
    assert shown.json()["tags"] == {"deterministic": "false"}
    refused = await running.deploy("churn", {"1": 50, "2": 50}, cache={"ttl_s": 1.5})
    assert (refused.status_code, refused.json()["field"]) == (422, "cache")
    assert "'2'" in refused.json()["detail"]
    assert (await running.deploy("churn", {"1": 50, "2": 50})).status_code == 200
    assert (await running.deploy("churn", {"1": 100}, cache={"ttl_s": 1.5})).status_code == 200


async def test_of_concurrent_deploys_from_one_revision_one_wins(running: Running) -> None:
    await running.make("churn", linear(weight=1), linear(weight=2))
    base = (await running.deploy("churn", {"1": 100})).json()["revision"]
    answers = await asyncio.gather(
        *[running.deploy("churn", {"1": 100 - n, "2": n}, expected_revision=base) for n in range(1, 9)]
    )
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * 7
    for answer in answers:
        if answer.status_code == 409:
            refused(answer, 409, "ABORTED", "expected_revision")
    winner = next(answer.json() for answer in answers if answer.status_code == 200)
    assert (await running.rest.get("/v1/deployments/churn")).json() == winner


async def test_concurrent_deploys_without_a_condition_all_get_a_revision(running: Running) -> None:
    await running.make("churn", linear(weight=1), linear(weight=2))
    answers = await asyncio.gather(*[running.deploy("churn", {"1": 100 - n, "2": n}) for n in range(8)])
    assert sorted(answer.json()["revision"] for answer in answers) == list(range(1, 9))


async def test_versions_never_change(running: Running) -> None:
    await running.make("churn")
    first = await running.upload("churn", {"model.onnx": linear()}, metrics={"auc": 0.9})
    assert (first.status_code, first.json()["version"]) == (201, "1")
    again = await running.upload("churn", {"model.onnx": linear()}, version="1", metrics={"auc": 0.9})
    assert (again.status_code, again.json()) == (200, first.json())
    other = await running.upload("churn", {"model.onnx": linear(weight=2)}, version="1", metrics={"auc": 0.9})
    refused(other, 409, "ALREADY_EXISTS", "version")
    refused(
        await running.upload("churn", {"model.onnx": linear()}, version="1", metrics={"auc": 0.8}),
        409, "ALREADY_EXISTS", "version",
    )  # fmt: skip
    named = await running.upload("churn", {"trained.onnx": linear()}, version="2026-11")
    assert named.json()["artifact_digest"] == first.json()["artifact_digest"]
    following_number = await running.upload("churn", {"model.onnx": linear(weight=3)})
    assert following_number.json()["version"] == "2"
    listed = (await running.rest.get("/v1/models/churn/versions")).json()["versions"]
    assert [version["version"] for version in listed] == ["1", "2026-11", "2"]


async def test_concurrent_uploads_get_versions_of_their_own(running: Running) -> None:
    await running.make("churn")
    answers = await asyncio.gather(
        *[running.upload("churn", {"model.onnx": linear(weight=n)}) for n in range(4)]
    )
    assert sorted(answer.json()["version"] for answer in answers) == ["1", "2", "3", "4"]


async def test_everything_said_of_a_version_comes_back(running: Running) -> None:
    await running.make("churn")
    lineage = {
        "git_commit": "abc",
        "source_uri": "s3://x",
        "training_run": "r",
        "training_data_digest": "d",
        "parent": "churn/0",
    }
    made = await running.upload(
        "churn",
        {"model.onnx": classifier(), "notes/read.me": b"hello"},
        metrics={"auc": 0.5},
        lineage=lineage,
        tags={"owner": "ml"},
        signature={"inputs": [{"name": "x", "columns": ["age", "income"]}]},
    )
    view = (await running.rest.get("/v1/models/churn/versions/1")).json()
    assert made.json() == view
    assert (view["metrics"], view["lineage"], view["tags"]) == ({"auc": 0.5}, lineage, {"owner": "ml"})
    signature = view["signature"]
    assert signature["inputs"] == [
        {"name": "x", "datatype": "FP32", "shape": [-1, 2], "columns": ["age", "income"]}
    ]
    assert (signature["task"], signature["classes"], signature["batched"]) == (
        "classification",
        ["no", "yes"],
        True,
    )
    assert (signature["prediction_output"], signature["probability_output"]) == ("label", "probabilities")
    got = await running.rest.get("/v1/models/churn/versions/1/files/notes/read.me")
    assert (got.status_code, got.content) == (200, b"hello")
    assert got.headers["etag"] == f'"sha256:{hashlib.sha256(b"hello").hexdigest()}"'
    refused(await running.rest.get("/v1/models/churn/versions/1/files/none"), 404, "NOT_FOUND", "path")


async def test_an_encoder_takes_texts(running: Running) -> None:
    await running.make("minilm")
    made = await running.upload("minilm", {"model.onnx": encoder(4), "tokenizer.json": TOKENIZER})
    view = made.json()
    assert view["backend"] == "embedding"
    assert view["signature"]["inputs"] == [
        {"name": "text", "datatype": "BYTES", "shape": [-1], "columns": []}
    ]
    assert view["signature"]["outputs"] == [
        {"name": "embeddings", "datatype": "FP32", "shape": [-1, 4], "columns": []}
    ]


async def test_unusable_uploads_are_refused_and_leave_nothing(running: Running, tmp_path: Path) -> None:
    await running.make("churn")
    whole = linear()
    for files in (
        {"model.onnx": whole[: len(whole) // 2]},
        {"model.onnx": b""},
        {"model.onnx": b"not a model at all" * 10},
        {"weights.bin": b"123"},
        {"model.onnx": whole, "../../etc/passwd": b"x"},
        {"model.onnx": encoder(), "tokenizer.json": b"{"},
        {},
    ):
        refused(await running.upload("churn", files), 422, "INVALID_ARGUMENT", "files")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"signature": {"inputs": [{"name": "z"}]}}, "signature.inputs[0].name"),
        ({"signature": {"inputs": [{"name": "x", "shape": [-1, 9]}]}}, "signature.inputs[0].shape"),
        ({"version": "not ok"}, "version"),
        ({"backend": "torch"}, "backend"),
        ({"unknown": 1}, "unknown"),
    ]
    for described, field in wrong:
        answer = await running.upload("churn", {"model.onnx": whole}, **described)
        refused(answer, 422, "INVALID_ARGUMENT", field)
    refused(await running.upload("nobody", {"model.onnx": whole}), 404, "NOT_FOUND", "model")
    url = "/v1/models/churn/versions"
    parts: list[Any] = [("metadata", (None, "{")), ("files", ("model.onnx", whole))]
    refused(await running.rest.post(url, files=parts), 400, "INVALID_ARGUMENT", "metadata")
    refused(await running.rest.post(url, json={}), 400, "INVALID_ARGUMENT", None)
    cut = b'--b\r\nContent-Disposition: form-data; name="files"; filename="model.onnx"\r\n\r\nabc'
    header = {"content-type": "multipart/form-data; boundary=b"}
    refused(await running.rest.post(url, content=cut, headers=header), 400, "INVALID_ARGUMENT", None)
    assert (await running.rest.get(url)).json() == {"versions": [], "next": None}
    assert list((tmp_path / "state" / "registry" / "uploads").iterdir()) == []


async def test_an_upload_beyond_the_limit_is_refused(
    database_url: str, kafka_bootstrap: str, tmp_path: Path
) -> None:
    cfg = registry_settings(database_url, kafka_bootstrap, tmp_path, max_upload_bytes=100_000)
    async with running_registry(cfg) as running:
        await running.make("churn")
        refused(
            await running.upload("churn", {"model.onnx": b"x" * 200_000}), 413, "INVALID_ARGUMENT", "files"
        )


async def test_aliases(running: Running, kafka_bootstrap: str) -> None:
    await running.make("churn", linear(weight=1), linear(weight=2), linear(weight=3))
    aliases = "/v1/models/churn/aliases"
    assert (await running.rest.put(f"{aliases}/champion", json={"version": "1"})).json()["aliases"] == {
        "champion": "1"
    }
    refused(await running.rest.put(f"{aliases}/champion", json={"version": "9"}), 404, "NOT_FOUND", "version")
    refused(
        await running.rest.put("/v1/models/nobody/aliases/champion", json={"version": "1"}),
        404,
        "NOT_FOUND",
        "model",
    )
    refused(await running.rest.delete(f"{aliases}/nobody"), 404, "NOT_FOUND", "alias")
    deployed = (await running.deploy("churn", {"champion": 90, "2": 10})).json()
    assert [v["version"] for v in deployed["versions"]] == ["1", "2"]
    await running.rest.put(f"{aliases}/challenger", json={"version": "2"})
    await running.rest.put(f"{aliases}/next", json={"version": "3"})
    async with following(kafka_bootstrap, DEPLOYMENTS) as known:

        def on_topic() -> ServingConfig:
            return ServingConfig.FromString(known.get("churn") or b"")

        # only what can be answered: version 3 is not served
        await eventually(lambda: on_topic().aliases == {"champion": "1", "challenger": "2"})
        assert on_topic().revision == deployed["revision"] + 1
        await running.rest.delete(f"{aliases}/challenger")
        await eventually(lambda: on_topic().aliases == {"champion": "1"})
    assert (await running.rest.get("/v1/models/churn/versions/champion")).json()["version"] == "1"
    taken = await running.upload("churn", {"model.onnx": linear()}, version="champion")
    refused(taken, 409, "ALREADY_EXISTS", "version")


async def test_what_is_in_use_cannot_be_deleted(running: Running) -> None:
    await running.make("churn", linear(weight=1), linear(weight=2), linear(weight=3))
    await running.rest.put("/v1/models/churn/aliases/champion", json={"version": "2"})
    await running.deploy("churn", {"1": 100})
    for version in ("1", "2"):
        answer = await running.rest.delete(f"/v1/models/churn/versions/{version}")
        refused(answer, 409, "FAILED_PRECONDITION", "version")
    assert (await running.rest.delete("/v1/models/churn/versions/3")).status_code == 204
    refused(await running.rest.get("/v1/models/churn/versions/3"), 404, "NOT_FOUND", "version")
    refused(
        await running.upload("churn", {"model.onnx": linear(weight=3)}, version="3"),
        409,
        "ALREADY_EXISTS",
        "version",
    )
    refused(await running.rest.delete("/v1/models/churn"), 409, "FAILED_PRECONDITION", "model")
    await running.rest.delete("/v1/deployments/churn")
    refused(await running.rest.delete("/v1/models/churn"), 409, "FAILED_PRECONDITION", "model")
    await running.rest.delete("/v1/models/churn/aliases/champion")
    assert (await running.rest.delete("/v1/models/churn")).status_code == 204
    refused(await running.rest.get("/v1/models/churn"), 404, "NOT_FOUND", "model")


async def test_models_are_listed_page_by_page(running: Running) -> None:
    for name in ("c", "a", "b"):
        await running.make(name)
    refused(await running.rest.post("/v1/models", json={"name": "a"}), 409, "ALREADY_EXISTS", "name")
    refused(await running.rest.post("/v1/models", json={"name": "Not OK"}), 422, "INVALID_ARGUMENT", "name")
    first = (await running.rest.get("/v1/models", params={"limit": 2})).json()
    assert ([m["name"] for m in first["models"]], first["next"]) == (["a", "b"], "b")
    assert [(m["id"], m["object"]) for m in first["data"]] == [("a", "model"), ("b", "model")]
    rest = (await running.rest.get("/v1/models", params={"limit": 2, "after": first["next"]})).json()
    assert ([m["name"] for m in rest["models"]], rest["next"]) == (["c"], None)
    changed = (await running.rest.patch("/v1/models/a", json={"description": "d", "tags": {"k": "v"}})).json()
    assert (changed["description"], changed["tags"]) == ("d", {"k": "v"})
    kept = (await running.rest.patch("/v1/models/a", json={"tags": {}})).json()
    assert (kept["description"], kept["tags"]) == ("d", {})
    assert (await running.rest.get("/v1/models/a")).json() == kept
    # One is shown to OpenAI's clients as it is listed.
    assert {name: kept[name] for name in first["data"][0]} == first["data"][0]


async def test_keys_are_shown_once_and_published_as_hashes(running: Running, kafka_bootstrap: str) -> None:
    made = await running.rest.post(
        "/v1/keys",
        json={"name": "ci", "scopes": ["read", "predict"], "rate_per_second": 2.5, "models": ["churn"]},
    )
    assert made.status_code == 201, made.text
    key = made.json()
    text = key.pop("key")
    assert text.startswith(f"hr_{key['key_id']}_")
    assert len(text) == 3 + 12 + 1 + 43
    listed = await running.rest.get("/v1/keys")
    assert listed.json()["keys"] == [key]
    assert text not in listed.text
    async with following(kafka_bootstrap, KEYS) as known:

        def on_topic() -> ApiKey:
            return ApiKey.FromString(known.get(key["key_id"]) or b"")

        await eventually(lambda: on_topic().key_id)
        record = on_topic()
        assert record.key_sha256 == hashlib.sha256(text.encode()).digest()
        assert (list(record.scopes), record.rate_per_second, record.burst) == (["predict", "read"], 2.5, 3)
        assert (list(record.models), record.revoked, record.revision) == (["churn"], False, 1)
        assert (await running.rest.delete(f"/v1/keys/{key['key_id']}")).status_code == 204
        await eventually(lambda: on_topic().revoked)
        assert on_topic().revision == 2
        assert (await running.rest.delete(f"/v1/keys/{key['key_id']}")).status_code == 204
    assert (await running.rest.get("/v1/keys")).json()["keys"][0]["revoked"] is True
    refused(await running.rest.delete("/v1/keys/none"), 404, "NOT_FOUND", "key_id")
    past = {"name": "x", "expires_at": "2020-01-01T00:00:00Z"}
    refused(await running.rest.post("/v1/keys", json=past), 422, "INVALID_ARGUMENT", "expires_at")
    refused(
        await running.rest.post("/v1/keys", json={"name": "x", "scopes": ["root"]}),
        422,
        "INVALID_ARGUMENT",
        "scopes[0]",
    )


async def test_only_services_get_in(running: Running) -> None:
    async with httpx.AsyncClient(base_url=str(running.rest.base_url), timeout=PATIENCE_S) as stranger:
        refused(await stranger.get("/v1/models"), 401, "UNAUTHENTICATED", None)
        assert (await stranger.get("/health/live")).status_code == 200
        assert (await stranger.get("/health/ready")).status_code == 200
        assert "headrace_registry_versions_created_total" in (await stranger.get("/metrics")).text


async def test_strange_names_are_answered_not_crashed_on(running: Running) -> None:
    for path in (
        "/v1/models/%00",
        "/v1/models/%ff",
        "/v1/models/a/versions/%00",
        "/v1/deployments/%00",
        "/v1/keys/%00",
    ):
        answer = await (running.rest.delete(path) if "keys" in path else running.rest.get(path))
        assert answer.status_code in {404, 422}, answer.text
    assert (await running.rest.get("/v1/models", params={"after": "\x00"})).status_code == 422
    tags = {"name": "a", "tags": {"k": "\x00"}}
    assert (await running.rest.post("/v1/models", json=tags)).status_code == 422
    assert (await running.rest.post("/v1/models", json=tags | {"tags": {"\x00": "v"}})).status_code == 422
    late = "9999-12-31T23:59:59-01:00"
    for key in ({"name": "\x00"}, {"name": "late", "expires_at": late}):
        assert (await running.rest.post("/v1/keys", json=key)).status_code == 422
    assert (
        await running.rest.post("/v1/models", content=b"{", headers={"content-type": "application/json"})
    ).status_code == 400
    mistaken = await running.rest.post("/v1/models", content=bytes(MAX_BODY_BYTES + 1))
    assert (mistaken.status_code, mistaken.json()["code"]) == (413, "INVALID_ARGUMENT")


async def test_versions_are_listed_page_by_page_oldest_first(running: Running) -> None:
    await running.make("paged", *[linear(weight=n) for n in range(1, 6)])
    assert (await running.upload("paged", {"model.onnx": linear(weight=9)}, version="0")).status_code == 201
    await running.make("other", linear())

    async def page(**asked: Any) -> tuple[list[str], str | None]:
        answer = await running.rest.get("/v1/models/paged/versions", params=asked)
        assert answer.status_code == 200, answer.text
        return [version["version"] for version in answer.json()["versions"]], answer.json()["next"]

    assert await page() == (["1", "2", "3", "4", "5", "0"], None)
    assert await page(limit=2) == (["1", "2"], "2")
    assert await page(limit=2, after="2") == (["3", "4"], "4")
    assert (await running.rest.delete("/v1/models/paged/versions/4")).status_code == 204
    assert await page(limit=2, after="4") == (["5", "0"], None)  # it knows its place still
    assert await page(limit=5) == (["1", "2", "3", "5", "0"], None)
    unknown = await running.rest.get("/v1/models/paged/versions", params={"after": "nothing"})
    refused(unknown, 422, "INVALID_ARGUMENT", "after")
