"""The registry over gRPC: the same layer below, so the same answers as over REST."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from headrace.v1 import registry_pb2 as pb
from headrace.v1.control_pb2 import Balancing, Batching, Cache, Fallback, Hedging, Shadow
from headrace.v1.tensor_pb2 import Code, Signature, TensorSpec

from deploy.embedded.tansu import TansuServer
from services.common.bus.admin import ensure_topics
from services.common.topics import DEPLOYMENTS, KEYS
from services.registry.views import DeploymentView, ModelView, VersionView
from tests.fixtures.onnx_files import linear
from tests.fixtures.registry import Running, registry_settings, running_registry


@pytest.fixture
def kafka_bootstrap(new_tansu: Callable[[], TansuServer]) -> str:
    """A broker of each test's own: a registry overtakes what another one of the same models left behind."""
    return new_tansu().url


@pytest.fixture
async def running(database_url: str, kafka_bootstrap: str, tmp_path: Path) -> AsyncIterator[Running]:
    await ensure_topics(kafka_bootstrap, [DEPLOYMENTS, KEYS])
    async with running_registry(registry_settings(database_url, kafka_bootstrap, tmp_path)) as registry:
        yield registry


async def upload(
    running: Running, header: pb.CreateVersionHeader, content: bytes, piece: int = 100
) -> pb.ModelVersion:
    async def messages() -> AsyncIterator[pb.CreateVersionRequest]:
        yield pb.CreateVersionRequest(header=header)
        for start in range(0, len(content), piece):
            yield pb.CreateVersionRequest(chunk=content[start : start + piece])

    version: pb.ModelVersion = await running.grpc.CreateVersion(messages(), metadata=running.credential)
    return version


def header_of(content: bytes, **fields: Any) -> pb.CreateVersionHeader:
    files = [pb.ArtifactFile(path="model.onnx", size=len(content))]
    return pb.CreateVersionHeader(**({"model": "churn", "files": files} | fields))


