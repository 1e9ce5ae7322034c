"""The command line against a gateway on loopback."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from headrace_client import cli


class Gateway:
    """Answers by (method, path); keeps what was asked."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str], tuple[int, Any]] = {}
        #: By path, where it is not the answer's JSON.
        self.bodies: dict[str, bytes] = {}
        self.asked: list[tuple[str, str, str | None, bytes]] = []
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                length = int(self.headers.get("content-length", 0))
                body = self.rfile.read(length)
                gateway.asked.append((self.command, self.path, self.headers.get("authorization"), body))
                status, said = gateway.answers.get(
                    (self.command, self.path),
                    (200 if self.path in gateway.bodies else 404, {"detail": "nothing here"}),
                )
                content = gateway.bodies.get(self.path, json.dumps(said).encode())
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_DELETE = answer  # noqa: N815 - the names that http.server looks for

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    gateway = Gateway()
    thread = threading.Thread(target=gateway.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HEADRACE_URL", gateway.url)
    monkeypatch.setenv("HEADRACE_API_KEY", "hr_given")
    yield gateway
    gateway.server.shutdown()
    thread.join(timeout=5)
    gateway.server.server_close()


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["headrace", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_predict_prints_the_answer(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = {"request_id": "r", "model": "cancer", "version": "1", "prediction": ["benign"], "outputs": {}}
    gateway.answers["POST", "/v1/predict"] = (200, answer | {"cached": False, "latency_ms": 2.0})
    inputs = tmp_path / "rows.json"
    inputs.write_text("[[1, 2]]")
    assert run(monkeypatch, "predict", "cancer", "--inputs", f"@{inputs}", "--user", "alice") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == answer | {"cached": False, "latency_ms": 2.0}
    _, _, credential, body = gateway.asked[0]
    assert credential == "Bearer hr_given"
    assert json.loads(body) == {"model": "cancer", "inputs": [[1, 2]], "user_id": "alice"}


def test_a_refusal_is_one_line_with_code_field_and_request(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {"detail": "No such column.", "code": "INVALID_ARGUMENT", "field": "inputs.x", "request_id": "ab"}
    gateway.answers["POST", "/v1/predict"] = (422, said)
    assert run(monkeypatch, "predict", "cancer", "--inputs", "[[1]]") == 1
    shown = capsys.readouterr().err
    assert shown == "headrace: No such column. (field inputs.x, INVALID_ARGUMENT, request ab)\n"


def test_deploy_takes_versions_and_percents(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shares = [{"version": "v1", "weight": 90.0}, {"version": "v2", "weight": 10.0}]
    gateway.answers["PUT", "/v1/deployments/cancer"] = (200, {"versions": shares, "revision": 4})
    assert run(monkeypatch, "deploy", "cancer", "v1=90", "v2=10") == 0
    assert json.loads(gateway.asked[-1][3]) == {"versions": shares}
    assert "cancer: v1 90%, v2 10% (revision 4)" in capsys.readouterr().out


def test_push_uploads_and_sets_the_alias(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(b"onnx")
    gateway.answers["POST", "/v1/models"] = (201, {})
    gateway.answers["POST", "/v1/models/m/versions"] = (
        201,
        {"version": "3", "artifact_digest": "sha256:ab", "signature": {"inputs": [], "outputs": []}},
    )
    gateway.answers["PUT", "/v1/models/m/aliases/champion"] = (200, {})
    words = ["models", "push", "m", str(model), "--metrics", '{"f1": 0.5}', "--alias", "champion"]
    words += ["--feature-names", "a,b", "--input-name", "x", "--tag", "team=blue", "--tag", "query=a=b"]
    assert run(monkeypatch, *words) == 0
    body = gateway.asked[1][3]
    assert b'"metrics": {"f1": 0.5}' in body
    assert b'"signature": {"inputs": [{"name": "x", "columns": ["a", "b"]}]}' in body
    assert b'"tags": {"team": "blue", "query": "a=b"}' in body
    assert json.loads(gateway.asked[2][3]) == {"version": "3"}
    assert "m version 3" in capsys.readouterr().out


def test_a_new_key_is_the_only_thing_on_standard_output(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {"key": "hr_secret", "key_id": "x", "name": "ci", "scopes": ["predict", "read"]}
    gateway.answers["POST", "/v1/keys"] = (201, made)
    assert run(monkeypatch, "keys", "create", "ci", "--scope", "predict", "--scope", "read") == 0
    assert capsys.readouterr().out == "hr_secret\n"


def test_models_are_listed(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [{"name": "cancer", "aliases": {"champion": "1"}, "description": "Diagnosis"}]
    gateway.answers["GET", "/v1/models"] = (200, {"models": found, "next": None})
    assert run(monkeypatch, "models", "list") == 0
    shown = capsys.readouterr().out
    assert "cancer" in shown
    assert "champion → 1" in shown


def test_the_key_that_up_wrote_is_found_from_a_folder_below(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HEADRACE_API_KEY")
    (tmp_path / ".headrace").mkdir()
    (tmp_path / ".headrace" / "admin.key").write_text("hr_kept\n")
    (tmp_path / "deep" / "down").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "down")
    gateway.answers["GET", "/v1/models"] = (200, {"models": [], "next": None})
    assert run(monkeypatch, "models", "list") == 0
    assert gateway.asked[0][2] == "Bearer hr_kept"


def test_results_are_joined_with_their_inputs(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = {"row": 1, "custom_id": "b", "outputs": {"y": 2}}
    failure = {"row": 0, "custom_id": "a", "error": {"code": "INTERNAL"}}
    gateway.answers["GET", "/v1/batch/b1/results?format=jsonl"] = (200, answer)
    gateway.answers["GET", "/v1/batch/b1/errors"] = (200, failure)
    inputs = tmp_path / "in.jsonl"
    rows: list[dict[str, Any]] = [{"custom_id": "a", "x": "ä\u2028"}, {"custom_id": "b", "x": 1}]
    inputs.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    expected = [
        {"custom_id": "a", "input": rows[0], "error": {"code": "INTERNAL"}},
        {"custom_id": "b", "input": rows[1], "outputs": {"y": 2}},
    ]
    words = ("batch", "results", "b1", "--join", str(inputs))
    assert run(monkeypatch, *words) == 0
    shown = capsys.readouterr().out
    assert [json.loads(line) for line in shown.split("\n") if line] == expected
    assert run(monkeypatch, *words, "--output", str(tmp_path / "out")) == 0
    assert (tmp_path / "out").read_text("utf-8") == shown
    for wrong in ('{"x": 1}', "[1]", "{"):
        inputs.write_text(wrong)
        assert run(monkeypatch, *words) == 1
        assert str(inputs) in capsys.readouterr().err
    assert run(monkeypatch, *words, "--format", "parquet") == 1


SIGNATURE = {
    "inputs": [{"name": "X", "datatype": "FP32", "shape": [-1, 3]}],
    "outputs": [
        {"name": "label", "datatype": "INT64", "shape": [-1]},
        {"name": "p", "datatype": "FP32", "shape": [-1, 2]},
    ],
}


def test_push_shows_the_signature_and_what_comes_next(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(b"onnx")
    pushed = {"version": "3", "artifact_digest": "sha256:ab", "signature": SIGNATURE}
    gateway.answers["POST", "/v1/models"] = (409, {})
    gateway.answers["POST", "/v1/models/m/versions"] = (201, pushed)
    assert run(monkeypatch, "models", "push", "m", str(model)) == 0
    shown = capsys.readouterr()
    assert "X FP32[-1,3] → label INT64[-1], p FP32[-1,2]" in shown.out
    assert "headrace deploy m 3=100" in shown.out
    assert shown.err == ""


def test_a_model_is_shown_with_its_versions_and_their_traffic(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    version = {"created_at": "2026-11-22T05:57:50Z", "metrics": {"auc": 0.91}, "signature": SIGNATURE}
    versions = [{"version": "1", **version}, {"version": "2", **version}]
    gateway.answers["GET", "/v1/models/m"] = (200, {"name": "m", "aliases": {"champion": "1"}})
    gateway.answers["GET", "/v1/models/m/versions"] = (200, {"versions": versions})
    assert run(monkeypatch, "models", "show", "m") == 0
    assert "%" not in capsys.readouterr().out  # it is not deployed
    deployed = {"versions": [{"version": "1", "weight": 90.0}]}
    gateway.answers["GET", "/v1/deployments/m"] = (200, deployed)
    assert run(monkeypatch, "models", "show", "m") == 0
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert first.split()[:6] == ["1", "champion", "90%", "2026-11-22", "auc", "0.91"]
    assert second.split()[:2] == ["2", "2026-11-22"]


def test_an_alias_is_set(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway.answers["PUT", "/v1/models/m/aliases/champion"] = (200, {})
    assert run(monkeypatch, "models", "alias", "m", "champion=2") == 0
    assert json.loads(gateway.asked[0][3]) == {"version": "2"}


def test_undeploy_and_revoke_delete(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway.answers["DELETE", "/v1/deployments/m"] = (204, None)
    gateway.answers["DELETE", "/v1/keys/abc"] = (204, None)
    assert run(monkeypatch, "undeploy", "m") == 0
    assert run(monkeypatch, "keys", "revoke", "abc") == 0
    assert [asked[:2] for asked in gateway.asked] == [
        ("DELETE", "/v1/deployments/m"),
        ("DELETE", "/v1/keys/abc"),
    ]


def test_keys_are_listed_page_by_page(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = {"name": "ci", "scopes": ["read"], "models": [], "rate_per_second": 5.0, "revoked": False}
    gateway.answers["GET", "/v1/keys"] = (200, {"keys": [{"key_id": "one", **key}], "next": "one"})
    past, coming = {"expires_at": "2026-01-01T00:00:00Z"}, {"expires_at": "2999-01-01T00:00:00Z"}
    others = [{"key_id": "old", **key, **past}, {"key_id": "new", **key, **coming}]
    last = {"key_id": "two", **key, **past, "revoked": True}
    gateway.answers["GET", "/v1/keys?after=one"] = (200, {"keys": [*others, last], "next": None})
    assert run(monkeypatch, "keys", "list") == 0
    first, *more = capsys.readouterr().out.splitlines()[1:]
    assert first.split() == ["one", "ci", "read", "all", "5", "valid"]
    assert [line.split()[-1] for line in more] == ["expired", "valid", "revoked"]


def test_brackets_in_words_of_others_are_brackets(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A key is shown once: whatever stands in its name, it must be."""
    name = "ci [/prod] [read]"
    made = {"key": "hr_made", "key_id": "made", "name": name, "scopes": ["predict"]}
    gateway.answers["POST", "/v1/keys"] = (201, made)
    assert run(monkeypatch, "keys", "create", name) == 0
    shown = capsys.readouterr()
    assert shown.out == "hr_made\n"
    assert name in shown.err
    one = {"name": "m", "aliases": {}, "description": name}
    gateway.answers["GET", "/v1/models"] = (200, {"models": [one], "next": None})
    assert run(monkeypatch, "models", "list") == 0
    assert name in capsys.readouterr().out


def test_a_comparison_is_told_in_words(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"summary": "no difference is shown yet", "warnings": ["Peeking"]}
    gateway.answers["GET", "/v1/analytics/models/m/compare?a=1&b=2&metric=revenue"] = (200, found)
    assert run(monkeypatch, "compare", "m", "1", "2", "--metric", "revenue") == 0
    assert capsys.readouterr().out == "no difference is shown yet\nwarning: Peeking\n"


def test_alerts_are_listed(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alert = {"opened_at": "2026-11-22T06:06:12.415+00:00", "state": "open", "severity": "critical"}
    found = [alert | {"message": "mean radius of m/1 has shifted"}]
    gateway.answers["GET", "/v1/drift/alerts?model=m&state=open"] = (200, {"alerts": found})
    gateway.answers["GET", "/v1/drift/alerts"] = (200, {"alerts": []})
    assert run(monkeypatch, "alerts", "m", "--state", "open") == 0
    told = "2026-11-22T06:06:12  open  critical: mean radius of m/1 has shifted\n"
    assert capsys.readouterr().out == told
    assert run(monkeypatch, "alerts") == 0
    assert capsys.readouterr().out == ""


def test_an_address_without_a_scheme_is_http(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway.answers["GET", "/v1/models"] = (200, {"models": [], "next": None})
    assert run(monkeypatch, "models", "list", "--url", gateway.url.removeprefix("http://")) == 0


def test_deploy_leaves_the_rest_of_a_deployment_as_it_is(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = [{"version": "1", "weight": 100.0}]
    settings = {"pool": "gpu", "cache": {"ttl_s": 60.0}, "fallback": {"version": "1", "on": []}}
    told = {"versions": shares, "revision": 4, "salt": "m", "shadow": None, **settings}
    gateway.answers["GET", "/v1/deployments/m"] = (200, told)
    gateway.answers["PUT", "/v1/deployments/m"] = (200, told)
    assert run(monkeypatch, "deploy", "m", "1=100") == 0
    assert json.loads(gateway.asked[-1][3]) == {"versions": shares, **settings}
    assert run(monkeypatch, "deploy", "m", "1=100", "--pool", "cpu") == 0
    assert json.loads(gateway.asked[-1][3])["pool"] == "cpu"


def test_deploy_leaves_variants_their_names(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = [
        {"version": "1", "weight": 50.0, "variant": "old"},
        {"version": "2", "weight": 50.0, "variant": "new"},
        {"version": "3", "weight": 0.0, "variant": "3"},
    ]
    told = {"versions": versions, "revision": 4, "aliases": {"champion": "1"}}
    gateway.answers["GET", "/v1/deployments/m"] = (200, told)
    gateway.answers["PUT", "/v1/deployments/m"] = (200, told)
    assert run(monkeypatch, "deploy", "m", "champion=80", "2=10", "3=5", "4=5") == 0
    assert json.loads(gateway.asked[-1][3])["versions"] == [
        {"version": "champion", "weight": 80.0, "variant": "old"},
        {"version": "2", "weight": 10.0, "variant": "new"},
        {"version": "3", "weight": 5.0},
        {"version": "4", "weight": 5.0},
    ]
