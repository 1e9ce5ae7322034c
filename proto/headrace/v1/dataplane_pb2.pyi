from headrace.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[Priority]
    PRIORITY_HIGH: _ClassVar[Priority]
    PRIORITY_NORMAL: _ClassVar[Priority]
    PRIORITY_LOW: _ClassVar[Priority]

class Origin(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ORIGIN_UNSPECIFIED: _ClassVar[Origin]
    ORIGIN_ONLINE: _ClassVar[Origin]
    ORIGIN_SHADOW: _ClassVar[Origin]
    ORIGIN_BATCH: _ClassVar[Origin]
PRIORITY_UNSPECIFIED: Priority
PRIORITY_HIGH: Priority
PRIORITY_NORMAL: Priority
PRIORITY_LOW: Priority
ORIGIN_UNSPECIFIED: Origin
ORIGIN_ONLINE: Origin
ORIGIN_SHADOW: Origin
ORIGIN_BATCH: Origin

class Hello(_message.Message):
    __slots__ = ("protocol", "role", "instance", "max_in_flight")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    MAX_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    role: str
    instance: str
    max_in_flight: int
    def __init__(self, protocol: _Optional[int] = ..., role: _Optional[str] = ..., instance: _Optional[str] = ..., max_in_flight: _Optional[int] = ...) -> None: ...

class RequestFrame(_message.Message):
    __slots__ = ("hello", "items", "cancels")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    CANCELS_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    items: _containers.RepeatedCompositeFieldContainer[PredictRequest]
    cancels: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., items: _Optional[_Iterable[_Union[PredictRequest, _Mapping]]] = ..., cancels: _Optional[_Iterable[int]] = ...) -> None: ...

class ReplyFrame(_message.Message):
    __slots__ = ("hello", "items", "draining")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    items: _containers.RepeatedCompositeFieldContainer[PredictReply]
    draining: bool
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., items: _Optional[_Iterable[_Union[PredictReply, _Mapping]]] = ..., draining: _Optional[bool] = ...) -> None: ...

class PredictRequest(_message.Message):
    __slots__ = ("id", "model", "version", "inputs", "request_id", "unit", "timeout_us", "priority", "trace", "outputs", "parameters", "received_at_us", "key_id", "variant", "propensity", "unit_hash", "revision", "attempt", "origin", "experiment", "session", "attributes")
    class ParametersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _tensor_pb2.Parameter
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_tensor_pb2.Parameter, _Mapping]] = ...) -> None: ...
    class AttributesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _tensor_pb2.Parameter
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_tensor_pb2.Parameter, _Mapping]] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_US_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_AT_US_FIELD_NUMBER: _ClassVar[int]
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    PROPENSITY_FIELD_NUMBER: _ClassVar[int]
    UNIT_HASH_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    id: int
    model: str
    version: str
    inputs: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.Tensor]
    request_id: bytes
    unit: str
    timeout_us: int
    priority: Priority
    trace: bytes
    outputs: _containers.RepeatedScalarFieldContainer[str]
    parameters: _containers.MessageMap[str, _tensor_pb2.Parameter]
    received_at_us: int
    key_id: str
    variant: str
    propensity: float
    unit_hash: int
    revision: int
    attempt: int
    origin: Origin
    experiment: str
    session: str
    attributes: _containers.MessageMap[str, _tensor_pb2.Parameter]
    def __init__(self, id: _Optional[int] = ..., model: _Optional[str] = ..., version: _Optional[str] = ..., inputs: _Optional[_Iterable[_Union[_tensor_pb2.Tensor, _Mapping]]] = ..., request_id: _Optional[bytes] = ..., unit: _Optional[str] = ..., timeout_us: _Optional[int] = ..., priority: _Optional[_Union[Priority, str]] = ..., trace: _Optional[bytes] = ..., outputs: _Optional[_Iterable[str]] = ..., parameters: _Optional[_Mapping[str, _tensor_pb2.Parameter]] = ..., received_at_us: _Optional[int] = ..., key_id: _Optional[str] = ..., variant: _Optional[str] = ..., propensity: _Optional[float] = ..., unit_hash: _Optional[int] = ..., revision: _Optional[int] = ..., attempt: _Optional[int] = ..., origin: _Optional[_Union[Origin, str]] = ..., experiment: _Optional[str] = ..., session: _Optional[str] = ..., attributes: _Optional[_Mapping[str, _tensor_pb2.Parameter]] = ...) -> None: ...

class PredictReply(_message.Message):
    __slots__ = ("id", "code", "message", "field", "version", "variant", "outputs", "cached", "fallback", "queue_us", "compute_us", "retry_after_ms", "parameters", "experiment")
    class ParametersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _tensor_pb2.Parameter
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_tensor_pb2.Parameter, _Mapping]] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    id: int
    code: _tensor_pb2.Code
    message: str
    field: str
    version: str
    variant: str
    outputs: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.Tensor]
    cached: bool
    fallback: bool
    queue_us: int
    compute_us: int
    retry_after_ms: int
    parameters: _containers.MessageMap[str, _tensor_pb2.Parameter]
    experiment: str
    def __init__(self, id: _Optional[int] = ..., code: _Optional[_Union[_tensor_pb2.Code, str]] = ..., message: _Optional[str] = ..., field: _Optional[str] = ..., version: _Optional[str] = ..., variant: _Optional[str] = ..., outputs: _Optional[_Iterable[_Union[_tensor_pb2.Tensor, _Mapping]]] = ..., cached: _Optional[bool] = ..., fallback: _Optional[bool] = ..., queue_us: _Optional[int] = ..., compute_us: _Optional[int] = ..., retry_after_ms: _Optional[int] = ..., parameters: _Optional[_Mapping[str, _tensor_pb2.Parameter]] = ..., experiment: _Optional[str] = ...) -> None: ...

class UnopenedFrame(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, items: _Optional[_Iterable[bytes]] = ...) -> None: ...

class SealedReply(_message.Message):
    __slots__ = ("id", "code", "message", "field", "version", "variant", "outputs", "cached", "fallback", "queue_us", "compute_us", "retry_after_ms", "parameters", "experiment")
    class ParametersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _tensor_pb2.Parameter
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_tensor_pb2.Parameter, _Mapping]] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    id: int
    code: _tensor_pb2.Code
    message: str
    field: str
    version: str
    variant: str
    outputs: _containers.RepeatedScalarFieldContainer[bytes]
    cached: bool
    fallback: bool
    queue_us: int
    compute_us: int
    retry_after_ms: int
    parameters: _containers.MessageMap[str, _tensor_pb2.Parameter]
    experiment: str
    def __init__(self, id: _Optional[int] = ..., code: _Optional[_Union[_tensor_pb2.Code, str]] = ..., message: _Optional[str] = ..., field: _Optional[str] = ..., version: _Optional[str] = ..., variant: _Optional[str] = ..., outputs: _Optional[_Iterable[bytes]] = ..., cached: _Optional[bool] = ..., fallback: _Optional[bool] = ..., queue_us: _Optional[int] = ..., compute_us: _Optional[int] = ..., retry_after_ms: _Optional[int] = ..., parameters: _Optional[_Mapping[str, _tensor_pb2.Parameter]] = ..., experiment: _Optional[str] = ...) -> None: ...

class SealedReplyFrame(_message.Message):
    __slots__ = ("hello", "items", "draining")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    items: _containers.RepeatedCompositeFieldContainer[SealedReply]
    draining: bool
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., items: _Optional[_Iterable[_Union[SealedReply, _Mapping]]] = ..., draining: _Optional[bool] = ...) -> None: ...
