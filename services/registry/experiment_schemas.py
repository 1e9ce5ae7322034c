"""What callers say of experiments, and what they get."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Annotated, Final, Literal, Self

from headrace.v1.control_pb2 import Unit
from pydantic import (
    AwareDatetime,
    BeforeValidator,
    Field,
    FiniteFloat,
    StrictBool,
    StrictFloat,
    StrictInt,
    StringConstraints,
    model_validator,
)

from services.common.assignment import BUCKETS
from services.common.errors import InvalidArgument
from services.common.targeting import MAX_ATTRIBUTE_NAME, MAX_ATTRIBUTE_TEXT, MAX_UNIT
from services.registry.names import ModelName, VersionText
from services.registry.rollout_plan import SHADOW_METRICS
from services.registry.schemas import Input, Text
from services.registry.trial_schemas import MetricIn, Share, check_metrics, ten_thousandths

VariantName = VersionText
#: Mixed into the hash; BLAKE2b takes 64 bytes of key.
Salt = Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]{1,64}$")]
UnitText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_UNIT, pattern=r"^[^\x00]*$")]
AttributeName = Annotated[
    str, StringConstraints(min_length=1, max_length=MAX_ATTRIBUTE_NAME, pattern=r"^[^\x00]*$")
]
ShortText = Annotated[str, StringConstraints(max_length=1000, pattern=r"^[^\x00]*$")]


_NO_TEXT: Final = re.compile("[\0\ud800-\udfff]")


def _scalar(value: object) -> object:
    """Checked before the union is, whose errors would name its branches beside the field."""
    if isinstance(value, bool):
        return value
    # Of floats too: PostgreSQL gives large ones back as integers, which could then not be read.
    if isinstance(value, int | float) and -(1 << 63) <= value < 1 << 63:
        return value
    # Half of a surrogate pair is no character that could be stored or sent on
    if isinstance(value, str) and len(value) <= MAX_ATTRIBUTE_TEXT and not _NO_TEXT.search(value):
        return value
    raise ValueError(
        f"a value is a text of at most {MAX_ATTRIBUTE_TEXT} characters, a number of 64 bits or a truth value"
    )


Value = Annotated[StrictBool | StrictInt | StrictFloat | str, BeforeValidator(_scalar)]
OperatorName = Literal["in", "not_in", "lt", "lte", "gt", "gte", "starts_with", "present", "absent"]
UnitName = Literal["user", "session", "request"]
UNITS: Final[dict[UnitName, Unit]] = {
    "user": Unit.UNIT_USER,
    "session": Unit.UNIT_SESSION,
    "request": Unit.UNIT_REQUEST,
}
#: Of an experiment's conditions as JSON: they travel with every revision of the model's configuration.
MOST_TARGETING_BYTES: Final = 1 << 16
PositiveShare = Annotated[Share, Field(gt=0)]


class VariantIn(Input):
    """One variant. `version` may be an alias, which is resolved when it is stored."""

    name: VariantName
    version: VersionText
    weight: PositiveShare | None = None


class ConditionIn(Input):
    """On one attribute of a request."""

    attribute: AttributeName
    operator: OperatorName
    values: Annotated[tuple[Value, ...], Field(max_length=1000)] = ()


class OverrideIn(Input):
    """A unit that gets a chosen variant."""

    unit: UnitText
    variant: VariantName


class BanditIn(Input):
    """Weights that follow the evidence: none below `min_weight`, none changed by more than `max_change` at
    once."""

    min_weight: PositiveShare = Decimal("0.05")
    max_change: PositiveShare = Decimal("0.1")
    update_every_s: Annotated[int, Field(ge=1, le=86_400)] = 60


Variants = Annotated[tuple[VariantIn, ...], Field(min_length=2, max_length=20)]
Overrides = Annotated[tuple[OverrideIn, ...], Field(max_length=1000)]


class ExperimentIn(Input):
    """The whole of an experiment. The first variant is the control; no weights at all: equal ones."""

    model: ModelName
    name: ShortText = ""
    description: Text = ""
    unit: UnitName = "user"
    salt: Salt | None = None
    traffic: PositiveShare = Decimal(1)
    variants: Variants
    targeting: Annotated[tuple[ConditionIn, ...], Field(max_length=20)] = ()
    overrides: Overrides = ()
    metrics: Annotated[tuple[MetricIn, ...], Field(max_length=20)] = ()
    minimal_effect: Annotated[FiniteFloat, Field(gt=0, le=1000)] | None = None
    alpha: Annotated[FiniteFloat, Field(ge=0.0001, le=0.5)] = 0.05
    power: Annotated[FiniteFloat, Field(ge=0.5, le=0.9999)] = 0.8
    planned_units: Annotated[int, Field(ge=1, lt=1 << 53)] | None = None
    start_at: AwareDatetime | None = None
    stop_at: AwareDatetime | None = None
    auto_stop: bool = False
    bandit: BanditIn | None = None

    def weights(self) -> list[int]:
        """Of the variants, in 1/10,000; they add up to 10,000 once `check_experiment` was passed."""
        if all(variant.weight is None for variant in self.variants):
            share, rest = divmod(BUCKETS, len(self.variants))
            return [share + (index < rest) for index in range(len(self.variants))]
        return [ten_thousandths(variant.weight or Decimal(0)) for variant in self.variants]


class NewExperimentIn(ExperimentIn):
    """An experiment to create, and with `start` to run at once."""

    start: bool = False


class ExperimentPatch(Input):
    """What to change; what is absent stays, and null takes what may be absent away."""

    name: ShortText | None = None
    description: Text | None = None
    unit: UnitName | None = None
    salt: Salt | None = None
    traffic: PositiveShare | None = None
    variants: Variants | None = None
    targeting: Annotated[tuple[ConditionIn, ...], Field(max_length=20)] | None = None
    overrides: Overrides | None = None
    metrics: Annotated[tuple[MetricIn, ...], Field(max_length=20)] | None = None
    minimal_effect: Annotated[FiniteFloat, Field(gt=0, le=1000)] | None = None
    alpha: Annotated[FiniteFloat, Field(ge=0.0001, le=0.5)] | None = None
    power: Annotated[FiniteFloat, Field(ge=0.5, le=0.9999)] | None = None
    planned_units: Annotated[int, Field(ge=1, lt=1 << 53)] | None = None
    start_at: AwareDatetime | None = None
    stop_at: AwareDatetime | None = None
    auto_stop: bool | None = None
    bandit: BanditIn | None = None

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("the body changes nothing")
        return self


class StopIn(Input):
    """Why it stops, and whose version shall get the deployment's traffic; no winner: nothing moves."""

    reason: ShortText = ""
    winner: VariantName | None = None


