"""The Python client and the command line against the whole platform."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import httpx
import numpy as np
import onnx
import pytest
from headrace_client import (
    AsyncHeadrace,
    Conflict,
    Headrace,
    HeadraceError,
    InvalidRequest,
    NotFound,
    Outcome,
    PermissionDenied,
    Unauthenticated,
)

from deploy.embedded.configuration import REPOSITORY
from deploy.embedded.stack import Stack
from tests.fixtures.onnx_models import mlp
from tests.fixtures.waiting import PATIENCE_S

T = TypeVar("T")


def eventually(ask: Callable[[], T], good: Callable[[T], bool] = bool) -> T:
    """The first good answer; errors of the client count as not yet."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            answer = ask()
            if good(answer) or time.monotonic() > deadline:
                return answer
        except HeadraceError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


@pytest.fixture(scope="module")
def model(bare_platform: Stack, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of its own with two versions, deployed 100/0."""
    name = f"client-{uuid.uuid4().hex[:8]}"
    told: list[tuple[int, int]] = []
    with Headrace(bare_platform.rest_url, bare_platform.admin_key) as headrace:
        for seed in (1, 2):
            file = tmp_path_factory.mktemp("model") / "model.onnx"
            file.write_bytes(mlp(seed=seed)[0])
            pushed = headrace.push_model(
                name, file, metadata={"metrics": {"accuracy": 0.9}}, progress=lambda *at: told.append(at)
            )
            assert pushed["version"] == str(seed)
            assert told[-1] == (file.stat().st_size, file.stat().st_size)
        headrace.set_alias(name, "challenger", "2")
        deployed = headrace.deploy(name, {"1": 100, "2": 0}, variants={"2": "new"})
        assert [(it["version"], it["weight"]) for it in deployed["versions"]] == [("1", 100.0), ("2", 0.0)]
        eventually(lambda: headrace.predict(name, [[0.0] * 30]))
        eventually(lambda: headrace.predict(name, [[0.0] * 30], version="2"))
    return name


async def test_both_clients_get_the_same_prediction(bare_platform: Stack, model: str) -> None:
    row = np.linspace(-1, 1, 30, dtype=np.float32)
    with Headrace(bare_platform.rest_url, bare_platform.admin_key) as headrace:
        first = headrace.predict(model, [row], user_id="alice")
        inferred = headrace.infer(model, {"x": row.reshape(1, 30)}, version="1", request_id="mine")
        challenger = headrace.predict(model, [row], version="challenger")
    async with AsyncHeadrace(bare_platform.rest_url, bare_platform.admin_key) as headrace_async:
        second = await headrace_async.predict(model, [row], user_id="alice")
    assert first.version == second.version == "1"
    assert first.outputs == second.outputs
    assert challenger.version == "2"
    assert inferred.version == "1"
    np.testing.assert_allclose(inferred.outputs["y"], np.array(first.outputs["y"], np.float32), rtol=1e-6)


def test_management_through_the_gateway(bare_platform: Stack, model: str) -> None:
    with Headrace(bare_platform.rest_url, bare_platform.admin_key) as headrace:
        assert model in {found["name"] for found in headrace.models()}
        assert headrace.model(model)["aliases"]["challenger"] == "2"
        assert [found["version"] for found in headrace.versions(model)] in (["1", "2"], ["2", "1"])
        assert headrace.deployment(model)["versions"][0]["weight"] == 100.0
        assert headrace.alerts(model) == []
        answers = [headrace.predict(model, [[0.1] * 30], version=version) for version in ("1", "2")]
        outcomes = [Outcome(answer.request_id, metric="revenue", value=1.5) for answer in answers]
        assert len(set(headrace.outcomes(outcomes))) == 2
        compared = eventually(lambda: headrace.compare(model, "1", "2", "error_rate"))
        assert compared


def test_errors_arrive_as_types(bare_platform: Stack, model: str) -> None:
    with Headrace(bare_platform.rest_url, bare_platform.admin_key) as headrace:
        with pytest.raises(InvalidRequest) as wrong:
            headrace.predict(model, [[0.0] * 29])
        assert (wrong.value.status, wrong.value.code) == (422, "INVALID_ARGUMENT")
        assert wrong.value.field is not None
        assert wrong.value.request_id
        with pytest.raises(NotFound):
            headrace.predict("nobody", [[0.0]])
        with pytest.raises(NotFound):
            headrace.infer("nobody", {"x": np.zeros((1, 30), np.float32)})
        limited = headrace.create_key("client test", ["predict"])
    with Headrace(bare_platform.rest_url, limited.key) as headrace:
        eventually(lambda: headrace.predict(model, [[0.0] * 30]))
        with pytest.raises(PermissionDenied):
            headrace.deploy(model, {"1": 50, "2": 50})
    with Headrace(bare_platform.rest_url, None) as headrace, pytest.raises(Unauthenticated):
        headrace.predict(model, [[0.0] * 30])


def test_a_model_that_no_worker_can_load_is_not_ready_and_says_why(
    bare_platform: Stack, tmp_path: Path
) -> None:
    """It is a valid file, so that it can be pushed and deployed."""
    file, name = tmp_path / "model.onnx", f"broken-{uuid.uuid4().hex[:8]}"
    model = onnx.load_from_string(mlp()[0])
    model.graph.node[-1].op_type = "NoSuchOperator"
    file.write_bytes(model.SerializeToString())
    key = {"authorization": f"Bearer {bare_platform.admin_key}"}
    with (
        Headrace(bare_platform.rest_url, bare_platform.admin_key) as headrace,
        httpx.Client(base_url=bare_platform.rest_url, headers=key) as client,
    ):
        headrace.push_model(name, file)
        headrace.deploy(name, {"1": 100})

        def state() -> dict[str, str]:
            listed = client.post("/v2/repository/index").json()
            return next((one for one in listed if one["name"] == name), {})

        found = eventually(state, lambda one: bool(one.get("reason")) and "no worker" not in one["reason"])
        assert found["state"] == "UNAVAILABLE"
        assert "NoSuchOperator" in found["reason"]
        ready = client.get(f"/v2/models/{name}/ready")
        assert (ready.status_code, ready.json()) == (503, {"name": name, "ready": False})
        assert name not in {
            one["name"] for one in client.post("/v2/repository/index", json={"ready": True}).json()
        }
        refused = client.post("/v1/predict", json={"model": name, "inputs": [[0.0] * 30]})
        assert refused.status_code == 503
        assert "cannot be loaded" in refused.json()["detail"]
        headrace.undeploy(name)


def test_a_version_is_never_overwritten(bare_platform: Stack, model: str, tmp_path: Path) -> None:
    other = tmp_path / "model.onnx"
    other.write_bytes(mlp(seed=99)[0])
    with Headrace(bare_platform.rest_url, bare_platform.admin_key) as headrace, pytest.raises(Conflict):
        headrace.push_model(model, other, version="1")


def test_the_command_line_against_the_platform(bare_platform: Stack, model: str) -> None:
    def headrace(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "headrace_client", *words],
            cwd=REPOSITORY,
            env={
                **os.environ,
                "PYTHONPATH": str(REPOSITORY / "client"),
                "HEADRACE_URL": bare_platform.rest_url,
                "HEADRACE_API_KEY": bare_platform.admin_key,
            },
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    predicted = headrace("predict", model, "--inputs", str([[0.0] * 30]), "--user", "alice")
    assert predicted.returncode == 0, predicted.stderr
    assert '"version": "1"' in predicted.stdout
    assert model in headrace("models", "list").stdout
    assert f"{model}: 1 100%, 2 0%" in headrace("deploy", model, "1=100", "2=0").stdout
    refused = headrace("deploy", model, "1=60", "2=60")
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
