"""How the command line takes things back, and what its exit code says."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from headrace_client import AsyncHeadrace
from headrace_client.errors import InvalidRequest

from tests.unit.client.test_batch_calls import event
from tests.unit.client.test_cli import Gateway, gateway, run

__all__ = ["gateway"]


def test_models_and_versions_are_deleted(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("/v1/models/m", "/v1/models/m/versions/2"):
        gateway.answers["DELETE", path] = (204, None)
    assert run(monkeypatch, "models", "delete", "m", "--version", "2") == 0
    assert run(monkeypatch, "models", "delete", "m") == 0
    assert [asked[:2] for asked in gateway.asked] == [
        ("DELETE", "/v1/models/m/versions/2"),
        ("DELETE", "/v1/models/m"),
    ]


@pytest.mark.parametrize(
    ("made", "left", "deleted"),
    [
        ((201, {}), [], True),
        ((201, {}), [{"version": "1"}], False),  # somebody else was quicker
        ((409, {"detail": "it is there already"}), [], False),
    ],
)
def test_a_refused_first_push_leaves_no_model_behind(
    gateway: Gateway,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    made: tuple[int, object],
    left: list[object],
    deleted: bool,
) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"no model")
    gateway.answers["POST", "/v1/models"] = made
    gateway.answers["POST", "/v1/models/m/versions"] = (422, {"detail": "it is no ONNX file"})
    gateway.answers["GET", "/v1/models/m/versions"] = (200, {"versions": left})
    gateway.answers["DELETE", "/v1/models/m"] = (204, None)
    assert run(monkeypatch, "models", "push", "m", str(file)) == 1
    assert "it is no ONNX file" in capsys.readouterr().err
    assert (("DELETE", "/v1/models/m") in [asked[:2] for asked in gateway.asked]) == deleted


async def test_the_async_client_leaves_no_model_behind_either(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"no model")
    answers = {
        ("POST", "/v1/models"): httpx.Response(201, json={}),
        ("POST", "/v1/models/m/versions"): httpx.Response(422, json={"detail": "it is no ONNX file"}),
        ("GET", "/v1/models/m/versions"): httpx.Response(200, json={"versions": []}),
        ("DELETE", "/v1/models/m"): httpx.Response(204),
    }
    gateway = httpx.MockTransport(lambda asked: answers.pop((asked.method, asked.url.path)))
    async with AsyncHeadrace("http://gateway", transport=gateway) as client:
        with pytest.raises(InvalidRequest):
            await client.push_model("m", file)
    assert not answers


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("30d", timedelta(days=30)),
        ("12h", timedelta(hours=12)),
        ("2999-01-31", datetime(2999, 1, 31, tzinfo=UTC)),
        ("2999-01-31T10:00:00+02:00", datetime(2999, 1, 31, 8, tzinfo=UTC)),
    ],
)
def test_a_key_expires_when_it_was_said(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, given: str, wanted: timedelta | datetime
) -> None:
    made = {"key": "hr_secret", "key_id": "x", "name": "ci", "scopes": ["predict"]}
    gateway.answers["POST", "/v1/keys"] = (201, made)
    before = datetime.now(UTC)
    assert run(monkeypatch, "keys", "create", "ci", "--expires", given) == 0
    sent = datetime.fromisoformat(json.loads(gateway.asked[-1][3])["expires_at"])
    after = datetime.now(UTC)
    if isinstance(wanted, datetime):
        assert sent == wanted
    else:
        assert before + wanted <= sent <= after + wanted


@pytest.mark.parametrize("given", ["soon", "30", "-1d", "99999999d"])
def test_an_expiry_that_nobody_understands_is_refused(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    assert run(monkeypatch, "keys", "create", "ci", f"--expires={given}") == 1
    assert "--expires" in capsys.readouterr().err
    assert not gateway.asked


def test_deploy_lets_go_of_what_is_not_wanted_any_more(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = [{"version": "2", "weight": 100.0}]
    roles = {"fallback": {"version": "1", "on": []}, "shadow": {"version": "1", "share": 5}}
    gateway.answers["GET", "/v1/deployments/m"] = (200, {"versions": [], "pool": "gpu", **roles})
    gateway.answers["PUT", "/v1/deployments/m"] = (200, {"versions": shares, "revision": 2})
    for words, kept in (
        (["--no-shadow"], {"fallback": roles["fallback"]}),
        (["--no-fallback"], {"shadow": roles["shadow"]}),
        (["--no-fallback", "--no-shadow"], {}),
    ):
        assert run(monkeypatch, "deploy", "m", "2=100", *words) == 0
        assert json.loads(gateway.asked[-1][3]) == {"versions": shares, "pool": "gpu", **kept}


def test_a_role_that_stands_in_the_way_is_told_how_it_goes(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal = {"detail": "version '1' is the only one served", "field": "shadow.version"}
    gateway.answers["PUT", "/v1/deployments/m"] = (422, refusal)
    assert run(monkeypatch, "deploy", "m", "2=100") == 1
    assert "--no-shadow" in capsys.readouterr().err


@pytest.mark.parametrize(("failed", "code"), [(0, 0), (3, 1)])
def test_a_watched_job_with_failed_rows_fails(
    gateway: Gateway,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failed: int,
    code: int,
) -> None:
    gateway.answers["POST", "/v1/batch"] = (202, {"batch_id": "b1"})
    ended = event(1, "completed", 3).replace('"failed": 0', f'"failed": {failed}')
    gateway.bodies["/v1/batch/b1/events"] = ended.encode()
    assert run(monkeypatch, "batch", "watch", "b1") == code
    assert run(monkeypatch, "batch", "submit", "m", "--inputs", "[[1]]", "--watch") == code
    out, err = capsys.readouterr()
    assert out == "b1\n"
    assert f"{failed} failed" in err
