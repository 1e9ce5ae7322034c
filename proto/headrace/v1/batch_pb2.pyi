from headrace.v1 import dataplane_pb2 as _dataplane_pb2
from headrace.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class InputFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    INPUT_FORMAT_UNSPECIFIED: _ClassVar[InputFormat]
    INPUT_FORMAT_JSON_LINES: _ClassVar[InputFormat]
    INPUT_FORMAT_CSV: _ClassVar[InputFormat]
    INPUT_FORMAT_PARQUET: _ClassVar[InputFormat]
    INPUT_FORMAT_ARROW: _ClassVar[InputFormat]
    INPUT_FORMAT_IMAGES: _ClassVar[InputFormat]
    INPUT_FORMAT_OPENAI: _ClassVar[InputFormat]

class OutputFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTPUT_FORMAT_UNSPECIFIED: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_JSON_LINES: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_PARQUET: _ClassVar[OutputFormat]
INPUT_FORMAT_UNSPECIFIED: InputFormat
INPUT_FORMAT_JSON_LINES: InputFormat
INPUT_FORMAT_CSV: InputFormat
INPUT_FORMAT_PARQUET: InputFormat
INPUT_FORMAT_ARROW: InputFormat
INPUT_FORMAT_IMAGES: InputFormat
INPUT_FORMAT_OPENAI: InputFormat
OUTPUT_FORMAT_UNSPECIFIED: OutputFormat
OUTPUT_FORMAT_JSON_LINES: OutputFormat
OUTPUT_FORMAT_PARQUET: OutputFormat

class BatchJob(_message.Message):
    __slots__ = ("job_id", "model", "version", "input_uri", "inputs_json", "input_format", "callback_url", "priority", "output_format", "metadata", "exclude_from_drift", "exclude_from_experiments", "expires_in_s")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INPUT_URI_FIELD_NUMBER: _ClassVar[int]
    INPUTS_JSON_FIELD_NUMBER: _ClassVar[int]
    INPUT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    CALLBACK_URL_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_FROM_DRIFT_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_FROM_EXPERIMENTS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_S_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    model: str
    version: str
    input_uri: str
    inputs_json: bytes
    input_format: InputFormat
    callback_url: str
    priority: _dataplane_pb2.Priority
    output_format: OutputFormat
    metadata: _containers.ScalarMap[str, str]
    exclude_from_drift: bool
    exclude_from_experiments: bool
    expires_in_s: int
    def __init__(self, job_id: _Optional[str] = ..., model: _Optional[str] = ..., version: _Optional[str] = ..., input_uri: _Optional[str] = ..., inputs_json: _Optional[bytes] = ..., input_format: _Optional[_Union[InputFormat, str]] = ..., callback_url: _Optional[str] = ..., priority: _Optional[_Union[_dataplane_pb2.Priority, str]] = ..., output_format: _Optional[_Union[OutputFormat, str]] = ..., metadata: _Optional[_Mapping[str, str]] = ..., exclude_from_drift: _Optional[bool] = ..., exclude_from_experiments: _Optional[bool] = ..., expires_in_s: _Optional[int] = ...) -> None: ...

class BatchChunk(_message.Message):
    __slots__ = ("job_id", "index", "attempt", "model", "version", "artifact_digest", "first_row", "rows", "input", "output_prefix", "priority", "expires_at_us", "exclude_from_drift", "exclude_from_experiments", "key_id", "run_rows")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_PREFIX_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_US_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_FROM_DRIFT_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_FROM_EXPERIMENTS_FIELD_NUMBER: _ClassVar[int]
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ROWS_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    index: int
    attempt: int
    model: str
    version: str
    artifact_digest: str
    first_row: int
    rows: int
    input: InputRange
    output_prefix: str
    priority: _dataplane_pb2.Priority
    expires_at_us: int
    exclude_from_drift: bool
    exclude_from_experiments: bool
    key_id: str
    run_rows: int
    def __init__(self, job_id: _Optional[str] = ..., index: _Optional[int] = ..., attempt: _Optional[int] = ..., model: _Optional[str] = ..., version: _Optional[str] = ..., artifact_digest: _Optional[str] = ..., first_row: _Optional[int] = ..., rows: _Optional[int] = ..., input: _Optional[_Union[InputRange, _Mapping]] = ..., output_prefix: _Optional[str] = ..., priority: _Optional[_Union[_dataplane_pb2.Priority, str]] = ..., expires_at_us: _Optional[int] = ..., exclude_from_drift: _Optional[bool] = ..., exclude_from_experiments: _Optional[bool] = ..., key_id: _Optional[str] = ..., run_rows: _Optional[int] = ...) -> None: ...

