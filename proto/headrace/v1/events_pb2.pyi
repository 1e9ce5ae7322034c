from headrace.v1 import dataplane_pb2 as _dataplane_pb2
from headrace.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ShadowVerdict(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SHADOW_VERDICT_UNSPECIFIED: _ClassVar[ShadowVerdict]
    SHADOW_VERDICT_EQUAL: _ClassVar[ShadowVerdict]
    SHADOW_VERDICT_DIFFERENT: _ClassVar[ShadowVerdict]
    SHADOW_VERDICT_FAILED: _ClassVar[ShadowVerdict]
    SHADOW_VERDICT_INCOMPARABLE: _ClassVar[ShadowVerdict]
SHADOW_VERDICT_UNSPECIFIED: ShadowVerdict
SHADOW_VERDICT_EQUAL: ShadowVerdict
SHADOW_VERDICT_DIFFERENT: ShadowVerdict
SHADOW_VERDICT_FAILED: ShadowVerdict
SHADOW_VERDICT_INCOMPARABLE: ShadowVerdict

class PredictionBatch(_message.Message):
    __slots__ = ("batch_id", "source", "writer", "model", "version", "artifact_digest", "answered_at_us", "request_ids", "unit_hashes", "variants", "variant_names", "propensities", "revisions", "codes", "origins", "attempts", "cached", "latency_us", "queue_us", "compute_us", "rows", "inputs", "outputs", "exclude_from_drift", "exclude_from_experiments", "answered_before_us", "experiments", "experiment_ids")
    class Writer(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        WRITER_UNSPECIFIED: _ClassVar[PredictionBatch.Writer]
        WRITER_WORKER: _ClassVar[PredictionBatch.Writer]
        WRITER_ROUTER: _ClassVar[PredictionBatch.Writer]
    WRITER_UNSPECIFIED: PredictionBatch.Writer
    WRITER_WORKER: PredictionBatch.Writer
    WRITER_ROUTER: PredictionBatch.Writer
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    WRITER_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_AT_US_FIELD_NUMBER: _ClassVar[int]
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    UNIT_HASHES_FIELD_NUMBER: _ClassVar[int]
    VARIANTS_FIELD_NUMBER: _ClassVar[int]
    VARIANT_NAMES_FIELD_NUMBER: _ClassVar[int]
    PROPENSITIES_FIELD_NUMBER: _ClassVar[int]
    REVISIONS_FIELD_NUMBER: _ClassVar[int]
    CODES_FIELD_NUMBER: _ClassVar[int]
    ORIGINS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    LATENCY_US_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_FROM_DRIFT_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_FROM_EXPERIMENTS_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_BEFORE_US_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENTS_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_IDS_FIELD_NUMBER: _ClassVar[int]
    batch_id: bytes
    source: str
    writer: PredictionBatch.Writer
    model: str
    version: str
    artifact_digest: str
    answered_at_us: int
    request_ids: bytes
    unit_hashes: _containers.RepeatedScalarFieldContainer[int]
    variants: _containers.RepeatedScalarFieldContainer[int]
    variant_names: _containers.RepeatedScalarFieldContainer[str]
    propensities: _containers.RepeatedScalarFieldContainer[float]
    revisions: _containers.RepeatedScalarFieldContainer[int]
    codes: _containers.RepeatedScalarFieldContainer[_tensor_pb2.Code]
    origins: _containers.RepeatedScalarFieldContainer[_dataplane_pb2.Origin]
    attempts: _containers.RepeatedScalarFieldContainer[int]
    cached: _containers.RepeatedScalarFieldContainer[bool]
    latency_us: _containers.RepeatedScalarFieldContainer[int]
    queue_us: _containers.RepeatedScalarFieldContainer[int]
    compute_us: _containers.RepeatedScalarFieldContainer[int]
    rows: _containers.RepeatedScalarFieldContainer[int]
    inputs: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.Tensor]
    outputs: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.Tensor]
    exclude_from_drift: bool
    exclude_from_experiments: bool
    answered_before_us: _containers.RepeatedScalarFieldContainer[int]
    experiments: _containers.RepeatedScalarFieldContainer[int]
    experiment_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, batch_id: _Optional[bytes] = ..., source: _Optional[str] = ..., writer: _Optional[_Union[PredictionBatch.Writer, str]] = ..., model: _Optional[str] = ..., version: _Optional[str] = ..., artifact_digest: _Optional[str] = ..., answered_at_us: _Optional[int] = ..., request_ids: _Optional[bytes] = ..., unit_hashes: _Optional[_Iterable[int]] = ..., variants: _Optional[_Iterable[int]] = ..., variant_names: _Optional[_Iterable[str]] = ..., propensities: _Optional[_Iterable[float]] = ..., revisions: _Optional[_Iterable[int]] = ..., codes: _Optional[_Iterable[_Union[_tensor_pb2.Code, str]]] = ..., origins: _Optional[_Iterable[_Union[_dataplane_pb2.Origin, str]]] = ..., attempts: _Optional[_Iterable[int]] = ..., cached: _Optional[_Iterable[bool]] = ..., latency_us: _Optional[_Iterable[int]] = ..., queue_us: _Optional[_Iterable[int]] = ..., compute_us: _Optional[_Iterable[int]] = ..., rows: _Optional[_Iterable[int]] = ..., inputs: _Optional[_Iterable[_Union[_tensor_pb2.Tensor, _Mapping]]] = ..., outputs: _Optional[_Iterable[_Union[_tensor_pb2.Tensor, _Mapping]]] = ..., exclude_from_drift: _Optional[bool] = ..., exclude_from_experiments: _Optional[bool] = ..., answered_before_us: _Optional[_Iterable[int]] = ..., experiments: _Optional[_Iterable[int]] = ..., experiment_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class Outcome(_message.Message):
    __slots__ = ("event_id", "request_id", "model", "metric", "number", "text", "row", "observed_at_us")
    EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    ROW_FIELD_NUMBER: _ClassVar[int]
    OBSERVED_AT_US_FIELD_NUMBER: _ClassVar[int]
    event_id: bytes
    request_id: bytes
    model: str
    metric: str
    number: float
    text: str
    row: int
    observed_at_us: int
    def __init__(self, event_id: _Optional[bytes] = ..., request_id: _Optional[bytes] = ..., model: _Optional[str] = ..., metric: _Optional[str] = ..., number: _Optional[float] = ..., text: _Optional[str] = ..., row: _Optional[int] = ..., observed_at_us: _Optional[int] = ...) -> None: ...

