from headrace.v1 import control_pb2 as _control_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Trial(_message.Message):
    __slots__ = ("trial_id", "kind", "model", "revision", "arms", "unit", "metrics", "alpha", "started_at_us", "stopped_at_us", "closed", "bandit", "planned_units", "shadow_version", "name", "shadow_since_us")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[Trial.Kind]
        KIND_EXPERIMENT: _ClassVar[Trial.Kind]
        KIND_ROLLOUT: _ClassVar[Trial.Kind]
    KIND_UNSPECIFIED: Trial.Kind
    KIND_EXPERIMENT: Trial.Kind
    KIND_ROLLOUT: Trial.Kind
    TRIAL_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    ARMS_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_US_FIELD_NUMBER: _ClassVar[int]
    STOPPED_AT_US_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    BANDIT_FIELD_NUMBER: _ClassVar[int]
    PLANNED_UNITS_FIELD_NUMBER: _ClassVar[int]
    SHADOW_VERSION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHADOW_SINCE_US_FIELD_NUMBER: _ClassVar[int]
    trial_id: str
    kind: Trial.Kind
    model: str
    revision: int
    arms: _containers.RepeatedCompositeFieldContainer[TrialArm]
    unit: _control_pb2.Unit
    metrics: _containers.RepeatedCompositeFieldContainer[TrialMetric]
    alpha: float
    started_at_us: int
    stopped_at_us: int
    closed: bool
    bandit: Bandit
    planned_units: int
    shadow_version: str
    name: str
    shadow_since_us: int
    def __init__(self, trial_id: _Optional[str] = ..., kind: _Optional[_Union[Trial.Kind, str]] = ..., model: _Optional[str] = ..., revision: _Optional[int] = ..., arms: _Optional[_Iterable[_Union[TrialArm, _Mapping]]] = ..., unit: _Optional[_Union[_control_pb2.Unit, str]] = ..., metrics: _Optional[_Iterable[_Union[TrialMetric, _Mapping]]] = ..., alpha: _Optional[float] = ..., started_at_us: _Optional[int] = ..., stopped_at_us: _Optional[int] = ..., closed: _Optional[bool] = ..., bandit: _Optional[_Union[Bandit, _Mapping]] = ..., planned_units: _Optional[int] = ..., shadow_version: _Optional[str] = ..., name: _Optional[str] = ..., shadow_since_us: _Optional[int] = ...) -> None: ...

class TrialArm(_message.Message):
    __slots__ = ("name", "version", "weight")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    weight: int
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., weight: _Optional[int] = ...) -> None: ...

