"""Which variant a request gets, asked beforehand."""

from __future__ import annotations

from headrace.v1.control_pb2 import ServingConfig
from headrace.v1.dataplane_pb2 import PredictRequest

from services.registry import experiments
from services.registry.experiment_state import planned_layer, served_experiment
from services.registry.explanation import Explained, explain
from services.registry.repository import Repository


async def explain_assignment(tx: Repository, experiment_id: str, request: PredictRequest) -> Explained:
    """What an experiment makes of `request`; of a draft, what it would beside those that run now; of one that
    has stopped, what it would have made of it. Raises NotFound."""
    row = await experiments.get(tx, experiment_id)
    deployed = await tx.deployment(row.model)
    model = await tx.model(row.model)
    config = ServingConfig() if deployed is None else ServingConfig.FromString(deployed.config)
    running = any(experiment.experiment_id == experiment_id for experiment in config.experiments)
    if running:
        together = list(config.experiments)
    elif row.status in ("running", "stopped"):  # it was stopped between our two looks
        together = [served_experiment(row)]
    else:
        together = [*config.experiments, served_experiment(row, planned_layer(config, row))]
    holdout = 0 if model is None else model.holdout
    return explain(row.model, together, holdout, experiment_id, request, running=running)
