"""What the gateway counts, by route, model and status."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from services.gateway.catalogue import Catalogue
from services.gateway.metrics import GatewayMetrics
from tests.fixtures.gateway import configs


def test_models_that_come_and_go_leave_no_labels_behind() -> None:
    catalogue, registry = Catalogue(), CollectorRegistry()
    metrics = GatewayMetrics(registry, lambda model: catalogue.find(model) is not None)
    (config, *_) = configs()

    def labelled() -> set[str]:
        return {
            sample.labels["model"]
            for family in registry.collect()
            for sample in family.samples
            if "model" in sample.labels
        }

    metrics.observe("predict", "", 404, 0.1)
    for number in range(20):
        config.model = f"m{number}"
        catalogue.apply(config.model.encode(), config.SerializeToString())
        metrics.cell("predict", config.model, 200).observe(0.1)
        assert labelled() == {"", config.model}
        catalogue.apply(config.model.encode(), None)
        metrics.observe("predict", config.model, 503, 0.1)  # it was on its way
    assert labelled() == {""}
    count = registry.get_sample_value(
        "headrace_gateway_requests_total", {"route": "predict", "model": "", "status": "404"}
    )
    assert count == 1
