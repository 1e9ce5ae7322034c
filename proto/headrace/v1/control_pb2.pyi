from headrace.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Unit(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UNIT_UNSPECIFIED: _ClassVar[Unit]
    UNIT_USER: _ClassVar[Unit]
    UNIT_SESSION: _ClassVar[Unit]
    UNIT_REQUEST: _ClassVar[Unit]

class Balancing(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BALANCING_UNSPECIFIED: _ClassVar[Balancing]
    BALANCING_LEAST_LATENCY: _ClassVar[Balancing]
    BALANCING_ROUND_ROBIN: _ClassVar[Balancing]
    BALANCING_WEIGHTED: _ClassVar[Balancing]
    BALANCING_CONSISTENT_HASH: _ClassVar[Balancing]
UNIT_UNSPECIFIED: Unit
UNIT_USER: Unit
UNIT_SESSION: Unit
UNIT_REQUEST: Unit
BALANCING_UNSPECIFIED: Balancing
BALANCING_LEAST_LATENCY: Balancing
BALANCING_ROUND_ROBIN: Balancing
BALANCING_WEIGHTED: Balancing
BALANCING_CONSISTENT_HASH: Balancing

class ServingConfig(_message.Message):
    __slots__ = ("model", "revision", "versions", "aliases", "buckets", "salt", "pool", "batching", "balancing", "log_payloads", "default_timeout_ms", "published_at_us", "fallback", "cache", "shadow", "hedging", "experiments", "holdout")
    class AliasesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    BATCHING_FIELD_NUMBER: _ClassVar[int]
    BALANCING_FIELD_NUMBER: _ClassVar[int]
    LOG_PAYLOADS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_AT_US_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    HEDGING_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENTS_FIELD_NUMBER: _ClassVar[int]
    HOLDOUT_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: int
    versions: _containers.RepeatedCompositeFieldContainer[ServedVersion]
    aliases: _containers.ScalarMap[str, str]
    buckets: _containers.RepeatedCompositeFieldContainer[BucketRange]
    salt: str
    pool: str
    batching: Batching
    balancing: Balancing
    log_payloads: bool
    default_timeout_ms: int
    published_at_us: int
    fallback: Fallback
    cache: Cache
    shadow: Shadow
    hedging: Hedging
    experiments: _containers.RepeatedCompositeFieldContainer[Experiment]
    holdout: int
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[int] = ..., versions: _Optional[_Iterable[_Union[ServedVersion, _Mapping]]] = ..., aliases: _Optional[_Mapping[str, str]] = ..., buckets: _Optional[_Iterable[_Union[BucketRange, _Mapping]]] = ..., salt: _Optional[str] = ..., pool: _Optional[str] = ..., batching: _Optional[_Union[Batching, _Mapping]] = ..., balancing: _Optional[_Union[Balancing, str]] = ..., log_payloads: _Optional[bool] = ..., default_timeout_ms: _Optional[int] = ..., published_at_us: _Optional[int] = ..., fallback: _Optional[_Union[Fallback, _Mapping]] = ..., cache: _Optional[_Union[Cache, _Mapping]] = ..., shadow: _Optional[_Union[Shadow, _Mapping]] = ..., hedging: _Optional[_Union[Hedging, _Mapping]] = ..., experiments: _Optional[_Iterable[_Union[Experiment, _Mapping]]] = ..., holdout: _Optional[int] = ...) -> None: ...

class Experiment(_message.Message):
    __slots__ = ("experiment_id", "unit", "salt", "layer", "variants", "buckets", "targeting", "override_units", "override_variants")
    EXPERIMENT_ID_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    VARIANTS_FIELD_NUMBER: _ClassVar[int]
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    TARGETING_FIELD_NUMBER: _ClassVar[int]
    OVERRIDE_UNITS_FIELD_NUMBER: _ClassVar[int]
    OVERRIDE_VARIANTS_FIELD_NUMBER: _ClassVar[int]
    experiment_id: str
    unit: Unit
    salt: str
    layer: _containers.RepeatedCompositeFieldContainer[LayerRange]
    variants: _containers.RepeatedCompositeFieldContainer[Variant]
    buckets: _containers.RepeatedCompositeFieldContainer[VariantRange]
    targeting: _containers.RepeatedCompositeFieldContainer[Condition]
    override_units: _containers.RepeatedScalarFieldContainer[int]
    override_variants: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, experiment_id: _Optional[str] = ..., unit: _Optional[_Union[Unit, str]] = ..., salt: _Optional[str] = ..., layer: _Optional[_Iterable[_Union[LayerRange, _Mapping]]] = ..., variants: _Optional[_Iterable[_Union[Variant, _Mapping]]] = ..., buckets: _Optional[_Iterable[_Union[VariantRange, _Mapping]]] = ..., targeting: _Optional[_Iterable[_Union[Condition, _Mapping]]] = ..., override_units: _Optional[_Iterable[int]] = ..., override_variants: _Optional[_Iterable[int]] = ...) -> None: ...

