"""What the row of an experiment says, in the words of others: the router's, and those of next_step. Pure."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from headrace.v1.control_pb2 import Condition, Experiment, LayerRange, ServingConfig, Variant, VariantRange
from headrace.v1.tensor_pb2 import Parameter

from services.common.assignment import BUCKETS, Buckets, unit_digest
from services.registry.experiment_schemas import UNITS, ConditionIn, ExperimentIn, Value
from services.registry.experiment_steps import BanditBounds, Standing
from services.registry.layers import Span, own, size, weights_of
from services.registry.tables import ExperimentRow
from services.registry.trial_schemas import ten_thousandths

_OPERATORS = {
    "in": Condition.OPERATOR_IN,
    "not_in": Condition.OPERATOR_NOT_IN,
    "lt": Condition.OPERATOR_LESS,
    "lte": Condition.OPERATOR_LESS_OR_EQUAL,
    "gt": Condition.OPERATOR_GREATER,
    "gte": Condition.OPERATOR_GREATER_OR_EQUAL,
    "starts_with": Condition.OPERATOR_STARTS_WITH,
    "present": Condition.OPERATOR_PRESENT,
    "absent": Condition.OPERATOR_ABSENT,
}
OPERATOR_NAMES = {operator: name for name, operator in _OPERATORS.items()}


def spec_of(row: ExperimentRow) -> ExperimentIn:
    """What was asked for."""
    return ExperimentIn.model_validate(row.spec)


def stored(spec: ExperimentIn) -> dict[str, Any]:
    """`spec` for the row."""
    return spec.model_dump(mode="json", include=set(ExperimentIn.model_fields))


def layer_of(row: ExperimentRow) -> list[Span]:
    """Buckets of the model's layer that it owns, or owned last."""
    return [Span(first, last) for first, last in row.layer]


def start_of_layer(experiment_id: str) -> int:
    """Where an experiment begins to look for free buckets."""
    return Buckets("layer start").of(experiment_id.encode()) % BUCKETS


def standing_of(row: ExperimentRow) -> Standing:
    """What `next_step` decides by."""
    # Twice a second of every one: a thousand overrides take a hundred times as long to read as all the rest.
    spec = ExperimentIn.model_validate({**row.spec, "overrides": (), "targeting": ()})
    bandit = None
    if spec.bandit is not None:
        bandit = BanditBounds(
            ten_thousandths(spec.bandit.min_weight),
            ten_thousandths(spec.bandit.max_change),
            timedelta(seconds=spec.bandit.update_every_s),
        )
    return Standing(
        status=row.status,
        revision=row.revision,
        variants=tuple(variant.name for variant in spec.variants),
        weights=tuple(weights_of(row.buckets, len(spec.variants))),
        start_at=spec.start_at,
        stop_at=spec.stop_at,
        started_at=row.started_at,
        weighted_at=row.weighted_at,
        stopped_at=row.stopped_at,
        closed_at=row.closed_at,
        auto_stop=spec.auto_stop,
        bandit=bandit,
    )


def served_experiment(row: ExperimentRow, layer: list[Span] | None = None) -> Experiment:
    """What routers need to know of it; with the buckets of `layer` where given."""
    spec = spec_of(row)
    names = [variant.name for variant in spec.variants]
    chosen = {
        int.from_bytes(unit_digest(override.unit.encode()), "little"): names.index(override.variant)
        for override in spec.overrides
    }
    units = sorted(chosen)
    own_layer = layer_of(row) if layer is None else layer
    return Experiment(
        experiment_id=row.experiment_id,
        unit=UNITS[spec.unit],
        salt=spec.salt or row.experiment_id,
        layer=[LayerRange(first=span.first, last=span.last) for span in own_layer],
        variants=[Variant(name=variant.name, version=variant.version) for variant in spec.variants],
        buckets=[
            VariantRange(first=first, last=last, variant=variant) for first, last, variant in row.buckets
        ],
        targeting=[_condition(condition) for condition in spec.targeting],
        override_units=units,
        override_variants=[chosen[unit] for unit in units],
    )


def planned_layer(config: ServingConfig, row: ExperimentRow) -> list[Span]:
    """The buckets that `row` would own now: all it wants, or what is free where that is less."""
    taken = [
        Span(span.first, span.last)
        for other in config.experiments
        if other.experiment_id != row.experiment_id
        for span in other.layer
    ]
    wanted = min(ten_thousandths(spec_of(row).traffic), BUCKETS - size(taken))
    return own(layer_of(row), taken, wanted, start_of_layer(row.experiment_id))


def parameter(value: Value) -> Parameter:
    """A value of an attribute as it travels."""
    if isinstance(value, bool):
        return Parameter(bool_value=value)
    if isinstance(value, int):
        return Parameter(int64_value=value)
    if isinstance(value, float):
        return Parameter(double_value=value)
    return Parameter(string_value=value)


def _condition(condition: ConditionIn) -> Condition:
    return Condition(
        attribute=condition.attribute,
        operator=_OPERATORS[condition.operator],
        values=[parameter(value) for value in condition.values],
    )