class InputRange(_message.Message):
    __slots__ = ("uri", "format", "etag", "first_byte", "end_byte", "columns", "group", "group_offset", "names", "inline")
    URI_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    FIRST_BYTE_FIELD_NUMBER: _ClassVar[int]
    END_BYTE_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    GROUP_OFFSET_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    INLINE_FIELD_NUMBER: _ClassVar[int]
    uri: str
    format: InputFormat
    etag: str
    first_byte: int
    end_byte: int
    columns: _containers.RepeatedScalarFieldContainer[str]
    group: int
    group_offset: int
    names: _containers.RepeatedScalarFieldContainer[str]
    inline: bytes
    def __init__(self, uri: _Optional[str] = ..., format: _Optional[_Union[InputFormat, str]] = ..., etag: _Optional[str] = ..., first_byte: _Optional[int] = ..., end_byte: _Optional[int] = ..., columns: _Optional[_Iterable[str]] = ..., group: _Optional[int] = ..., group_offset: _Optional[int] = ..., names: _Optional[_Iterable[str]] = ..., inline: _Optional[bytes] = ...) -> None: ...

class BatchChunkResult(_message.Message):
    __slots__ = ("job_id", "index", "attempt", "worker_id", "code", "message", "field", "rows_done", "rows_failed", "results_object", "errors_object", "results_inline", "errors_inline", "started_at_us", "finished_at_us")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    ROWS_DONE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FAILED_FIELD_NUMBER: _ClassVar[int]
    RESULTS_OBJECT_FIELD_NUMBER: _ClassVar[int]
    ERRORS_OBJECT_FIELD_NUMBER: _ClassVar[int]
    RESULTS_INLINE_FIELD_NUMBER: _ClassVar[int]
    ERRORS_INLINE_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_US_FIELD_NUMBER: _ClassVar[int]
    FINISHED_AT_US_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    index: int
    attempt: int
    worker_id: str
    code: _tensor_pb2.Code
    message: str
    field: str
    rows_done: int
    rows_failed: int
    results_object: str
    errors_object: str
    results_inline: bytes
    errors_inline: bytes
    started_at_us: int
    finished_at_us: int
    def __init__(self, job_id: _Optional[str] = ..., index: _Optional[int] = ..., attempt: _Optional[int] = ..., worker_id: _Optional[str] = ..., code: _Optional[_Union[_tensor_pb2.Code, str]] = ..., message: _Optional[str] = ..., field: _Optional[str] = ..., rows_done: _Optional[int] = ..., rows_failed: _Optional[int] = ..., results_object: _Optional[str] = ..., errors_object: _Optional[str] = ..., results_inline: _Optional[bytes] = ..., errors_inline: _Optional[bytes] = ..., started_at_us: _Optional[int] = ..., finished_at_us: _Optional[int] = ...) -> None: ...

class BatchControl(_message.Message):
    __slots__ = ("job_id", "state")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[BatchControl.State]
        STATE_RUNNING: _ClassVar[BatchControl.State]
        STATE_CANCELLED: _ClassVar[BatchControl.State]
        STATE_EXPIRED: _ClassVar[BatchControl.State]
    STATE_UNSPECIFIED: BatchControl.State
    STATE_RUNNING: BatchControl.State
    STATE_CANCELLED: BatchControl.State
    STATE_EXPIRED: BatchControl.State
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    state: BatchControl.State
    def __init__(self, job_id: _Optional[str] = ..., state: _Optional[_Union[BatchControl.State, str]] = ...) -> None: ...
