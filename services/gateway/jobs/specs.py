"""What a caller asks for: the job as REST, Kafka and OpenAI's routes hand it in, checked as far as its text
goes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import msgspec
from headrace.v1.batch_pb2 import BatchJob, InputFormat, OutputFormat
from headrace.v1.dataplane_pb2 import Priority

from services.common.errors import InvalidArgument
from services.gateway.codecs.native import wrong_field
from services.gateway.codecs.tensors import PARSE_ERRORS, malformed

Kind = Literal["batch", "openai", "async"]

INPUT_FORMATS = {
    "jsonl": InputFormat.INPUT_FORMAT_JSON_LINES,
    "csv": InputFormat.INPUT_FORMAT_CSV,
    "parquet": InputFormat.INPUT_FORMAT_PARQUET,
    "arrow": InputFormat.INPUT_FORMAT_ARROW,
    "images": InputFormat.INPUT_FORMAT_IMAGES,
}
OUTPUT_FORMATS = {
    "jsonl": OutputFormat.OUTPUT_FORMAT_JSON_LINES,
    "parquet": OutputFormat.OUTPUT_FORMAT_PARQUET,
}
PRIORITIES = {
    "high": Priority.PRIORITY_HIGH,
    "normal": Priority.PRIORITY_NORMAL,
    "low": Priority.PRIORITY_LOW,
}
_BY_ENDING = {
    ".jsonl": InputFormat.INPUT_FORMAT_JSON_LINES,
    ".ndjson": InputFormat.INPUT_FORMAT_JSON_LINES,
    ".csv": InputFormat.INPUT_FORMAT_CSV,
    ".parquet": InputFormat.INPUT_FORMAT_PARQUET,
    ".arrow": InputFormat.INPUT_FORMAT_ARROW,
    ".feather": InputFormat.INPUT_FORMAT_ARROW,
}

_ENUMERATIONS = {"input_format": InputFormat, "output_format": OutputFormat, "priority": Priority}

#: Where the metadata of a stored job keep `JobSpec.shown`.
SHOWN: Final = "headrace.shown"

DAY_S = 24 * 3600
_MAX_EXPIRES_S = 30 * DAY_S
_MAX_METADATA = 16
_MAX_METADATA_KEY = 64
_MAX_METADATA_VALUE = 512
_MAX_CALLBACK_URL = 2048
_MAX_IDEMPOTENCY_KEY = 256
#: Also a folder in the artifact store, so nothing that a path could mean otherwise.
_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class JobSpec:
    """One job. Exactly one of `inputs` (a JSON array of rows) and `input_uri` is set. Enumerations are those
    of batch.proto; their zero means the default. `expires_in_s` 0: a day. `job_id` empty: one is made.
    `shown`: what is kept for showing its answer."""

    model: str
    version: str = ""
    inputs: bytes | None = None
    input_uri: str = ""
    input_format: InputFormat = InputFormat.INPUT_FORMAT_UNSPECIFIED
    output_format: OutputFormat = OutputFormat.OUTPUT_FORMAT_UNSPECIFIED
    callback_url: str = ""
    priority: Priority = Priority.PRIORITY_UNSPECIFIED
    metadata: Mapping[str, str] = field(default_factory=dict)
    exclude_from_drift: bool = False
    exclude_from_experiments: bool = False
    expires_in_s: int = 0
    job_id: str = ""
    kind: Kind = "batch"
    idempotency_key: str = ""
    shown: Mapping[str, Any] | None = None

    @property
    def kept(self) -> dict[str, Any]:
        """Metadata as they are stored."""
        return dict(self.metadata) if self.shown is None else {**self.metadata, SHOWN: self.shown}


_ABSENT = msgspec.Raw(b"")


class BatchBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /v1/batch`, and the JSON form of a record of batch.jobs.v1 (which may have
    `job_id`)."""

    model: str
    version: str | int | None = None
    inputs: msgspec.Raw = _ABSENT
    input_uri: str = ""
    input_format: Literal["", "jsonl", "csv", "parquet", "arrow", "images"] = ""
    callback_url: str | None = None
    priority: Literal["high", "normal", "low"] = "normal"
    output_format: Literal["jsonl", "parquet"] = "jsonl"
    metadata: dict[str, str] | None = None
    exclude_from: list[Literal["drift", "experiments"]] | None = None
    expires_in_s: int | None = None
    job_id: str = ""


_body = msgspec.json.Decoder(BatchBody)


def spec_of_json(raw: bytes) -> JobSpec:
    """Raises InvalidArgument naming the field, or MalformedBody."""
    try:
        body = _body.decode(raw)
    except msgspec.ValidationError as error:
        raise wrong_field(error, BatchBody) from None
    except PARSE_ERRORS as error:
        raise malformed(error) from None
    if body.expires_in_s is not None and body.expires_in_s <= 0:
        raise InvalidArgument("expires_in_s must be at least 1.", field="expires_in_s")
    excluded = body.exclude_from or []
    return validated(
        JobSpec(
            model=body.model,
            version="" if body.version is None else str(body.version),
            inputs=None if body.inputs is _ABSENT else bytes(body.inputs),
            input_uri=body.input_uri,
            input_format=INPUT_FORMATS.get(body.input_format, InputFormat.INPUT_FORMAT_UNSPECIFIED),
            output_format=OUTPUT_FORMATS[body.output_format],
            callback_url=body.callback_url or "",
            priority=PRIORITIES[body.priority],
            metadata=body.metadata or {},
            exclude_from_drift="drift" in excluded,
            exclude_from_experiments="experiments" in excluded,
            expires_in_s=body.expires_in_s or 0,
            job_id=body.job_id,
        )
    )