async def refusal(call: Any) -> tuple[grpc.StatusCode, str | None]:
    """Status and field of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    trailing: Any = caught.value.trailing_metadata() or ()
    return caught.value.code(), dict(trailing).get("headrace-field")


async def test_both_surfaces_give_the_same_answers(running: Running) -> None:
    call, credential = running.grpc, running.credential
    model = await call.CreateModel(
        pb.CreateModelRequest(name="churn", description="d", tags={"a": "b"}), metadata=credential
    )
    content = linear()
    made = await upload(
        running,
        header_of(
            content,
            metrics={"auc": 0.5},
            lineage=pb.Lineage(git_commit="abc"),
            signature=Signature(inputs=[TensorSpec(name="x", columns=["a", "b", "c"])]),
        ),
        content,
    )
    over_rest = await running.upload(
        "churn",
        {"model.onnx": content},
        version="1",
        metrics={"auc": 0.5},
        lineage={"git_commit": "abc"},
        signature={"inputs": [{"name": "x", "columns": ["a", "b", "c"]}]},
    )
    assert over_rest.status_code == 200, over_rest.text  # the very same version
    assert over_rest.json() == VersionView.of(made).model_dump(mode="json")
    aliased = await call.SetAlias(
        pb.SetAliasRequest(model="churn", alias="champion", version="1"), metadata=credential
    )
    assert dict(aliased.aliases) == {"champion": "1"}
    got = await call.GetModel(pb.GetModelRequest(name="churn"), metadata=credential)
    assert (await running.rest.get("/v1/models/churn")).json() == ModelView.of(got).model_dump(mode="json")
    assert (got.name, got.description, got.created_at_us) == (model.name, "d", model.created_at_us)
    await upload(running, header_of(content, version="2"), content)
    deployed = await call.Deploy(
        pb.DeployRequest(
            model="churn",
            versions=[pb.VersionWeight(version="1", weight=6667), pb.VersionWeight(version="2", weight=3333)],
            balancing=Balancing.BALANCING_CONSISTENT_HASH,
            batching=Batching(max_rows=64, preferred_rows=[8, 32]),
            disable_payload_log=True,
            default_timeout_ms=250,
            fallback=Fallback(version="1", on=[Code.CODE_INTERNAL]),
            cache=Cache(ttl_ms=2500),
            shadow=Shadow(version="2", share=50),
            hedging=Hedging(quantile=0.9),
        ),
        metadata=credential,
    )
    body = {
        "versions": [{"version": "1", "weight": 66.67}, {"version": "2", "weight": 33.33}],
        "balancing": "consistent_hash",
        "batching": {"max_rows": 64, "preferred_rows": [8, 32]},
        "log_payloads": False,
        "default_timeout_ms": 250,
        "fallback": {"version": "1", "on": ["INTERNAL"]},
        "cache": {"ttl_s": 2.5},
        "shadow": {"version": "2", "share": 0.5},
        "hedging": {"quantile": 0.9},
    }
    same = await running.rest.put("/v1/deployments/churn", json=body)
    assert same.json() == DeploymentView.of(deployed).model_dump(mode="json")
    fetched = await call.GetDeployment(pb.GetDeploymentRequest(model="churn"), metadata=credential)
    assert fetched == deployed
    versions = await call.ListVersions(pb.ListVersionsRequest(model="churn"), metadata=credential)
    listed = (await running.rest.get("/v1/models/churn/versions")).json()["versions"]
    assert listed == [VersionView.of(version).model_dump(mode="json") for version in versions.versions]
    models = await call.ListModels(pb.ListModelsRequest(limit=10), metadata=credential)
    assert ([m.name for m in models.models], models.next) == (["churn"], "")
    await call.Undeploy(pb.UndeployRequest(model="churn"), metadata=credential)
    assert (await running.rest.get("/v1/deployments/churn")).status_code == 404
    cleared = await call.SetAlias(pb.SetAliasRequest(model="churn", alias="champion"), metadata=credential)
    assert not cleared.aliases


async def test_errors_name_code_and_field(running: Running) -> None:
    call, credential = running.grpc, running.credential
    await running.make("churn", linear(weight=1), linear(weight=2))
    invalid, missing = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND

    def deploy(*shares: tuple[str, int], **fields: Any) -> Any:
        versions = [pb.VersionWeight(version=version, weight=weight) for version, weight in shares]
        request = pb.DeployRequest(model="churn", versions=versions, **fields)
        return call.Deploy(request, metadata=credential)

    assert await refusal(deploy(("1", 9900))) == (invalid, "versions")
    assert await refusal(deploy()) == (invalid, "versions")
    assert await refusal(deploy(("1", 10_001))) == (invalid, "versions[0].weight")
    assert await refusal(deploy(("9", 10_000))) == (invalid, "versions[0].version")
    both = ("1", 5000), ("2", 5000)
    assert await refusal(deploy(*both, fallback=Fallback(version="9"))) == (invalid, "fallback.version")
    unknown = Fallback(version="1", on=[99])  # type: ignore[list-item]  # of a later contract
    assert await refusal(deploy(*both, fallback=unknown)) == (invalid, "fallback.on[0]")
    assert await refusal(deploy(("1", 10_000), balancing=99)) == (invalid, "balancing")
    assert await refusal(deploy(("1", 10_000), expected_revision=3)) == (
        grpc.StatusCode.ABORTED,
        "expected_revision",
    )
    assert await refusal(call.GetModel(pb.GetModelRequest(name="no"), metadata=credential)) == (
        missing,
        "model",
    )
    assert await refusal(
        call.SetAlias(pb.SetAliasRequest(model="churn", alias="a", version="9"), metadata=credential)
    ) == (missing, "version")
    assert await refusal(
        call.SetAlias(pb.SetAliasRequest(model="churn", alias="7", version="1"), metadata=credential)
    ) == (invalid, "alias")
    for key, named in (("a b", "a b"), ("a\nb%", "a%0Ab%25"), ("é", "%C3%A9")):
        tagged = pb.CreateModelRequest(name="tagged", tags={key: "\0"})
        assert await refusal(call.CreateModel(tagged, metadata=credential)) == (invalid, f"tags.{named}")
    assert await refusal(call.CreateModel(pb.CreateModelRequest(name="churn"), metadata=credential)) == (
        grpc.StatusCode.ALREADY_EXISTS,
        "name",
    )


async def test_an_upload_must_be_what_its_header_says(running: Running) -> None:
    await running.make("churn")
    content, invalid = linear(), grpc.StatusCode.INVALID_ARGUMENT
    assert await refusal(upload(running, header_of(content), content[:-1])) == (invalid, "files")
    assert await refusal(upload(running, header_of(content), content + b"x")) == (invalid, "files")
    later = (
        (Signature(task=99), "signature.task"),  # type: ignore[arg-type]  # of a later contract
        (Signature(inputs=[TensorSpec(name="x", datatype=99)]), "signature.inputs[0].datatype"),  # type: ignore[arg-type]
    )
    for signature, field in later:
        assert await refusal(upload(running, header_of(content, signature=signature), content)) == (
            invalid,
            field,
        )
    lied = [pb.ArtifactFile(path="model.onnx", size=len(content), digest="sha256:" + "0" * 64)]
    assert await refusal(upload(running, header_of(content, files=lied), content)) == (invalid, "files")
    assert await refusal(upload(running, header_of(content, model="nobody"), content)) == (
        grpc.StatusCode.NOT_FOUND,
        "model",
    )

    async def headless() -> AsyncIterator[pb.CreateVersionRequest]:
        yield pb.CreateVersionRequest(chunk=content)

    call = running.grpc.CreateVersion(headless(), metadata=running.credential)
    assert await refusal(call) == (invalid, "header")
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    told = [
        pb.ArtifactFile(path="a.txt", size=0),
        pb.ArtifactFile(path="model.onnx", size=len(content), digest=digest),
        pb.ArtifactFile(path="z.txt", size=3),
    ]
    made = await upload(running, header_of(content, files=told), content + b"end", piece=7)
    assert [(f.path, f.size) for f in made.files] == [
        ("a.txt", 0),
        ("model.onnx", len(content)),
        ("z.txt", 3),
    ]


async def test_the_credential_is_asked_for_health_is_open(running: Running) -> None:
    status, _field = await refusal(running.grpc.ListModels(pb.ListModelsRequest()))
    assert status == grpc.StatusCode.UNAUTHENTICATED
    async with grpc.aio.insecure_channel(f"127.0.0.1:{running.registry.grpc_port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(service="headrace.v1.Registry"))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), metadata=running.credential
        )
        listed = await anext(aiter(asked))
    names = {service.name for service in listed.list_services_response.service}
    assert "headrace.v1.Registry" in names
