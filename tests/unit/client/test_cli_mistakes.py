"""What the command line says to who is new to it: mistakes are one sentence, and nothing needed is cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.client.test_cli import Gateway, gateway, run

__all__ = ["gateway"]


def test_wrong_words_are_one_line_too(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, sentence in (
        (("predict", "m", "--inputs", "{"), "--inputs is not JSON"),
        (("predict", "m", "--inputs", "@none.json"), "none.json cannot be read"),
        (("deploy", "m", "1"), "must look like name=value"),
        (("deploy", "m", "1=most"), "such as 1=90"),
        (("predict", "m", "--inputs", "[[NaN]]"), "it has no NaN"),
        (("predict", "m", "--inputs", "[[1e999]]"), "it has no 1e999"),
        (("predict", "m", "--inputs", 100_000 * "["), "recursion"),
        (("keys", "create", "ci", "--rate", "nan"), "not JSON compliant"),
        (("models", "list", "--url", "http://a:b"), "--url http://a:b is no address"),
        (("models", "list", "--key", "ü"), "No API key has such letters"),
        (("experiments", "plan", "x"), "What is planned is not JSON"),
        (("experiments", "create", "m", "a=1", "b=2", "--metric", "clicks"), "clicks=increase or …=decrease"),
        (("experiments", "create", "m", "a=1", "b=2", "--spec", '{"model": "m"}'), "--spec has model"),
        (("rollouts", "start", "m", "2", "--spec", '{"version": "2"}'), "--spec has version"),
    ):
        assert run(monkeypatch, *words) == 1
        said = capsys.readouterr().err
        assert sentence in said
        assert said.count("\n") == 1
    assert gateway.asked == []


def test_files_that_are_not_there_are_one_line_too(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.answers["GET", "/v1/batch/b1/results?format=jsonl"] = (200, {"row": 0, "outputs": {}})
    for folder in ("one", "two", "none"):
        (tmp_path / folder).mkdir()
        if folder != "none":
            (tmp_path / folder / "model.onnx").write_bytes(b"onnx")
    one, two, none = (str(tmp_path / folder) for folder in ("one", "two", "none"))
    for words, sentence in (
        (("models", "push", "m", none), "no file to push"),
        (("models", "push", "m", one, two), "would both be model.onnx"),
        (("batch", "results", "b1", "-o", f"{none}/deep/out"), "deep/out: No such file or directory."),
    ):
        assert run(monkeypatch, *words) == 1
        said = capsys.readouterr().err
        assert sentence in said
        assert said.count("\n") == 1


def test_a_server_of_another_kind_is_told_as_such(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.bodies["/v1/models"] = b"<html>"
    assert run(monkeypatch, "models", "list") == 1
    assert capsys.readouterr().err.startswith("headrace: The answer is no JSON")


def test_a_line_feed_behind_the_key_is_not_sent(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a secret that was mounted as a variable has it: the error would have shown the key."""
    monkeypatch.setenv("HEADRACE_API_KEY", "hr_given\n")
    gateway.answers["GET", "/v1/models"] = (200, {"models": [], "next": None})
    assert run(monkeypatch, "models", "list") == 0
    assert gateway.asked[0][2] == "Bearer hr_given"


def test_what_other_commands_take_is_never_cut(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    batch_id = "01a2052c3a937ea7afd62ff3271def3d"
    batch = {
        "batch_id": batch_id,
        "model": "a-model-with-a-long-name",
        "version": "1",
        "status": "completed",
        "counts": {"total": 1_000_000, "completed": 1_000_000, "failed": 0},
        "rows_per_s": 12_345.6,
        "time_left_s": None,
    }
    gateway.answers["GET", "/v1/batch?limit=100"] = (200, {"batches": [batch], "has_more": False})
    assert run(monkeypatch, "batch", "list") == 0
    shown = capsys.readouterr().out
    assert batch_id in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_what_somebody_new_would_ask_next_is_said(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = {"detail": "There is no model 'm' in service.", "field": "model", "code": "NOT_FOUND"}
    gateway.answers["POST", "/v1/predict"] = (404, problem)
    assert run(monkeypatch, "predict", "m", "--inputs", "[[1]]") == 1
    assert "headrace deploy MODEL VERSION=100" in capsys.readouterr().err
    assert run(monkeypatch, "models", "list", "--url", "http://127.0.0.1:1") == 1
    assert "headrace up" in capsys.readouterr().err
    problem = {"detail": "no worker is ready for m version 1", "code": "UNAVAILABLE"}
    gateway.answers["POST", "/v1/predict"] = (503, problem)
    assert run(monkeypatch, "predict", "m", "--inputs", "[[1]]") == 1
    assert "If that lasts, it cannot be loaded, and `headrace logs worker-0`" in capsys.readouterr().err
    problem["detail"] += ": it cannot be loaded, and POST /v2/repository/index says why"
    assert run(monkeypatch, "predict", "m", "--inputs", "[[1]]") == 1
    assert "So does `headrace logs worker-0`" in capsys.readouterr().err
