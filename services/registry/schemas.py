"""What callers send, checked once for REST and gRPC alike. `views.py` holds what they get."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    StringConstraints,
    ValidationError,
)

from services.common.errors import InvalidArgument, MalformedBody
from services.common.problems import field_path
from services.common.targeting import MAX_ATTRIBUTE_NAME
from services.registry.names import AliasName, ModelName, PoolName, VersionText

#: No NUL: PostgreSQL cannot store one.
Label = Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=r"^[^\x00]*$")]
Text = Annotated[str, StringConstraints(max_length=2000, pattern=r"^[^\x00]*$")]
Tags = Annotated[dict[Label, Text], Field(max_length=100)]
Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
    "FP16", "FP32", "FP64", "BYTES", "BF16",
]  # fmt: skip
TaskName = Literal["classification", "regression", "embedding", "generation"]
BalancingName = Literal["least_latency", "round_robin", "weighted", "consistent_hash"]
FailureName = Literal["UNAVAILABLE", "INTERNAL", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"]
Scope = Literal["predict", "read", "admin"]


class Input(BaseModel):
    """A body: nothing it does not know, nothing that changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelIn(Input):
    """A model to create."""

    name: ModelName
    description: Text = ""
    tags: Tags = {}


class ModelPatch(Input):
    """What to change of a model; what is absent stays."""

    description: Text | None = None
    tags: Tags | None = None


def _size(size: int) -> int:
    if size == 0:
        raise ValueError("a dimension is -1 or has 1 element at least: nothing could be sent otherwise")
    return size


Dimension = Annotated[int, Field(ge=-1, lt=1 << 31), AfterValidator(_size)]