class Variant(_message.Message):
    __slots__ = ("name", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class LayerRange(_message.Message):
    __slots__ = ("first", "last")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    first: int
    last: int
    def __init__(self, first: _Optional[int] = ..., last: _Optional[int] = ...) -> None: ...

class VariantRange(_message.Message):
    __slots__ = ("first", "last", "variant")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    first: int
    last: int
    variant: int
    def __init__(self, first: _Optional[int] = ..., last: _Optional[int] = ..., variant: _Optional[int] = ...) -> None: ...

class Condition(_message.Message):
    __slots__ = ("attribute", "operator", "values")
    class Operator(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        OPERATOR_UNSPECIFIED: _ClassVar[Condition.Operator]
        OPERATOR_IN: _ClassVar[Condition.Operator]
        OPERATOR_NOT_IN: _ClassVar[Condition.Operator]
        OPERATOR_LESS: _ClassVar[Condition.Operator]
        OPERATOR_LESS_OR_EQUAL: _ClassVar[Condition.Operator]
        OPERATOR_GREATER: _ClassVar[Condition.Operator]
        OPERATOR_GREATER_OR_EQUAL: _ClassVar[Condition.Operator]
        OPERATOR_STARTS_WITH: _ClassVar[Condition.Operator]
        OPERATOR_PRESENT: _ClassVar[Condition.Operator]
        OPERATOR_ABSENT: _ClassVar[Condition.Operator]
    OPERATOR_UNSPECIFIED: Condition.Operator
    OPERATOR_IN: Condition.Operator
    OPERATOR_NOT_IN: Condition.Operator
    OPERATOR_LESS: Condition.Operator
    OPERATOR_LESS_OR_EQUAL: Condition.Operator
    OPERATOR_GREATER: Condition.Operator
    OPERATOR_GREATER_OR_EQUAL: Condition.Operator
    OPERATOR_STARTS_WITH: Condition.Operator
    OPERATOR_PRESENT: Condition.Operator
    OPERATOR_ABSENT: Condition.Operator
    ATTRIBUTE_FIELD_NUMBER: _ClassVar[int]
    OPERATOR_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    attribute: str
    operator: Condition.Operator
    values: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.Parameter]
    def __init__(self, attribute: _Optional[str] = ..., operator: _Optional[_Union[Condition.Operator, str]] = ..., values: _Optional[_Iterable[_Union[_tensor_pb2.Parameter, _Mapping]]] = ...) -> None: ...

class Hedging(_message.Message):
    __slots__ = ("quantile", "min_delay_ms")
    QUANTILE_FIELD_NUMBER: _ClassVar[int]
    MIN_DELAY_MS_FIELD_NUMBER: _ClassVar[int]
    quantile: float
    min_delay_ms: int
    def __init__(self, quantile: _Optional[float] = ..., min_delay_ms: _Optional[int] = ...) -> None: ...

class Shadow(_message.Message):
    __slots__ = ("version", "share", "tolerance", "slice_by")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    SLICE_BY_FIELD_NUMBER: _ClassVar[int]
    version: str
    share: int
    tolerance: float
    slice_by: str
    def __init__(self, version: _Optional[str] = ..., share: _Optional[int] = ..., tolerance: _Optional[float] = ..., slice_by: _Optional[str] = ...) -> None: ...

class Cache(_message.Message):
    __slots__ = ("ttl_ms", "max_entry_bytes")
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    MAX_ENTRY_BYTES_FIELD_NUMBER: _ClassVar[int]
    ttl_ms: int
    max_entry_bytes: int
    def __init__(self, ttl_ms: _Optional[int] = ..., max_entry_bytes: _Optional[int] = ...) -> None: ...

class Fallback(_message.Message):
    __slots__ = ("version", "on")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ON_FIELD_NUMBER: _ClassVar[int]
    version: str
    on: _containers.RepeatedScalarFieldContainer[_tensor_pb2.Code]
    def __init__(self, version: _Optional[str] = ..., on: _Optional[_Iterable[_Union[_tensor_pb2.Code, str]]] = ...) -> None: ...

class ServedVersion(_message.Message):
    __slots__ = ("version", "artifact_digest", "backend", "signature", "variant", "weight", "artifact_bytes", "held")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_BYTES_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    version: str
    artifact_digest: str
    backend: str
    signature: _tensor_pb2.Signature
    variant: str
    weight: int
    artifact_bytes: int
    held: bool
    def __init__(self, version: _Optional[str] = ..., artifact_digest: _Optional[str] = ..., backend: _Optional[str] = ..., signature: _Optional[_Union[_tensor_pb2.Signature, _Mapping]] = ..., variant: _Optional[str] = ..., weight: _Optional[int] = ..., artifact_bytes: _Optional[int] = ..., held: _Optional[bool] = ...) -> None: ...

class BucketRange(_message.Message):
    __slots__ = ("first", "last", "version")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    first: int
    last: int
    version: str
    def __init__(self, first: _Optional[int] = ..., last: _Optional[int] = ..., version: _Optional[str] = ...) -> None: ...

class Batching(_message.Message):
    __slots__ = ("max_rows", "max_delay_us", "preferred_rows", "max_queue_rows", "max_queue_ms")
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    MAX_DELAY_US_FIELD_NUMBER: _ClassVar[int]
    PREFERRED_ROWS_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUE_ROWS_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    max_rows: int
    max_delay_us: int
    preferred_rows: _containers.RepeatedScalarFieldContainer[int]
    max_queue_rows: int
    max_queue_ms: int
    def __init__(self, max_rows: _Optional[int] = ..., max_delay_us: _Optional[int] = ..., preferred_rows: _Optional[_Iterable[int]] = ..., max_queue_rows: _Optional[int] = ..., max_queue_ms: _Optional[int] = ...) -> None: ...

class ApiKey(_message.Message):
    __slots__ = ("key_id", "name", "key_sha256", "scopes", "rate_per_second", "burst", "revoked", "expires_at_us", "revision", "models")
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    KEY_SHA256_FIELD_NUMBER: _ClassVar[int]
    SCOPES_FIELD_NUMBER: _ClassVar[int]
    RATE_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    BURST_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_US_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    key_id: str
    name: str
    key_sha256: bytes
    scopes: _containers.RepeatedScalarFieldContainer[str]
    rate_per_second: float
    burst: int
    revoked: bool
    expires_at_us: int
    revision: int
    models: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, key_id: _Optional[str] = ..., name: _Optional[str] = ..., key_sha256: _Optional[bytes] = ..., scopes: _Optional[_Iterable[str]] = ..., rate_per_second: _Optional[float] = ..., burst: _Optional[int] = ..., revoked: _Optional[bool] = ..., expires_at_us: _Optional[int] = ..., revision: _Optional[int] = ..., models: _Optional[_Iterable[str]] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("worker_id", "incarnation", "frames_address", "grpc_address", "pool", "state", "versions", "queued_rows", "running_rows", "memory_bytes", "memory_limit_bytes", "device", "sent_at_us", "interval_ms", "sequence")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[WorkerStatus.State]
        STATE_STARTING: _ClassVar[WorkerStatus.State]
        STATE_READY: _ClassVar[WorkerStatus.State]
        STATE_DRAINING: _ClassVar[WorkerStatus.State]
        STATE_GONE: _ClassVar[WorkerStatus.State]
    STATE_UNSPECIFIED: WorkerStatus.State
    STATE_STARTING: WorkerStatus.State
    STATE_READY: WorkerStatus.State
    STATE_DRAINING: WorkerStatus.State
    STATE_GONE: WorkerStatus.State
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    FRAMES_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    GRPC_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_ROWS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_ROWS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    SENT_AT_US_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: str
    frames_address: str
    grpc_address: str
    pool: str
    state: WorkerStatus.State
    versions: _containers.RepeatedCompositeFieldContainer[LoadedVersion]
    queued_rows: int
    running_rows: int
    memory_bytes: int
    memory_limit_bytes: int
    device: str
    sent_at_us: int
    interval_ms: int
    sequence: int
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., frames_address: _Optional[str] = ..., grpc_address: _Optional[str] = ..., pool: _Optional[str] = ..., state: _Optional[_Union[WorkerStatus.State, str]] = ..., versions: _Optional[_Iterable[_Union[LoadedVersion, _Mapping]]] = ..., queued_rows: _Optional[int] = ..., running_rows: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., memory_limit_bytes: _Optional[int] = ..., device: _Optional[str] = ..., sent_at_us: _Optional[int] = ..., interval_ms: _Optional[int] = ..., sequence: _Optional[int] = ...) -> None: ...