class HoldoutIn(Input):
    """Share of a model's units that no experiment gets."""

    share: Share


def check_experiment(spec: ExperimentIn) -> None:
    """Raises InvalidArgument naming the first field that does not fit the others."""
    _check_variants(spec.variants)
    check_metrics(spec.metrics)
    for index, metric in enumerate(spec.metrics):
        if metric.name in SHADOW_METRICS:
            raise InvalidArgument(
                f"{metric.name} is of the shadow steps of a rollout", field=f"metrics[{index}].name"
            )
    for index, condition in enumerate(spec.targeting):
        _check_values(condition, f"targeting[{index}].values")
    size = sum(len(condition.model_dump_json()) for condition in spec.targeting)
    if size > MOST_TARGETING_BYTES:
        raise InvalidArgument(
            f"the conditions are {size:,} bytes long, more than the {MOST_TARGETING_BYTES:,} that fit; let "
            "callers send an attribute that says who is meant",
            field="targeting",
        )
    _check_overrides(spec)
    if spec.start_at is not None and spec.stop_at is not None and spec.stop_at <= spec.start_at:
        raise InvalidArgument("stop_at is not after start_at", field="stop_at")
    if spec.auto_stop and not spec.metrics:
        raise InvalidArgument("there is no metric that could stop it", field="auto_stop")
    if spec.bandit is not None:
        _check_bandit(spec, spec.bandit)


def _check_variants(variants: Sequence[VariantIn]) -> None:
    names: set[str] = set()
    for index, variant in enumerate(variants):
        if variant.name in names:
            raise InvalidArgument(f"variant {variant.name!r} stands twice", field=f"variants[{index}].name")
        names.add(variant.name)
    given = [variant.weight for variant in variants if variant.weight is not None]
    if given and len(given) < len(variants):
        index = next(i for i, variant in enumerate(variants) if variant.weight is None)
        raise InvalidArgument(
            "either every variant has a weight or none has", field=f"variants[{index}].weight"
        )
    total = sum(given, Decimal(0))
    if given and total != 1:
        raise InvalidArgument(f"the weights add up to {total.normalize():f}, not 1", field="variants")


def _check_values(condition: ConditionIn, field: str) -> None:
    count = len(condition.values)
    if condition.operator in ("present", "absent"):
        if count:
            raise InvalidArgument(f"{condition.operator} takes no values, not {count}", field=field)
    elif condition.operator in ("in", "not_in"):
        if not count:
            raise InvalidArgument(f"{condition.operator} takes at least one value", field=field)
    elif count != 1:
        raise InvalidArgument(f"{condition.operator} takes one value, not {count}", field=field)
    if condition.operator == "starts_with" and not isinstance(condition.values[0], str):
        raise InvalidArgument("starts_with takes a text", field=f"{field}[0]")


def _check_overrides(spec: ExperimentIn) -> None:
    if spec.overrides and spec.unit == "request":
        raise InvalidArgument("requests cannot be chosen before they are made", field="overrides")
    names = {variant.name for variant in spec.variants}
    units: set[str] = set()
    for index, override in enumerate(spec.overrides):
        if override.variant not in names:
            raise InvalidArgument(
                f"there is no variant {override.variant!r}", field=f"overrides[{index}].variant"
            )
        if override.unit in units:
            raise InvalidArgument(f"unit {override.unit!r} stands twice", field=f"overrides[{index}].unit")
        units.add(override.unit)


def _check_bandit(spec: ExperimentIn, bandit: BanditIn) -> None:
    if not any(metric.role == "success" for metric in spec.metrics):
        raise InvalidArgument("a bandit follows a success metric, and there is none", field="bandit")
    least = ten_thousandths(bandit.min_weight)
    if least * len(spec.variants) > BUCKETS:
        raise InvalidArgument(
            f"{len(spec.variants)} variants of at least {bandit.min_weight} are more than everything",
            field="bandit.min_weight",
        )
    for index, weight in enumerate(spec.weights()):
        if weight < least:
            raise InvalidArgument(
                f"the weight is below the bandit's min_weight {bandit.min_weight}",
                field=f"variants[{index}].weight",
            )
