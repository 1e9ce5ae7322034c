"""The dashboard is one that Grafana loads, asks our Prometheus, and has no two panels in one place."""

from __future__ import annotations

import re
from itertools import combinations
from typing import Any

import pytest
import yaml

from tests.fixtures import promql
from tests.unit.deploy.metric_catalogue import TARGET, metrics

DASHBOARDS = promql.dashboards()


@pytest.fixture(params=sorted(DASHBOARDS))
def dashboard(request: pytest.FixtureRequest) -> dict[str, Any]:
    return DASHBOARDS[request.param]


def test_there_is_one() -> None:
    assert "headrace.json" in DASHBOARDS


def test_grafana_knows_it_again(dashboard: dict[str, Any]) -> None:
    """Without a database id, by a fixed uid: the same dashboard after each provisioning."""
    assert re.fullmatch(r"[a-z0-9-]{1,40}", dashboard["uid"])
    assert "id" not in dashboard
    assert dashboard["title"]
    assert dashboard["schemaVersion"] >= 39


def test_nobody_administers_grafana_by_a_password_that_everybody_knows() -> None:
    """Its image makes admin/admin, who may have it ask any container anything."""
    compose = yaml.safe_load((promql.DEPLOY / "docker-compose.yml").read_text())
    said = compose["services"]["grafana"]["environment"]
    assert said["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert said["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"


def test_panels_have_ids_of_their_own_and_stand_apart(dashboard: dict[str, Any]) -> None:
    panels = list(promql.panels(dashboard))
    ids = [panel["id"] for panel in panels]
    assert len(set(ids)) == len(ids)
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] >= 0
        assert place["x"] + place["w"] <= 24, panel["title"]
    for one, other in combinations(panels, 2):
        assert not _overlap(one["gridPos"], other["gridPos"]), (one["title"], other["title"])


def test_every_panel_asks_the_provisioned_data_source(dashboard: dict[str, Any]) -> None:
    provisioned = yaml.safe_load(
        (promql.DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yml").read_text()
    )
    known = {source["uid"]: source["type"] for source in provisioned["datasources"]}
    for panel in promql.panels(dashboard):
        if panel["type"] == "row":
            continue
        assert panel["targets"], panel["title"]
        for asked in (panel, *panel["targets"]):
            assert asked["datasource"] == {"type": "prometheus", "uid": "prometheus"}, panel["title"]
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters), panel["title"]
    assert known["prometheus"] == "prometheus"


def test_variables_that_are_used_are_declared(dashboard: dict[str, Any]) -> None:
    declared = {variable["name"] for variable in dashboard["templating"]["list"]}
    text = " ".join(
        target["expr"] for panel in promql.panels(dashboard) for target in panel.get("targets", ())
    )
    used = {name for name in re.findall(r"\$(\w+)", text) if not name.startswith("__")}
    assert used == declared


def test_legends_name_labels_that_the_query_keeps(dashboard: dict[str, Any]) -> None:
    known = metrics()
    for panel in promql.panels(dashboard):
        for target in panel.get("targets", ()):
            kept = re.match(r"(?:sum|min|max|avg) by \(([^)]*)\)", target["expr"])
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            if kept is not None:
                assert named <= {label.strip() for label in kept[1].split(",")}, target["expr"]
            elif named:
                for name in promql.metric_names(promql.filled(target["expr"])):
                    assert named <= known[name].labels | TARGET, target["expr"]


def _overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    across = one["x"] < other["x"] + other["w"] and other["x"] < one["x"] + one["w"]
    down = one["y"] < other["y"] + other["h"] and other["y"] < one["y"] + one["h"]
    return across and down