class LoadedVersion(_message.Message):
    __slots__ = ("model", "version", "state", "artifact_digest", "error", "memory_bytes", "best_rows", "best_rows_per_s", "totals")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[LoadedVersion.State]
        STATE_LOADING: _ClassVar[LoadedVersion.State]
        STATE_WARMING: _ClassVar[LoadedVersion.State]
        STATE_READY: _ClassVar[LoadedVersion.State]
        STATE_FAILED: _ClassVar[LoadedVersion.State]
        STATE_UNLOADING: _ClassVar[LoadedVersion.State]
        STATE_EVICTED: _ClassVar[LoadedVersion.State]
    STATE_UNSPECIFIED: LoadedVersion.State
    STATE_LOADING: LoadedVersion.State
    STATE_WARMING: LoadedVersion.State
    STATE_READY: LoadedVersion.State
    STATE_FAILED: LoadedVersion.State
    STATE_UNLOADING: LoadedVersion.State
    STATE_EVICTED: LoadedVersion.State
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    BEST_ROWS_FIELD_NUMBER: _ClassVar[int]
    BEST_ROWS_PER_S_FIELD_NUMBER: _ClassVar[int]
    TOTALS_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    state: LoadedVersion.State
    artifact_digest: str
    error: str
    memory_bytes: int
    best_rows: int
    best_rows_per_s: float
    totals: ServingTotals
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., state: _Optional[_Union[LoadedVersion.State, str]] = ..., artifact_digest: _Optional[str] = ..., error: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., best_rows: _Optional[int] = ..., best_rows_per_s: _Optional[float] = ..., totals: _Optional[_Union[ServingTotals, _Mapping]] = ...) -> None: ...

