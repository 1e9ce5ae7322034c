"""`POST /v1/outcomes`: what became of predictions, acknowledged once the broker has it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from hashlib import blake2b

import msgspec
from headrace.v1.events_pb2 import Outcome, OutcomeBatch

from services.common.bus import Bus, Record
from services.common.errors import InvalidArgument, Unavailable
from services.common.ids import parse_id
from services.common.telemetry import current_context, kafka_headers
from services.common.topics import OUTCOMES
from services.gateway.codecs.native import wrong_field
from services.gateway.codecs.tensors import PARSE_ERRORS, malformed
from services.gateway.keys import Key

_MAX_OUTCOMES = 10_000
_MAX_METRIC = 128
_MAX_TEXT_BYTES = 1024
_MODEL = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_RETRY_MS = 1000

Value = bool | int | float | str


class OutcomeBody(msgspec.Struct, forbid_unknown_fields=True):
    """`label`, or `metric` and `value`. Without `event_id`, equal outcomes of one request count once."""

    request_id: str
    label: Value | None = None
    metric: str | None = None
    value: Value | None = None
    row: int = 0
    event_id: str | None = None
    model: str = ""


_one = msgspec.json.Decoder(OutcomeBody)
_many = msgspec.json.Decoder(list[OutcomeBody])


def parse_outcomes(body: bytes, now_us: int, caller: Key) -> list[Outcome]:
    """One outcome or a list of them. Raises InvalidArgument naming the field (`[3].label`), MalformedBody,
    and PermissionDenied for a model that the caller's key is not for: a key for some models has to name one.
    """
    listed = body.lstrip(b" \t\r\n")[:1] == b"["
    try:
        given = _many.decode(body) if listed else [_one.decode(body)]
    except msgspec.ValidationError as error:
        raise wrong_field(error) from None
    except PARSE_ERRORS as error:
        raise malformed(error) from None
    if not given:
        raise InvalidArgument("The list of outcomes is empty.")
    if len(given) > _MAX_OUTCOMES:
        raise InvalidArgument(f"More than {_MAX_OUTCOMES} outcomes at once.")
    for one in given:
        caller.require_model(one.model)
    return [_outcome(one, f"[{index}]." if listed else "", now_us) for index, one in enumerate(given)]


async def publish_outcomes(bus: Bus, outcomes: Sequence[Outcome]) -> None:
    """Return once the broker has them. Raises Unavailable with a time to try again."""
    by_request: dict[bytes, OutcomeBatch] = {}
    for outcome in outcomes:
        by_request.setdefault(outcome.request_id, OutcomeBatch()).outcomes.append(outcome)
    headers = kafka_headers(current_context())
    try:
        await bus.publish(
            [
                Record(OUTCOMES.name, request_id, batch.SerializeToString(), headers)
                for request_id, batch in by_request.items()
            ]
        )
    except Unavailable:
        raise Unavailable(
            "Outcomes cannot be stored now; send them again.", retry_after_ms=_RETRY_MS
        ) from None


def _outcome(body: OutcomeBody, at: str, now_us: int) -> Outcome:
    request_id = parse_id(body.request_id, f"{at}request_id")
    if body.model and not _MODEL.fullmatch(body.model):
        raise InvalidArgument(f"{at}model is not the name of a model.", field=f"{at}model")
    if (body.label is None) == (body.metric is None):
        raise InvalidArgument("An outcome has a label, or a metric and a value.", field=f"{at}label")
    metric = "label" if body.metric is None else body.metric
    value = body.label if body.metric is None else body.value
    where = f"{at}label" if body.metric is None else f"{at}value"
    if value is None:
        raise InvalidArgument(f"{where} is missing.", field=where)
    if not 0 < len(metric) <= _MAX_METRIC or "\0" in metric:
        raise InvalidArgument(
            f"{at}metric must have 1 to {_MAX_METRIC} characters, none of them zero.", field=f"{at}metric"
        )
    if not 0 <= body.row < 1 << 32:
        raise InvalidArgument(f"{at}row must be 0 or more.", field=f"{at}row")
    outcome = Outcome(
        request_id=request_id, model=body.model, metric=metric, row=body.row, observed_at_us=now_us
    )
    if isinstance(value, str):
        if len(value.encode()) > _MAX_TEXT_BYTES:
            raise InvalidArgument(f"{where} is longer than {_MAX_TEXT_BYTES} bytes.", field=where)
        if "\0" in value:
            raise InvalidArgument(f"{where} holds a zero character.", field=where)
        outcome.text = value
    else:
        outcome.number = _number(value, where)
    outcome.event_id = _event_id(body, outcome)
    return outcome


def _number(value: bool | float, where: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InvalidArgument(f"{where} is outside the range of FP64.", field=where)
    return number


def _event_id(body: OutcomeBody, outcome: Outcome) -> bytes:
    """16 bytes: a digest of what the outcome is about, and of its `event_id` or, without one, of its value.
    So an event id need be unique only among the outcomes of one request, metric and row."""
    if body.event_id is not None:
        named = "named", body.event_id
    elif outcome.HasField("text"):
        named = "text", outcome.text
    else:
        named = "number", repr(outcome.number)
    said = "\0".join((outcome.metric, str(outcome.row), *named))
    return blake2b(outcome.request_id + said.encode(), digest_size=16).digest()
