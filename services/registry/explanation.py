"""Why a request gets the variant it gets, in words. Pure: decided by the very code that routers assign
with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headrace.v1.control_pb2 import Condition, Experiment, Unit
from headrace.v1.dataplane_pb2 import PredictRequest

from services.common.assignment import BUCKETS
from services.common.experiments import Explanation, Layer
from services.registry.experiment_schemas import Value
from services.registry.experiment_state import OPERATOR_NAMES, parameter


@dataclass(frozen=True, slots=True)
class Explained:
    """One assignment. `variant`, `version` and `propensity` are None where the experiment does not decide."""

    in_experiment: bool
    variant: str | None
    version: str | None
    bucket: int
    layer_bucket: int
    propensity: float | None
    because: str
    steps: tuple[str, ...]


_UNIT_WORDS = {Unit.UNIT_USER: "user", Unit.UNIT_SESSION: "session", Unit.UNIT_REQUEST: "request"}


def explain(
    model: str,
    experiments: Sequence[Experiment],
    holdout: int,
    experiment_id: str,
    request: PredictRequest,
    *,
    running: bool,
) -> Explained:
    """What `experiment_id`, one of `experiments`, makes of `request`; `running`: whether it does so, or
    would."""
    layer = Layer(model, experiments, holdout)
    found = layer.explain(request, experiment_id)
    experiment = next(one for one in experiments if one.experiment_id == experiment_id)
    variant = experiment.variants[found.variant]
    steps = _steps(experiment, found, holdout, variant.name)
    mine = found.in_experiment
    verb = "gets" if running else "would get"
    if mine:
        because = f"The {_UNIT_WORDS[experiment.unit]} {verb} variant {variant.name}: {_reason(found)}."
    else:
        because = (
            f"The request {'is not' if running else 'would not be'} in the experiment: {_obstacle(found)}."
        )
    return Explained(
        in_experiment=mine,
        variant=variant.name if mine else None,
        version=variant.version if mine else None,
        bucket=found.bucket,
        layer_bucket=found.layer_bucket,
        propensity=found.propensity if mine else None,
        because=because,
        steps=tuple(steps),
    )


def request_of(unit: str, session: str, request_id: bytes, attributes: Mapping[str, Value]) -> PredictRequest:
    """A request as the router would see it."""
    request = PredictRequest(unit=unit, session=session, request_id=request_id)
    for name, value in attributes.items():
        request.attributes[name].CopyFrom(parameter(value))
    return request


def _reason(found: Explanation) -> str:
    if found.overridden:
        return "it was chosen for it by hand"
    return (
        f"its bucket {found.layer_bucket} of the layer is the experiment's, and bucket {found.bucket} of the "
        f"experiment is the variant's, as are {found.propensity:.2%} of them"
    )


def _obstacle(found: Explanation) -> str:
    if found.owner:
        return f"experiment {found.owner} gets it"
    if found.held_out:
        return "the unit is held out of every experiment"
    if not found.in_layer:
        return f"bucket {found.layer_bucket} of the layer is not the experiment's"
    if found.unmet is not None:
        return f"it does not fulfil the condition {condition_words(found.unmet)}"
    return "another experiment comes first"


def _steps(experiment: Experiment, found: Explanation, holdout: int, variant: str) -> list[str]:
    """What is looked at, in the order in which it is."""
    count = len(experiment.override_units)
    if found.overridden:
        return [f"Overrides: the unit is one of {count} chosen by hand, for variant {variant}."]
    steps = [f"Overrides: the unit is not among {count} chosen by hand."]
    share = f"{holdout / BUCKETS:.2%} of the units are held out"
    steps.append(f"Holdout: {share}, and this is {'one' if found.held_out else 'none'} of them.")
    if found.held_out:
        return steps
    owned = sum(span.last - span.first + 1 for span in experiment.layer)
    steps.append(
        f"Layer: the unit falls into bucket {found.layer_bucket} of {BUCKETS}, which is "
        f"{'one' if found.in_layer else 'none'} of the experiment's {owned}."
    )
    if not found.in_layer:
        return steps
    if experiment.targeting:
        failed = "all hold" if found.unmet is None else f"{condition_words(found.unmet)} does not hold"
        steps.append(f"Targeting: of {len(experiment.targeting)} conditions {failed}.")
        if found.unmet is not None:
            return steps
    if found.owner:
        steps.append(f"Order: experiment {found.owner} stands before it and gets the request.")
        return steps
    steps.append(f"Variant: bucket {found.bucket} of {BUCKETS} under the experiment's salt is {variant}'s.")
    return steps


def condition_words(condition: Condition) -> str:
    """A condition as people read it: `country in ["de", "fr"]`."""
    values = [getattr(value, value.WhichOneof("value") or "string_value") for value in condition.values]
    words = OPERATOR_NAMES.get(condition.operator, "?")
    if not values:
        return f"{condition.attribute} {words}"
    shown = ", ".join(f'"{value}"' if isinstance(value, str) else f"{value}" for value in values)
    return f"{condition.attribute} {words} {shown if words not in ('in', 'not_in') else f'[{shown}]'}"
