"""What callers say of the metrics that trials are judged by, experiments and rollouts alike."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Annotated, Final, Literal, Self

from headrace.v1.trials_pb2 import TrialMetric
from pydantic import BaseModel, Field, FiniteFloat, StringConstraints, model_validator

from services.common.errors import InvalidArgument
from services.registry.schemas import Input

MetricName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,62}$")]
#: 0 … 1 with at most four decimals: everything inside counts in 1/10,000.
Share = Annotated[Decimal, Field(ge=0, le=1, decimal_places=4)]

#: Metrics that are known without an outcome (accuracy: with the outcome "label").
PROPORTIONS: Final = frozenset({"error_rate", "accuracy", "shadow_disagreement", "shadow_error_rate"})
_SMALLER_IS_BETTER: Final = frozenset(
    {"error_rate", "latency_ms", "shadow_disagreement", "shadow_error_rate"}
)


class MetricIn(Input):
    """One metric. What is absent follows from the name: error_rate, shadow_disagreement and latency_ms shall
    not grow, everything else shall; a guardrail without a margin may be worse by 0.01 where it is a
    proportion, else by 10% of the control's value."""

    name: MetricName
    role: Literal["success", "guardrail"] = "success"
    direction: Literal["increase", "decrease"] | None = None
    margin: Annotated[FiniteFloat, Field(ge=0, le=1e12)] | None = None
    margin_is_relative: bool | None = None
    quantile: Annotated[FiniteFloat, Field(gt=0, lt=1)] | None = None
    missing: Literal["zero", "exclude"] = "exclude"
    covariate: Literal["pre_period"] | None = None
    pre_period_s: Annotated[int, Field(ge=60, le=366 * 86_400)] | None = None
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.low is None) != (self.high is None):
            raise ValueError("low and high come together")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError("low is smaller than high")
        if self.low is not None and (self.quantile is not None or self.missing == "zero"):
            raise ValueError(
                "low and high are of a mean of values that came, not of a quantile or missing=zero"
            )
        if self.pre_period_s is not None and self.covariate is None:
            raise ValueError('pre_period_s is of the covariate "pre_period"')
        if self.quantile is not None and self.covariate is not None:
            raise ValueError("a covariate adjusts a mean, not a quantile")
        if self.quantile is not None and self.name in PROPORTIONS:
            raise ValueError(f"{self.name} is a proportion and has no quantile")
        return self


_DAY_S: Final = 86_400


def metric_message(metric: MetricIn, minimal_effect: float = 0.0) -> TrialMetric:
    """`metric` with every default filled in. `minimal_effect`: the smallest effect of interest where a
    success metric names none, as a share of the control's value."""
    proportion = metric.name in PROPORTIONS
    direction = metric.direction or ("decrease" if metric.name in _SMALLER_IS_BETTER else "increase")
    margin, relative = metric.margin, metric.margin_is_relative
    if margin is None and metric.role == "success":
        margin, relative = minimal_effect, True
    elif margin is None:
        relative = not proportion if relative is None else relative
        margin = 0.1 if relative else 0.01
    low, high = (metric.low or 0.0), (metric.high or 0.0)
    if metric.low is None and proportion:
        low, high = 0.0, 1.0
    before = metric.covariate is not None
    return TrialMetric(
        name=metric.name,
        role=TrialMetric.ROLE_GUARDRAIL if metric.role == "guardrail" else TrialMetric.ROLE_SUCCESS,
        direction=(
            TrialMetric.DIRECTION_DECREASE if direction == "decrease" else TrialMetric.DIRECTION_INCREASE
        ),
        margin=margin,
        margin_is_relative=bool(relative),
        quantile=metric.quantile or 0.0,
        missing_is_zero=metric.missing == "zero",
        covariate=TrialMetric.COVARIATE_PRE_PERIOD if before else TrialMetric.COVARIATE_UNSPECIFIED,
        pre_period_s=(metric.pre_period_s or 7 * _DAY_S) if before else 0,
        low=low,
        high=high,
    )


def check_metrics(metrics: Sequence[MetricIn]) -> None:
    """Raises InvalidArgument naming the entry whose metric stands there already: evidence goes by it."""
    seen: set[str] = set()
    for index, metric in enumerate(metrics):
        if metric.name in seen:
            raise InvalidArgument(f"metric {metric.name!r} stands twice", field=f"metrics[{index}].name")
        seen.add(metric.name)


def ten_thousandths(share: Decimal) -> int:
    """A share as everything inside counts it."""
    return int(share * 10_000)


class MetricView(BaseModel):
    """A metric with every default filled in, as analytics judges it."""

    name: str
    role: str
    direction: str
    margin: float
    margin_is_relative: bool
    quantile: float | None
    missing: str
    covariate: str | None
    pre_period_s: int | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, metric: MetricIn, minimal_effect: float = 0.0) -> MetricView:
        """What `metric_message` makes of it."""
        message = metric_message(metric, minimal_effect)
        bounded = message.low < message.high
        return cls(
            name=message.name,
            role=metric.role,
            direction="decrease" if message.direction == TrialMetric.DIRECTION_DECREASE else "increase",
            margin=message.margin,
            margin_is_relative=message.margin_is_relative,
            quantile=metric.quantile,
            missing=metric.missing,
            covariate=metric.covariate,
            pre_period_s=message.pre_period_s or None,
            low=message.low if bounded else None,
            high=message.high if bounded else None,
        )