class TensorOverride(Input):
    """Completes one tensor read from the file. Shape may narrow -1 to a number, never contradict."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=1000)]
    datatype: Datatype | None = None
    shape: Annotated[list[Dimension], Field(max_length=16)] | None = None
    columns: Annotated[list[Text], Field(max_length=100_000)] | None = None


class SignatureOverrides(Input):
    """Completes the signature read from the file."""

    inputs: Annotated[list[TensorOverride], Field(max_length=1000)] = []
    outputs: Annotated[list[TensorOverride], Field(max_length=1000)] = []
    batched: bool | None = None
    task: TaskName | None = None
    prediction_output: str | None = None
    probability_output: str | None = None
    classes: Annotated[list[Text], Field(max_length=100_000)] | None = None


class LineageIn(Input):
    """Where a version comes from. `parent` is "model/version"."""

    source_uri: Text = ""
    git_commit: Text = ""
    training_run: Text = ""
    training_data_digest: Text = ""
    parent: Text = ""


class VersionIn(Input):
    """What is said of an upload beside its files. No `version`: the next whole number. No `backend`: by the
    files."""

    version: VersionText | None = None
    backend: str = ""
    signature: SignatureOverrides = SignatureOverrides()
    metrics: Annotated[dict[Label, FiniteFloat], Field(max_length=1000)] = {}
    lineage: LineageIn = LineageIn()
    tags: Tags = {}


class AliasIn(Input):
    """The version that an alias shall stand for."""

    version: VersionText


class AliasPath(Input):
    """The alias itself, where no route checks it."""

    alias: AliasName


class PageIn(Input):
    """Which part of a list."""

    limit: Annotated[int, Field(ge=1, le=1000)] = 100
    after: Annotated[str, StringConstraints(max_length=100, pattern=r"^[^\x00]*$")] = ""


class Share(Input):
    """One version of a deployment. `weight` is percent with at most two decimals."""

    version: VersionText
    weight: Annotated[Decimal, Field(ge=0, le=100, decimal_places=2)]
    variant: VersionText | None = None

    @property
    def ten_thousandths(self) -> int:
        """The weight in 1/10,000, as everything inside counts it."""
        return int(self.weight * 100)


SliceBy = Annotated[str, StringConstraints(max_length=MAX_ATTRIBUTE_NAME, pattern=r"^[^\x00]*$")]


class ShadowIn(Input):
    """A version that gets a copy of `share` percent of the requests, after they were answered. Numbers a and
    b are the same where |a - b| <= tolerance * max(1, |a|)."""

    version: VersionText
    share: Annotated[Decimal, Field(gt=0, le=100, decimal_places=2)]
    tolerance: Annotated[FiniteFloat, Field(gt=0, le=1)] = 0.001
    #: Attribute of requests by whose value reports are told apart; empty: none.
    slice_by: SliceBy = ""


def _ascending(rows: list[int]) -> list[int]:
    if rows != sorted(set(rows)):
        raise ValueError("preferred_rows grow from entry to entry")
    return rows


class BatchingIn(Input):
    """How workers batch; 0 leaves it to the worker."""

    max_rows: Annotated[int, Field(ge=0, le=1 << 16)] = 0
    max_delay_us: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    preferred_rows: Annotated[
        list[Annotated[int, Field(ge=1, le=1 << 16)]], Field(max_length=16), AfterValidator(_ascending)
    ] = []
    max_queue_rows: Annotated[int, Field(ge=0, le=1 << 24)] = 0
    max_queue_ms: Annotated[int, Field(ge=0, le=3_600_000)] = 0


class FallbackIn(Input):
    """The version that answers where another one fails. No `on`: UNAVAILABLE, INTERNAL, and DEADLINE_EXCEEDED
    while there is time left."""

    version: VersionText
    on: Annotated[list[FailureName], Field(max_length=4)] = []


class CacheIn(Input):
    """Answers are kept for equal inputs. The owner states with it that they depend on nothing else; a version
    whose tag `deterministic` is `false` (set where its file has random operators) is refused."""

    ttl_s: Annotated[FiniteFloat, Field(ge=0.001, le=30 * 86_400)]
    max_entry_bytes: Annotated[int, Field(ge=1, le=1 << 24)] = 1 << 16


class HedgingIn(Input):
    """A request that takes longer than `quantile` of its version's recent ones, and `min_delay_ms`, goes to
    a second worker as well; the first answer counts."""

    quantile: Annotated[FiniteFloat, Field(ge=0.5, le=0.999)] = 0.95
    min_delay_ms: Annotated[int, Field(ge=0, le=3_600_000)] = 0


class DeployIn(Input):
    """The whole wanted state of a model's serving; what is absent takes its default."""

    versions: Annotated[list[Share], Field(min_length=1, max_length=100)]
    pool: PoolName = "default"
    batching: BatchingIn = BatchingIn()
    balancing: BalancingName = "least_latency"
    log_payloads: bool = True
    default_timeout_ms: Annotated[int, Field(ge=0, le=3_600_000)] = 0
    fallback: FallbackIn | None = None
    cache: CacheIn | None = None
    shadow: ShadowIn | None = None
    hedging: HedgingIn | None = None
    #: The deployment changes only if this is still its revision.
    expected_revision: Annotated[int, Field(ge=1, lt=1 << 63)] | None = None


def _storable_moment(moment: datetime) -> datetime:
    """Columns hold UTC, in which an hour at the end of the last year is in one that is not there."""
    try:
        moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("it is beyond the year 9999 in UTC") from None
    return moment


class KeyIn(Input):
    """An API key to create. `rate_per_second` 0: no limit; `burst` 0: one second's worth; no models: all."""

    name: Label
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=3)] = ["predict"]
    rate_per_second: Annotated[FiniteFloat, Field(ge=0, le=1e6)] = 0.0
    burst: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    models: Annotated[list[ModelName], Field(max_length=1000)] = []
    expires_at: Annotated[AwareDatetime, AfterValidator(_storable_moment)] | None = None


M = TypeVar("M", bound=BaseModel)


def checked(kind: type[M], values: dict[str, Any] | str | bytes) -> M:
    """`values` (a dict, or JSON text) as `kind`. Raises MalformedBody where it is not JSON, InvalidArgument
    naming the first wrong field."""
    try:
        if isinstance(values, dict):
            return kind.model_validate(values)
        return kind.model_validate_json(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise MalformedBody(f"metadata is not JSON: {first['msg']}", field="metadata") from None
        raise InvalidArgument(first["msg"], field=field_path(first["loc"]) or None) from None


def storable(said: str) -> str:
    """What another service said, as a column can hold it: without NULs, 2000 characters at most."""
    return said.replace("\0", "\N{REPLACEMENT CHARACTER}")[:2000]


def utc_us(moment: datetime) -> int:
    """Microseconds since the Unix epoch."""
    return round(moment.timestamp() * 1_000_000)