def spec_of_record(message: BatchJob) -> JobSpec:
    """The protobuf form of a record of batch.jobs.v1. Raises InvalidArgument naming the field."""
    return validated(
        JobSpec(
            model=message.model,
            version=message.version,
            inputs=message.inputs_json or None,
            input_uri=message.input_uri,
            input_format=message.input_format,
            output_format=message.output_format,
            callback_url=message.callback_url,
            priority=message.priority,
            metadata=dict(message.metadata),
            exclude_from_drift=message.exclude_from_drift,
            exclude_from_experiments=message.exclude_from_experiments,
            expires_in_s=message.expires_in_s,
            job_id=message.job_id,
        )
    )


def validated(spec: JobSpec) -> JobSpec:
    """`spec` with its defaults filled in. Raises InvalidArgument naming the field; whether the model and the
    input exist is not looked at."""
    if not spec.model:
        raise InvalidArgument("model is missing.", field="model")
    if (spec.inputs is None) == (not spec.input_uri):
        raise InvalidArgument("Send inputs or input_uri, one of them.", field="inputs")
    if spec.job_id and not is_job_id(spec.job_id):
        raise InvalidArgument("A job id has 1 to 128 letters, digits, `.`, `_` or `-`.", field="job_id")
    if not 0 <= spec.expires_in_s <= _MAX_EXPIRES_S:
        raise InvalidArgument(f"expires_in_s must be 1 … {_MAX_EXPIRES_S}.", field="expires_in_s")
    if len(spec.callback_url) > _MAX_CALLBACK_URL:
        raise InvalidArgument("callback_url is too long.", field="callback_url")
    if len(spec.idempotency_key) > _MAX_IDEMPOTENCY_KEY or "\0" in spec.idempotency_key:
        raise InvalidArgument(
            f"An idempotency key has at most {_MAX_IDEMPOTENCY_KEY} characters.", field="Idempotency-Key"
        )
    for name in ("input_uri", "callback_url", "version"):
        if "\0" in getattr(spec, name):
            raise InvalidArgument(f"{name} holds a zero character.", field=name)
    _check_metadata(spec.metadata)
    for name, enumeration in _ENUMERATIONS.items():  # protobuf takes any number for one
        if getattr(spec, name) not in enumeration.values():
            raise InvalidArgument(f"{name} is not known.", field=name)
    return replace(
        spec,
        input_format=_format_of(spec),
        output_format=spec.output_format or OutputFormat.OUTPUT_FORMAT_JSON_LINES,
        priority=spec.priority or Priority.PRIORITY_NORMAL,
        expires_in_s=spec.expires_in_s or DAY_S,
    )


def is_job_id(text: str) -> bool:
    """Whether a job can have that id."""
    return _JOB_ID.fullmatch(text) is not None


def rows_as_lines(inputs: bytes) -> tuple[bytes, int]:
    """A JSON array of rows as JSON Lines, and how many they are. Raises InvalidArgument with field
    `inputs`."""
    try:
        # Without indentation no value spans lines; strings hold no raw newline in JSON.
        rows = msgspec.json.decode(msgspec.json.format(inputs, indent=-1), type=list[msgspec.Raw])
    except (msgspec.ValidationError, *PARSE_ERRORS):
        raise InvalidArgument("inputs is a JSON array of rows.", field="inputs") from None
    if not rows:
        raise InvalidArgument("inputs has no row.", field="inputs")
    return b"\n".join(bytes(row) for row in rows) + b"\n", len(rows)


def _format_of(spec: JobSpec) -> InputFormat:
    if spec.inputs is not None:
        return InputFormat.INPUT_FORMAT_JSON_LINES
    if spec.input_format:
        return spec.input_format
    if spec.input_uri.endswith("/"):
        return InputFormat.INPUT_FORMAT_IMAGES
    name = spec.input_uri.rpartition("/")[2].lower()
    for ending, kind in _BY_ENDING.items():
        if name.endswith(ending):
            return kind
    known = ", ".join(INPUT_FORMATS)
    raise InvalidArgument(
        f"The input's name does not tell its format; set it: {known}.", field="input_format"
    )


def _check_metadata(metadata: Mapping[str, str]) -> None:
    if len(metadata) > _MAX_METADATA:
        raise InvalidArgument(f"metadata has at most {_MAX_METADATA} entries.", field="metadata")
    for key, value in metadata.items():
        at = f"metadata.{key[:_MAX_METADATA_KEY]}"
        if not 0 < len(key) <= _MAX_METADATA_KEY or len(value) > _MAX_METADATA_VALUE or "\0" in key + value:
            raise InvalidArgument(
                f"A key of metadata has 1 to {_MAX_METADATA_KEY} characters, a value at most "
                f"{_MAX_METADATA_VALUE}.",
                field=at,
            )
