"""Experiments and rollouts from Python and from the command line, against a gateway that is a function."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from headrace_client import AsyncHeadrace, DeadlineExceeded, Headrace, cli, experiment_cli
from headrace_client.experiments import variants_of


class Gateway:
    """Answers by method and path; a list of answers is given one after the other, the last one for good."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers = answers
        self.asked: list[tuple[str, dict[str, str], Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else None
        what = f"{request.method} {request.url.path}"
        self.asked.append((what, dict(request.url.params), body))
        answer = self.answers[what]
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        return httpx.Response(200, json=answer)

    def client(self) -> Headrace:
        return Headrace("http://gateway", "hr_key", transport=httpx.MockTransport(self))

    def async_client(self) -> AsyncHeadrace:
        return AsyncHeadrace("http://gateway", "hr_key", transport=httpx.MockTransport(self))


def event(number: int, weight: float, action: str = "enter") -> dict[str, Any]:
    at = f"2026-01-01T00:00:{number:02}Z"
    return {"number": number, "at": at, "weight": weight, "action": action, "reason": f"because {number} [x]"}


def events(*numbers: int, following: int | None = None) -> dict[str, Any]:
    return {"events": [event(number, number / 100) for number in numbers], "next": following}


EXPERIMENT = {"experiment_id": "exp_1", "status": "running"}


def test_variants_share_equally_in_whole_ten_thousandths() -> None:
    made = variants_of({"a": "1", "b": "2", "c": "3"})
    assert [one["weight"] for one in made] == [0.3334, 0.3333, 0.3333]
    assert [(one["name"], one["version"]) for one in made] == [("a", "1"), ("b", "2"), ("c", "3")]
    given = [{"name": "a", "version": "1", "weight": 0.9}]
    assert variants_of(given) == given


def test_experiments_from_python() -> None:
    paths = ["POST /v1/experiments", "PATCH /v1/experiments/exp_1", "POST /v1/experiments/exp_1/start"]
    paths += ["POST /v1/experiments/exp_1/stop", "GET /v1/experiments/exp_1/assignment"]
    gateway = Gateway(dict.fromkeys(paths, EXPERIMENT))
    given = {"control": "1", "new": "2"}
    with gateway.client() as client:
        made = client.experiments.create("m", given, unit="session")
        client.experiments.patch(made["experiment_id"], traffic=0.5)
        client.experiments.start("exp_1")
        client.experiments.stop("exp_1", winner="new")
        client.experiments.assignment("exp_1", "alice", attributes={"vip": True, "age": 4})
    variants = [
        {"name": name, "version": version, "weight": 0.5}
        for name, version in (("control", "1"), ("new", "2"))
    ]
    assert gateway.asked == [
        (paths[0], {}, {"model": "m", "variants": variants, "unit": "session"}),
        (paths[1], {}, {"traffic": 0.5}),
        (paths[2], {}, None),
        (paths[3], {}, {"winner": "new"}),
        (paths[4], {"unit": "alice", "attribute.vip": "true", "attribute.age": "4"}, None),
    ]


def test_lists_follow_their_pages() -> None:
    pages = [{"experiments": [{"n": 1}], "next": "a"}, {"experiments": [{"n": 2}], "next": None}]
    gateway = Gateway({"GET /v1/experiments": pages})
    with gateway.client() as client:
        assert [one["n"] for one in client.experiments.list(model="m")] == [1, 2]
    assert [params for _, params, _ in gateway.asked] == [{"model": "m"}, {"model": "m", "after": "a"}]


def rollout(*statuses: str) -> Gateway:
    """A rollout that has these states when it is looked at, and three decisions by then."""
    states = [{"rollout_id": "rol_1", "status": status, "reason": "it failed [5]"} for status in statuses]
    pages = [events(2, 1), events(4, 3, 2, following=2), events(1)]
    return Gateway(
        {
            "GET /v1/rollouts/rol_1": states,
            "GET /v1/rollouts/rol_1/events": pages,
            "POST /v1/rollouts": {"rollout_id": "rol_1"},
        }
    )


def test_watching_gives_every_decision_once_and_in_order() -> None:
    gateway = rollout("running", "completed")
    with gateway.client() as client:
        seen = [one["number"] for one in client.rollouts.watch("rol_1", every=0)]
    assert seen == [1, 2, 3, 4]


async def test_watching_does_so_awaited_too() -> None:
    gateway = rollout("running", "completed")
    async with gateway.async_client() as client:
        assert [one["number"] async for one in client.rollouts.watch("rol_1", every=0)] == [1, 2, 3, 4]
        assert (await client.rollouts.wait("rol_1"))["status"] == "completed"


def test_waiting_ends_with_its_patience() -> None:
    with rollout("running").client() as client, pytest.raises(DeadlineExceeded):
        client.rollouts.wait("rol_1", timeout=0.0, every=0.01)


def run(monkeypatch: pytest.MonkeyPatch, gateway: Gateway, *words: str) -> int:
    @contextmanager
    def connected(url: str, key: str | None) -> Iterator[Headrace]:
        with gateway.client() as client:
            yield client

    for module in (cli, experiment_cli):
        monkeypatch.setattr(module, "connected", connected)
    monkeypatch.setattr(sys, "argv", ["headrace", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_a_canary_starts_in_one_line_and_tells_its_steps_and_reasons(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway = rollout("completed")
    words = ["rollouts", "start", "m", "2", "--steps", "1,50,100", "--min-requests", "200", "--watch"]
    assert run(monkeypatch, gateway, *words) == 0
    steps = [{"weight": 0.01, "min_requests": 200}, {"weight": 0.5, "min_requests": 200}, {"weight": 1.0}]
    assert gateway.asked[0] == ("POST /v1/rollouts", {}, {"model": "m", "version": "2", "steps": steps})
    assert capsys.readouterr().out.splitlines() == [
        "rol_1",
        "00:00:01    1%  enter: because 1 [x]",
        "00:00:02    2%  enter: because 2 [x]",
    ]


def test_watching_one_that_is_rolled_back_fails_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, rollout("rolled_back"), "rollouts", "watch", "rol_1") == 1
    assert capsys.readouterr().err == "headrace: rol_1 is rolled_back: it failed [5]\n"


def test_an_experiment_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway = Gateway({"POST /v1/experiments": EXPERIMENT})
    words = ["experiments", "create", "m", "control=1", "new=2", "--metric", "bought=increase", "--start"]
    words += ["--weight", "90", "--weight", "10", "--traffic", "50", "--spec", '{"auto_stop": true}']
    assert run(monkeypatch, gateway, *words) == 0
    assert capsys.readouterr().out == "exp_1\n"
    ((_, _, body),) = gateway.asked
    assert body == {
        "model": "m",
        "variants": [
            {"name": "control", "version": "1", "weight": 0.9},
            {"name": "new", "version": "2", "weight": 0.1},
        ],
        "traffic": 0.5,
        "metrics": [{"name": "bought", "role": "success", "direction": "increase"}],
        "auto_stop": True,
        "start": True,
    }


def test_percents_keep_the_digits_they_were_written_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server takes four decimals of a share, and 1.1 / 100 has more."""
    gateway = rollout("completed")
    assert run(monkeypatch, gateway, "rollouts", "start", "m", "2", "--steps", "0.07,1.1,100") == 0
    assert [step["weight"] for step in gateway.asked[0][2]["steps"]] == [0.0007, 0.011, 1.0]
    gateway = Gateway({"POST /v1/experiments": EXPERIMENT})
    words = ["experiments", "create", "m", "a=1", "b=2", "--weight", "1.1", "--weight", "98.9"]
    assert run(monkeypatch, gateway, *words, "--traffic", "2.2") == 0
    body = gateway.asked[0][2]
    assert [variant["weight"] for variant in body["variants"]] == [0.011, 0.989]
    assert body["traffic"] == 0.022


def test_a_share_below_one_percent_is_not_shown_as_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = {"rollout_id": "rol_1", "model": "m", "previous_version": "1", "version": "2", "weight": 0.005}
    listed = {"rollouts": [one | {"status": "running", "reason": "because"}], "next": None}
    assert run(monkeypatch, Gateway({"GET /v1/rollouts": listed}), "rollouts", "list") == 0
    assert " 0.5% " in capsys.readouterr().out
    variants = [
        {"name": "a", "version": "1", "weight": 0.6667},
        {"name": "b", "version": "2", "weight": 0.3333},
    ]
    shown = {"model": "m", "name": "", "status": "running", "variants": variants}
    listed = {"experiments": [{**EXPERIMENT, **shown}], "next": None}
    assert run(monkeypatch, Gateway({"GET /v1/experiments": listed}), "experiments", "list") == 0
    assert "a (1) 66.67%, b (2) 33.33%" in capsys.readouterr().out


def test_results_are_words_and_the_assignment_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {"steps": ["layer bucket 7 of 10,000"], "because": "alice gets new."}
    gateway = Gateway(
        {
            "GET /v1/experiments/exp_1/results": {"summary": "new is better [p].", "warnings": ["few units"]},
            "GET /v1/experiments/exp_1/assignment": told,
        }
    )
    assert run(monkeypatch, gateway, "experiments", "results", "exp_1") == 0
    words = [
        "experiments",
        "assignment",
        "exp_1",
        "alice",
        "--attribute",
        "age=4",
        "--attribute",
        "country=DE",
    ]
    assert run(monkeypatch, gateway, *words) == 0
    assert capsys.readouterr().out.splitlines() == [
        "new is better [p].",
        "warning: few units",
        "  layer bucket 7 of 10,000",
        "alice gets new.",
    ]
    assert gateway.asked[1][1] == {"unit": "alice", "attribute.age": "4", "attribute.country": "DE"}


def test_predictions_carry_session_and_attributes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer: dict[str, Any] = {
        "request_id": "r",
        "model": "m",
        "version": "2",
        "prediction": [1],
        "outputs": {},
    }
    answer |= {"cached": False, "latency_ms": 1.0, "variant": "new", "experiment": "exp_1"}
    gateway = Gateway({"POST /v1/predict": answer})
    words = ["predict", "m", "--inputs", "[[1]]", "--session", "s", "--attribute", "vip=true"]
    assert run(monkeypatch, gateway, *words) == 0
    assert json.loads(capsys.readouterr().out)["experiment"] == "exp_1"
    ((_, _, body),) = gateway.asked
    assert body == {"model": "m", "inputs": [[1]], "session_id": "s", "attributes": {"vip": True}}
