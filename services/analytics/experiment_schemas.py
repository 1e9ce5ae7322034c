"""Bodies of the experiment routes."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints

from services.analytics.planning import Question, effect_of
from services.common.errors import InvalidArgument

#: What PostgreSQL can hold: no zeros, no halves of a pair of surrogates.
_STORABLE = r"^[^\x00]*$"
Text = Annotated[str, StringConstraints(min_length=1, max_length=1000, pattern=_STORABLE)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=_STORABLE)]
Probability = Annotated[FiniteFloat, Field(ge=0, le=1)]
_SLACK = 1e-6
#: Of any request; as many assignments as a policy may have take a third of it.
MAX_BODY_BYTES = 64 << 20
#: Of a share, and of an effect (of a mean: in its spread), the least that is planned for: sizes stay numbers.
_LEAST = 1e-9


class _Input(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=False)


class PlanIn(_Input):
    """What is to be found, and how surely. Without an effect, `units_per_variant` asks for the least that is
    found."""

    metric: Literal["proportion", "mean"] = "proportion"
    baseline: FiniteFloat | None = None
    mean: FiniteFloat | None = None
    sd: Annotated[FiniteFloat, Field(ge=1e-100, le=1e100)] | None = None
    effect: FiniteFloat | None = None
    relative_effect: FiniteFloat | None = None
    alpha: Annotated[FiniteFloat, Field(ge=1e-12, lt=0.5)] = 0.05
    power: Annotated[FiniteFloat, Field(ge=0.5, le=0.999)] = 0.8
    variants: Annotated[int, Field(ge=2, le=100)] = 2
    #: That the experiment decides by, guardrails included: what is always-valid shares alpha out among them.
    metrics: Annotated[int, Field(ge=1, le=100)] = 1
    ratio: Annotated[FiniteFloat, Field(ge=0.001, le=1000)] = 1.0
    sequential: bool = True
    looks: Annotated[int, Field(ge=1, le=50)] = 5
    units_per_day: Annotated[FiniteFloat, Field(ge=1e-6)] | None = None
    units_per_variant: Annotated[int, Field(ge=2, le=10**12)] | None = None

    def question(self) -> Question:
        """Raises InvalidArgument naming the field that does not fit the others."""
        base = self._base()
        if self.metric == "mean" and self.sd is None:
            raise InvalidArgument("The plan of a mean needs sd, the spread of units' values.", field="sd")
        if self.metric == "proportion" and self.sd is not None:
            raise InvalidArgument("The spread of a proportion follows from its baseline.", field="sd")
        if self.metric == "mean" and (self.units_per_variant or math.inf) * self.ratio < 2:
            raise InvalidArgument("An arm of fewer than two units has no spread.", field="units_per_variant")
        effect = None
        if self.units_per_variant is None or self.effect is not None or self.relative_effect is not None:
            effect = effect_of(self.effect, self.relative_effect, base)
            if self.units_per_variant is not None:
                raise InvalidArgument(
                    "Give either an effect, to get the units, or units, to get the effect.",
                    field="units_per_variant",
                )
            if self.metric == "proportion" and not 0 <= base + effect <= 1:
                name = "effect" if self.effect is not None else "relative_effect"
                raise InvalidArgument(f"A share of {base + effect:g} does not exist.", field=name)
            if not _LEAST <= abs(effect) / (self.sd or 1.0) <= 1 / _LEAST:
                name = "effect" if self.effect is not None else "relative_effect"
                raise InvalidArgument(f"No size is planned for a change of {effect:g}.", field=name)
        return Question(
            metric=self.metric,
            base=base,
            effect=effect,
            sd=self.sd or 1.0,
            alpha=self.alpha,
            power=self.power,
            variants=self.variants,
            ratio=self.ratio,
            sequential=self.sequential,
            units_per_day=self.units_per_day,
            units=self.units_per_variant,
            looks=self.looks,
            metrics=self.metrics,
        )

    def _base(self) -> float:
        wanted, other = ("baseline", "mean") if self.metric == "proportion" else ("mean", "baseline")
        given = {"baseline": self.baseline, "mean": self.mean}
        if given[other] is not None and given[wanted] is not None:
            raise InvalidArgument(f"Give either baseline or mean, for a {self.metric} {wanted}.", field=other)
        base = given[wanted] if given[wanted] is not None else given[other]
        if base is None:
            if self.metric == "mean" and self.relative_effect is None:
                return 0.0
            raise InvalidArgument(f"A {self.metric} is planned from its {wanted}.", field=wanted)
        if self.metric == "proportion" and not 0 < base < 1:
            raise InvalidArgument("A share lies between 0 and 1.", field=wanted)
        if base and abs(base) < (_LEAST if self.metric == "proportion" else 1e-100):
            raise InvalidArgument(f"Nothing is planned from {base:g}.", field=wanted)
        return base


class AssignmentIn(_Input):
    """What a policy would do with one unit, or with one request."""

    unit: Text | None = None
    request_id: Text | None = None
    variant: Name
    probability: Probability = 1.0


class PolicyIn(_Input):
    """The same chances for everybody, or unit by unit."""

    weights: dict[Name, Probability] | None = None
    assignments: Annotated[list[AssignmentIn], Field(min_length=1, max_length=200_000)] | None = None

    def check(self) -> None:
        """Raises InvalidArgument naming what is wrong."""
        if (self.weights is None) == (self.assignments is None):
            raise InvalidArgument("A policy has either weights or assignments.", field="policy")
        if self.weights is not None and abs(sum(self.weights.values()) - 1) > _SLACK:
            total = sum(self.weights.values())
            raise InvalidArgument(f"The weights add up to {total:g}, not to 1.", field="policy.weights")


class OffPolicyIn(_Input):
    """Which log to read, and the policy to evaluate on it. Without `experiment_id` the deployment's own
    split."""

    model: Name
    metric: Name
    policy: PolicyIn
    experiment_id: Annotated[str, StringConstraints(pattern=r"^exp_[0-9a-f]{16}$")] | None = None
    since: AwareDatetime | None = None
    until: AwareDatetime | None = None
    alpha: Annotated[FiniteFloat, Field(ge=1e-12, lt=0.5)] = 0.05