class ServingTotals(_message.Message):
    __slots__ = ("succeeded", "rows", "failed", "batches", "ran", "request_ns", "queue_ns", "compute_input_ns", "compute_infer_ns", "compute_output_ns", "last_ran_at_us")
    SUCCEEDED_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    RAN_FIELD_NUMBER: _ClassVar[int]
    REQUEST_NS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_INPUT_NS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_INFER_NS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_OUTPUT_NS_FIELD_NUMBER: _ClassVar[int]
    LAST_RAN_AT_US_FIELD_NUMBER: _ClassVar[int]
    succeeded: int
    rows: int
    failed: int
    batches: int
    ran: int
    request_ns: int
    queue_ns: int
    compute_input_ns: int
    compute_infer_ns: int
    compute_output_ns: int
    last_ran_at_us: int
    def __init__(self, succeeded: _Optional[int] = ..., rows: _Optional[int] = ..., failed: _Optional[int] = ..., batches: _Optional[int] = ..., ran: _Optional[int] = ..., request_ns: _Optional[int] = ..., queue_ns: _Optional[int] = ..., compute_input_ns: _Optional[int] = ..., compute_infer_ns: _Optional[int] = ..., compute_output_ns: _Optional[int] = ..., last_ran_at_us: _Optional[int] = ...) -> None: ...
