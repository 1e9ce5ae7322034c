"""Alerts and dashboards ask for metrics that exist, and each alert is tried."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fixtures import promql
from tests.unit.deploy.metric_catalogue import TARGET, metric_names, metrics

CASES = Path(__file__).with_name("alerts_test.yml")
PROMTOOL = shutil.which("promtool")


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ('sum by (model, le) (rate(a_bucket{x="b(c)", y=~"d"}[5m])) > 0.01', {"a_bucket"}),
        ("(sum(a:b) or vector(0)) == 0 unless on (le) c offset 5m", {"a:b", "c"}),
        ('histogram_quantile(0.99, a{le="1"}) / ignoring(b) group_left(c) d_total > 1e9', {"a", "d_total"}),
    ],
)
def test_metric_names_are_found_in_an_expression(expression: str, names: set[str]) -> None:
    assert promql.metric_names(expression) == names


def test_every_metric_that_is_asked_for_exists() -> None:
    known = metric_names()
    assert {"headrace_worker_log_pending_bytes", "headrace_gateway_in_flight"} <= known
    asked = {
        name: expression for expression in promql.expressions() for name in promql.metric_names(expression)
    }
    unknown = {name: asked[name] for name in asked.keys() - known}
    assert len(asked) > 20
    assert not unknown


def test_every_label_that_is_asked_for_is_one_of_its_metric() -> None:
    """A label that nobody sets matches nothing, or everything: the panel is empty, the alert silent."""
    known = metrics()
    for expression in promql.expressions():
        asked = promql.labels_asked(expression)
        grouped = promql.labels_grouped_by(expression)
        for name in promql.metric_names(expression):
            unknown = (asked.get(name, set()) | grouped) - known[name].labels - TARGET
            assert not unknown, (unknown, expression)


def test_only_what_grows_has_a_rate() -> None:
    """Of a gauge, a rate is a number that looks like one."""
    known = metrics()
    asked = {name for expression in promql.expressions() for name in promql.metrics_with_a_rate(expression)}
    assert len(asked) > 20
    # Triton's counters have no kind.
    assert {name for name in asked if known[name].kind not in {"counter", "histogram", "unknown"}} == set()


def test_what_an_alert_says_names_labels_that_it_has() -> None:
    known = metrics()
    for rule in promql.alerts():
        grouped = promql.labels_grouped_by(rule["expr"])
        has = [known[name].labels | TARGET for name in promql.metric_names(rule["expr"])]
        named = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
        assert named <= (grouped or set.intersection(*map(set, has))), rule["alert"]


def test_every_alert_is_shown_to_fire_and_to_be_silent() -> None:
    names = {rule["alert"] for rule in promql.alerts()}
    cases: list[dict[str, Any]] = yaml.safe_load(CASES.read_text())["tests"]
    silent = {test["alertname"] for case in cases for test in case.get("alert_rule_test", ())}
    firing = {
        name
        for name in names
        for case in cases
        for test in case.get("promql_expr_test", ())
        if test["expr"] == f'ALERTS{{alertname="{name}", alertstate="firing"}}' and test["exp_samples"]
    }
    assert silent == firing == names


def test_every_alert_says_what_is_wrong_and_how_urgent_it_is() -> None:
    for rule in promql.alerts():
        assert rule["labels"]["severity"] in {"page", "ticket"}, rule["alert"]
        assert rule["annotations"].keys() == {"summary", "description"}, rule["alert"]


def test_only_predictions_are_asked_how_long_they_took() -> None:
    """Who waits for an async answer or follows a job is answered late by wish, and counted without model."""
    asked = [one for one in promql.expressions() if "headrace_gateway_request_seconds_bucket" in one]
    assert len(asked) > 1
    assert [one for one in asked if 'model!=""' not in one] == []


if PROMTOOL is not None:

    @pytest.mark.parametrize(
        "arguments",
        [
            ("check", "config", str(promql.DEPLOY / "prometheus" / "prometheus.yml")),
            ("check", "rules", str(promql.ALERTS)),
            ("test", "rules", str(CASES)),
        ],
        ids=lambda arguments: " ".join(arguments[:2]),
    )
    def test_prometheus_agrees(arguments: tuple[str, ...]) -> None:
        done = subprocess.run(
            [str(PROMTOOL), *arguments], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def test_prometheus_reads_every_query_of_the_dashboards(tmp_path: Path) -> None:
        rules = [
            {"record": f"query:{number}", "expr": expression}
            for number, expression in enumerate(promql.expressions())
        ]
        (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
        done = subprocess.run(
            [str(PROMTOOL), "check", "rules", str(tmp_path / "rules.yml")],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
