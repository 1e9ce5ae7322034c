"""What callers say of rollouts, and the plan it makes."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Annotated, Final, Literal

from pydantic import Field, FiniteFloat

from services.common.assignment import BUCKETS
from services.common.errors import InvalidArgument
from services.registry.names import ModelName, VersionText
from services.registry.rollout_plan import (
    ERROR_RATE,
    SHADOW_DISAGREEMENT,
    SHADOW_ERRORS,
    SHADOW_METRICS,
    Gate,
    Inconclusive,
    PlannedStep,
)
from services.registry.schemas import Input, SliceBy, Text
from services.registry.trial_schemas import MetricIn, Share, check_metrics, ten_thousandths

DAY_S: Final = 86_400
Seconds = Annotated[FiniteFloat, Field(ge=0, le=30 * DAY_S)]
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
StrategyName = Literal["canary", "blue_green", "shadow_canary"]

#: What a step lasts at least where it does not say.
STEP_S: Final = 60.0
STEP_REQUESTS: Final = 100
SHADOW_REQUESTS: Final = 1000
#: By how much more requests may fail, of shadows too where the error rate's own margin is no difference.
_ERROR_MARGIN: Final = 0.01
_CANARY: Final = ("0.01", "0.05", "0.1", "0.25", "0.5", "1")
#: Fields that belong to one kind of step.
_OF_SHADOWS: Final = frozenset({"match_rate", "slice_by", "tolerance"})
_OF_WAITING: Final = frozenset({"min_duration_s", "min_requests", "max_duration_s", "gate"})


class StepIn(Input):
    """One step: a `weight` (share of the requests that the new version answers) or a `shadow` (share of the
    requests it gets a copy of). A step with weight 0 watches the version in service."""

    weight: Share | None = None
    shadow: Annotated[Share, Field(gt=0)] | None = None
    min_duration_s: Seconds = STEP_S
    min_requests: Count = STEP_REQUESTS
    max_duration_s: Annotated[FiniteFloat, Field(gt=0, le=365 * DAY_S)] | None = None
    gate: Gate | None = None
    match_rate: Annotated[FiniteFloat, Field(gt=0, lt=1)] = 0.99
    slice_by: SliceBy = ""
    tolerance: Annotated[FiniteFloat, Field(gt=0, le=1)] = 0.001


class RolloutIn(Input):
    """A rollout as it is asked for. No `steps`: those of the strategy; no `metrics`: error rate and p99
    latency as guardrails."""

    model: ModelName
    version: VersionText
    strategy: StrategyName = "canary"
    steps: Annotated[list[StepIn], Field(min_length=1, max_length=50)] | None = None
    metrics: Annotated[list[MetricIn], Field(min_length=1, max_length=20)] | None = None
    alpha: Annotated[FiniteFloat, Field(ge=0.0001, le=0.5)] = 0.05
    bake_s: Seconds = 300.0
    on_inconclusive: Inconclusive = Inconclusive.HOLD
    drift_guardrail: bool = True
    #: How long workers that have not loaded the new version are waited for, and which share of them is enough
    #: after that; with fewer it is rolled back.
    load_timeout_s: Annotated[FiniteFloat, Field(gt=0, le=DAY_S)] = 900.0
    load_quorum: Annotated[FiniteFloat, Field(gt=0, le=1)] = 0.75
    keep_previous: bool = False

    def all_steps(self) -> list[StepIn]:
        """The steps, those that follow from the strategy included."""
        steps = list(self.steps) if self.steps is not None else _usual(self.strategy)
        if steps[-1].weight != 1:
            steps.append(StepIn(weight=Decimal(1)))
        return steps

    def metrics_watched(self) -> list[MetricIn]:
        """The metrics of what the new version answers."""
        return list(self.metrics) if self.metrics is not None else _usual_metrics()

    def all_metrics(self) -> list[MetricIn]:
        """The metrics, those of shadow steps included: which are watched never changes within a rollout, so
        that its error budget is divided once."""
        metrics = self.metrics_watched()
        rates = [step.match_rate for step in self.all_steps() if step.shadow is not None]
        if rates:
            margins = [m.margin for m in metrics if m.name == ERROR_RATE and not m.margin_is_relative]
            errors = next((margin for margin in margins if margin is not None), _ERROR_MARGIN)
            metrics += [
                _guardrail(SHADOW_DISAGREEMENT, margin=round(1 - min(rates), 12)),
                _guardrail(SHADOW_ERRORS, margin=errors),
            ]
        return metrics


class NewRolloutIn(RolloutIn):
    """A rollout to create; without `start` it is paused before its first step."""

    start: bool = True


class ReasonIn(Input):
    """Why a person pauses, resumes, promotes or aborts."""

    reason: Text = ""


def check_rollout(spec: RolloutIn) -> None:
    """Raises InvalidArgument naming the first field that does not fit the others."""
    steps = spec.all_steps()
    for index, step in enumerate(steps):
        _check_step(step, f"steps[{index}]")
    _check_order(spec.strategy, steps)
    if spec.metrics is None:
        gates = {step.gate for step in steps}
        if Gate.BETTER in gates:
            raise InvalidArgument("a gate asks for something better, and no metric is named", field="metrics")
        return
    check_metrics(spec.metrics)
    for index, metric in enumerate(spec.metrics):
        if metric.name in SHADOW_METRICS:
            raise InvalidArgument(
                f"{metric.name} comes with a shadow step's match_rate", field=f"metrics[{index}].name"
            )
    if not any(metric.role == "guardrail" for metric in spec.metrics):
        raise InvalidArgument("a rollout watches one guardrail at least", field="metrics")
    for index, step in enumerate(steps):
        if step.gate is Gate.BETTER and not any(metric.role == "success" for metric in spec.metrics):
            raise InvalidArgument("no metric has the role success", field=f"steps[{index}].gate")


def plan_of(spec: RolloutIn) -> tuple[PlannedStep, ...]:
    """The plan of a spec that `check_rollout` passed."""
    steps = spec.all_steps()
    last_gate = len(steps) - 2
    return tuple(_planned(step, last=index == last_gate) for index, step in enumerate(steps))


def _planned(step: StepIn, *, last: bool) -> PlannedStep:
    weight = ten_thousandths(step.weight or Decimal(0))
    if weight == BUCKETS:
        return PlannedStep(weight)
    shadow = ten_thousandths(step.shadow or Decimal(0))
    watching = weight == shadow == 0
    return PlannedStep(
        weight=weight,
        min_duration_s=step.min_duration_s,
        min_requests=0 if watching else step.min_requests,
        max_duration_s=step.max_duration_s,
        gate=step.gate or (Gate.SAFE if last and weight else Gate.NO_HARM),
        shadow=shadow,
        match_rate=step.match_rate if shadow else 0.0,
    )


def _check_step(step: StepIn, field: str) -> None:
    if (step.weight is None) == (step.shadow is None):
        raise InvalidArgument("a step has either a weight or a shadow", field=field)
    given = step.model_fields_set
    foreign = given & _OF_SHADOWS if step.shadow is None else given & {"gate"}
    if step.weight == 1:
        foreign = given & (_OF_SHADOWS | _OF_WAITING)
    for name in sorted(foreign):
        where = "the last step, which lasts bake_s" if step.weight == 1 else "a step of this kind"
        raise InvalidArgument(f"{where} has no {name}", field=f"{field}.{name}")
    if step.max_duration_s is not None and step.max_duration_s < step.min_duration_s:
        raise InvalidArgument("it is shorter than min_duration_s", field=f"{field}.max_duration_s")


def _check_order(strategy: StrategyName, steps: Sequence[StepIn]) -> None:
    before: Decimal | None = None
    shadows = 0
    for index, step in enumerate(steps):
        if step.shadow is not None:
            shadows += 1
            if before is not None:
                raise InvalidArgument("shadow steps come before all weights", field=f"steps[{index}].shadow")
        elif step.weight is not None:
            if before is not None and step.weight <= before:
                raise InvalidArgument("weights grow from step to step", field=f"steps[{index}].weight")
            if strategy == "blue_green" and step.weight not in (0, 1):
                raise InvalidArgument("blue_green knows 0 and 1 only", field=f"steps[{index}].weight")
            before = step.weight
    if (shadows > 0) != (strategy == "shadow_canary"):
        field = "steps" if strategy == "shadow_canary" else "strategy"
        raise InvalidArgument("shadow_canary has shadow steps, the other strategies have none", field=field)


def _usual(strategy: StrategyName) -> list[StepIn]:
    if strategy == "blue_green":
        return [StepIn(weight=Decimal(0)), StepIn(weight=Decimal(1))]
    canary = [StepIn(weight=Decimal(weight)) for weight in _CANARY]
    if strategy == "canary":
        return canary
    return [StepIn(shadow=Decimal("0.1"), min_requests=SHADOW_REQUESTS), *canary]


def _usual_metrics() -> list[MetricIn]:
    latency = MetricIn(
        name="latency_ms",
        role="guardrail",
        direction="decrease",
        margin=0.25,
        margin_is_relative=True,
        quantile=0.99,
    )
    return [_guardrail(ERROR_RATE, margin=_ERROR_MARGIN), latency]


def _guardrail(name: str, margin: float) -> MetricIn:
    """A proportion that shall not grow by `margin` or more."""
    return MetricIn(
        name=name,
        role="guardrail",
        direction="decrease",
        margin=margin,
        margin_is_relative=False,
        low=0.0,
        high=1.0,
    )