class TrialMetric(_message.Message):
    __slots__ = ("name", "role", "direction", "margin", "margin_is_relative", "quantile", "missing_is_zero", "covariate", "pre_period_s", "low", "high")
    class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        ROLE_UNSPECIFIED: _ClassVar[TrialMetric.Role]
        ROLE_SUCCESS: _ClassVar[TrialMetric.Role]
        ROLE_GUARDRAIL: _ClassVar[TrialMetric.Role]
    ROLE_UNSPECIFIED: TrialMetric.Role
    ROLE_SUCCESS: TrialMetric.Role
    ROLE_GUARDRAIL: TrialMetric.Role
    class Direction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        DIRECTION_UNSPECIFIED: _ClassVar[TrialMetric.Direction]
        DIRECTION_INCREASE: _ClassVar[TrialMetric.Direction]
        DIRECTION_DECREASE: _ClassVar[TrialMetric.Direction]
    DIRECTION_UNSPECIFIED: TrialMetric.Direction
    DIRECTION_INCREASE: TrialMetric.Direction
    DIRECTION_DECREASE: TrialMetric.Direction
    class Covariate(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        COVARIATE_UNSPECIFIED: _ClassVar[TrialMetric.Covariate]
        COVARIATE_PRE_PERIOD: _ClassVar[TrialMetric.Covariate]
    COVARIATE_UNSPECIFIED: TrialMetric.Covariate
    COVARIATE_PRE_PERIOD: TrialMetric.Covariate
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    MARGIN_FIELD_NUMBER: _ClassVar[int]
    MARGIN_IS_RELATIVE_FIELD_NUMBER: _ClassVar[int]
    QUANTILE_FIELD_NUMBER: _ClassVar[int]
    MISSING_IS_ZERO_FIELD_NUMBER: _ClassVar[int]
    COVARIATE_FIELD_NUMBER: _ClassVar[int]
    PRE_PERIOD_S_FIELD_NUMBER: _ClassVar[int]
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    name: str
    role: TrialMetric.Role
    direction: TrialMetric.Direction
    margin: float
    margin_is_relative: bool
    quantile: float
    missing_is_zero: bool
    covariate: TrialMetric.Covariate
    pre_period_s: int
    low: float
    high: float
    def __init__(self, name: _Optional[str] = ..., role: _Optional[_Union[TrialMetric.Role, str]] = ..., direction: _Optional[_Union[TrialMetric.Direction, str]] = ..., margin: _Optional[float] = ..., margin_is_relative: _Optional[bool] = ..., quantile: _Optional[float] = ..., missing_is_zero: _Optional[bool] = ..., covariate: _Optional[_Union[TrialMetric.Covariate, str]] = ..., pre_period_s: _Optional[int] = ..., low: _Optional[float] = ..., high: _Optional[float] = ...) -> None: ...

class Bandit(_message.Message):
    __slots__ = ("min_weight", "max_change", "update_every_s")
    MIN_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    MAX_CHANGE_FIELD_NUMBER: _ClassVar[int]
    UPDATE_EVERY_S_FIELD_NUMBER: _ClassVar[int]
    min_weight: int
    max_change: int
    update_every_s: int
    def __init__(self, min_weight: _Optional[int] = ..., max_change: _Optional[int] = ..., update_every_s: _Optional[int] = ...) -> None: ...

class Verdict(_message.Message):
    __slots__ = ("verdict_id", "trial_id", "trial_revision", "model", "computed_at_us", "until_us", "arms", "evidence", "sample_ratio_log_e", "sample_ratio_mismatch", "weights", "warnings", "summary")
    VERDICT_ID_FIELD_NUMBER: _ClassVar[int]
    TRIAL_ID_FIELD_NUMBER: _ClassVar[int]
    TRIAL_REVISION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_AT_US_FIELD_NUMBER: _ClassVar[int]
    UNTIL_US_FIELD_NUMBER: _ClassVar[int]
    ARMS_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_RATIO_LOG_E_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_RATIO_MISMATCH_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    verdict_id: bytes
    trial_id: str
    trial_revision: int
    model: str
    computed_at_us: int
    until_us: int
    arms: _containers.RepeatedCompositeFieldContainer[ArmCount]
    evidence: _containers.RepeatedCompositeFieldContainer[Evidence]
    sample_ratio_log_e: float
    sample_ratio_mismatch: bool
    weights: _containers.RepeatedScalarFieldContainer[int]
    warnings: _containers.RepeatedScalarFieldContainer[str]
    summary: str
    def __init__(self, verdict_id: _Optional[bytes] = ..., trial_id: _Optional[str] = ..., trial_revision: _Optional[int] = ..., model: _Optional[str] = ..., computed_at_us: _Optional[int] = ..., until_us: _Optional[int] = ..., arms: _Optional[_Iterable[_Union[ArmCount, _Mapping]]] = ..., evidence: _Optional[_Iterable[_Union[Evidence, _Mapping]]] = ..., sample_ratio_log_e: _Optional[float] = ..., sample_ratio_mismatch: _Optional[bool] = ..., weights: _Optional[_Iterable[int]] = ..., warnings: _Optional[_Iterable[str]] = ..., summary: _Optional[str] = ...) -> None: ...

class ArmCount(_message.Message):
    __slots__ = ("name", "requests", "units", "errors", "requests_since")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    UNITS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_SINCE_FIELD_NUMBER: _ClassVar[int]
    name: str
    requests: int
    units: int
    errors: int
    requests_since: int
    def __init__(self, name: _Optional[str] = ..., requests: _Optional[int] = ..., units: _Optional[int] = ..., errors: _Optional[int] = ..., requests_since: _Optional[int] = ...) -> None: ...

class Evidence(_message.Message):
    __slots__ = ("metric", "role", "arm", "control_units", "units", "control_mean", "mean", "estimate", "low", "high", "alpha", "log_e_harm", "log_e_safe", "log_e_better", "finding", "method", "reason")
    class Finding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        FINDING_UNSPECIFIED: _ClassVar[Evidence.Finding]
        FINDING_UNDECIDED: _ClassVar[Evidence.Finding]
        FINDING_HARMFUL: _ClassVar[Evidence.Finding]
        FINDING_SAFE: _ClassVar[Evidence.Finding]
        FINDING_BETTER: _ClassVar[Evidence.Finding]
    FINDING_UNSPECIFIED: Evidence.Finding
    FINDING_UNDECIDED: Evidence.Finding
    FINDING_HARMFUL: Evidence.Finding
    FINDING_SAFE: Evidence.Finding
    FINDING_BETTER: Evidence.Finding
    METRIC_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ARM_FIELD_NUMBER: _ClassVar[int]
    CONTROL_UNITS_FIELD_NUMBER: _ClassVar[int]
    UNITS_FIELD_NUMBER: _ClassVar[int]
    CONTROL_MEAN_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    ESTIMATE_FIELD_NUMBER: _ClassVar[int]
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    LOG_E_HARM_FIELD_NUMBER: _ClassVar[int]
    LOG_E_SAFE_FIELD_NUMBER: _ClassVar[int]
    LOG_E_BETTER_FIELD_NUMBER: _ClassVar[int]
    FINDING_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    metric: str
    role: TrialMetric.Role
    arm: str
    control_units: int
    units: int
    control_mean: float
    mean: float
    estimate: float
    low: float
    high: float
    alpha: float
    log_e_harm: float
    log_e_safe: float
    log_e_better: float
    finding: Evidence.Finding
    method: str
    reason: str
    def __init__(self, metric: _Optional[str] = ..., role: _Optional[_Union[TrialMetric.Role, str]] = ..., arm: _Optional[str] = ..., control_units: _Optional[int] = ..., units: _Optional[int] = ..., control_mean: _Optional[float] = ..., mean: _Optional[float] = ..., estimate: _Optional[float] = ..., low: _Optional[float] = ..., high: _Optional[float] = ..., alpha: _Optional[float] = ..., log_e_harm: _Optional[float] = ..., log_e_safe: _Optional[float] = ..., log_e_better: _Optional[float] = ..., finding: _Optional[_Union[Evidence.Finding, str]] = ..., method: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...