class OutcomeBatch(_message.Message):
    __slots__ = ("outcomes",)
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    outcomes: _containers.RepeatedCompositeFieldContainer[Outcome]
    def __init__(self, outcomes: _Optional[_Iterable[_Union[Outcome, _Mapping]]] = ...) -> None: ...

class DriftAlert(_message.Message):
    __slots__ = ("alert_id", "model", "version", "feature", "detector", "value", "threshold", "severity", "critical_value", "p_value", "window_start_us", "window_end_us", "reference_rows", "window_rows", "message", "resolved_at_us", "window_sampled_rows")
    class Severity(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        SEVERITY_UNSPECIFIED: _ClassVar[DriftAlert.Severity]
        SEVERITY_WARNING: _ClassVar[DriftAlert.Severity]
        SEVERITY_CRITICAL: _ClassVar[DriftAlert.Severity]
    SEVERITY_UNSPECIFIED: DriftAlert.Severity
    SEVERITY_WARNING: DriftAlert.Severity
    SEVERITY_CRITICAL: DriftAlert.Severity
    ALERT_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FEATURE_FIELD_NUMBER: _ClassVar[int]
    DETECTOR_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    SEVERITY_FIELD_NUMBER: _ClassVar[int]
    CRITICAL_VALUE_FIELD_NUMBER: _ClassVar[int]
    P_VALUE_FIELD_NUMBER: _ClassVar[int]
    WINDOW_START_US_FIELD_NUMBER: _ClassVar[int]
    WINDOW_END_US_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_ROWS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_ROWS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RESOLVED_AT_US_FIELD_NUMBER: _ClassVar[int]
    WINDOW_SAMPLED_ROWS_FIELD_NUMBER: _ClassVar[int]
    alert_id: bytes
    model: str
    version: str
    feature: str
    detector: str
    value: float
    threshold: float
    severity: DriftAlert.Severity
    critical_value: float
    p_value: float
    window_start_us: int
    window_end_us: int
    reference_rows: int
    window_rows: int
    message: str
    resolved_at_us: int
    window_sampled_rows: int
    def __init__(self, alert_id: _Optional[bytes] = ..., model: _Optional[str] = ..., version: _Optional[str] = ..., feature: _Optional[str] = ..., detector: _Optional[str] = ..., value: _Optional[float] = ..., threshold: _Optional[float] = ..., severity: _Optional[_Union[DriftAlert.Severity, str]] = ..., critical_value: _Optional[float] = ..., p_value: _Optional[float] = ..., window_start_us: _Optional[int] = ..., window_end_us: _Optional[int] = ..., reference_rows: _Optional[int] = ..., window_rows: _Optional[int] = ..., message: _Optional[str] = ..., resolved_at_us: _Optional[int] = ..., window_sampled_rows: _Optional[int] = ...) -> None: ...

class ShadowComparison(_message.Message):
    __slots__ = ("batch_id", "source", "model", "version", "shadow_version", "artifact_digest", "shadow_artifact_digest", "compared_at_us", "tolerance", "request_ids", "unit_hashes", "revisions", "codes", "shadow_codes", "latency_us", "shadow_latency_us", "verdicts", "rows", "rows_equal", "outputs", "slices", "slice_names", "slice_by")
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SHADOW_VERSION_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SHADOW_ARTIFACT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    COMPARED_AT_US_FIELD_NUMBER: _ClassVar[int]
    TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    UNIT_HASHES_FIELD_NUMBER: _ClassVar[int]
    REVISIONS_FIELD_NUMBER: _ClassVar[int]
    CODES_FIELD_NUMBER: _ClassVar[int]
    SHADOW_CODES_FIELD_NUMBER: _ClassVar[int]
    LATENCY_US_FIELD_NUMBER: _ClassVar[int]
    SHADOW_LATENCY_US_FIELD_NUMBER: _ClassVar[int]
    VERDICTS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ROWS_EQUAL_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    SLICE_NAMES_FIELD_NUMBER: _ClassVar[int]
    SLICE_BY_FIELD_NUMBER: _ClassVar[int]
    batch_id: bytes
    source: str
    model: str
    version: str
    shadow_version: str
    artifact_digest: str
    shadow_artifact_digest: str
    compared_at_us: int
    tolerance: float
    request_ids: bytes
    unit_hashes: _containers.RepeatedScalarFieldContainer[int]
    revisions: _containers.RepeatedScalarFieldContainer[int]
    codes: _containers.RepeatedScalarFieldContainer[_tensor_pb2.Code]
    shadow_codes: _containers.RepeatedScalarFieldContainer[_tensor_pb2.Code]
    latency_us: _containers.RepeatedScalarFieldContainer[int]
    shadow_latency_us: _containers.RepeatedScalarFieldContainer[int]
    verdicts: _containers.RepeatedScalarFieldContainer[ShadowVerdict]
    rows: _containers.RepeatedScalarFieldContainer[int]
    rows_equal: _containers.RepeatedScalarFieldContainer[int]
    outputs: _containers.RepeatedCompositeFieldContainer[OutputComparison]
    slices: _containers.RepeatedScalarFieldContainer[int]
    slice_names: _containers.RepeatedScalarFieldContainer[str]
    slice_by: str
    def __init__(self, batch_id: _Optional[bytes] = ..., source: _Optional[str] = ..., model: _Optional[str] = ..., version: _Optional[str] = ..., shadow_version: _Optional[str] = ..., artifact_digest: _Optional[str] = ..., shadow_artifact_digest: _Optional[str] = ..., compared_at_us: _Optional[int] = ..., tolerance: _Optional[float] = ..., request_ids: _Optional[bytes] = ..., unit_hashes: _Optional[_Iterable[int]] = ..., revisions: _Optional[_Iterable[int]] = ..., codes: _Optional[_Iterable[_Union[_tensor_pb2.Code, str]]] = ..., shadow_codes: _Optional[_Iterable[_Union[_tensor_pb2.Code, str]]] = ..., latency_us: _Optional[_Iterable[int]] = ..., shadow_latency_us: _Optional[_Iterable[int]] = ..., verdicts: _Optional[_Iterable[_Union[ShadowVerdict, str]]] = ..., rows: _Optional[_Iterable[int]] = ..., rows_equal: _Optional[_Iterable[int]] = ..., outputs: _Optional[_Iterable[_Union[OutputComparison, _Mapping]]] = ..., slices: _Optional[_Iterable[int]] = ..., slice_names: _Optional[_Iterable[str]] = ..., slice_by: _Optional[str] = ...) -> None: ...

class OutputComparison(_message.Message):
    __slots__ = ("name", "kind", "rows_equal", "largest_difference", "mean_difference", "rows_same_top", "row_elements", "rows_same_top_five")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[OutputComparison.Kind]
        KIND_NUMBER: _ClassVar[OutputComparison.Kind]
        KIND_LABEL: _ClassVar[OutputComparison.Kind]
        KIND_TEXT: _ClassVar[OutputComparison.Kind]
    KIND_UNSPECIFIED: OutputComparison.Kind
    KIND_NUMBER: OutputComparison.Kind
    KIND_LABEL: OutputComparison.Kind
    KIND_TEXT: OutputComparison.Kind
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ROWS_EQUAL_FIELD_NUMBER: _ClassVar[int]
    LARGEST_DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    MEAN_DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    ROWS_SAME_TOP_FIELD_NUMBER: _ClassVar[int]
    ROW_ELEMENTS_FIELD_NUMBER: _ClassVar[int]
    ROWS_SAME_TOP_FIVE_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: OutputComparison.Kind
    rows_equal: _containers.RepeatedScalarFieldContainer[int]
    largest_difference: _containers.RepeatedScalarFieldContainer[float]
    mean_difference: _containers.RepeatedScalarFieldContainer[float]
    rows_same_top: _containers.RepeatedScalarFieldContainer[int]
    row_elements: _containers.RepeatedScalarFieldContainer[int]
    rows_same_top_five: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[_Union[OutputComparison.Kind, str]] = ..., rows_equal: _Optional[_Iterable[int]] = ..., largest_difference: _Optional[_Iterable[float]] = ..., mean_difference: _Optional[_Iterable[float]] = ..., rows_same_top: _Optional[_Iterable[int]] = ..., row_elements: _Optional[_Iterable[int]] = ..., rows_same_top_five: _Optional[_Iterable[int]] = ...) -> None: ...
