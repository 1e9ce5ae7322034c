"""`/v1/dlq`: what consumers could not handle, and sending it back. For admins."""

from __future__ import annotations

from base64 import b64encode
from typing import Any, Protocol

import msgspec
import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from services.common.bus import Letter, Queue
from services.common.clock import Clock
from services.common.errors import InvalidArgument, PermissionDenied
from services.gateway.codecs.native import wrong_field
from services.gateway.codecs.tensors import PARSE_ERRORS, malformed
from services.gateway.keys import KeyRing, Scope
from services.gateway.reading import BodyBudget
from services.gateway.rest.door import authenticated, bounded_body

_SHOWN, _MOST_SHOWN = 20, 200
_REPLAYED, _MOST_REPLAYED = 1000, 10_000
_BODY_BYTES = 4096
#: They stay in the record, which is handled again with its key when it is sent back.
_SECRET = frozenset(("authorization", "proxy-authorization", "x-api-key"))
_VALUE_BYTES = 16 << 10


class DeadLetterOffice(Protocol):
    """What the routes need of `bus.DeadLetters`."""

    async def queues(self) -> list[Queue]: ...

    async def letters(self, topic: str, limit: int) -> list[Letter]: ...

    async def replay(self, topic: str, limit: int) -> int: ...


class ReplayBody(msgspec.Struct, forbid_unknown_fields=True):
    """How many to send back at most."""

    limit: int = _REPLAYED


_replay = msgspec.json.Decoder(ReplayBody)


def dead_letter_routes(
    office: DeadLetterOffice, keys: KeyRing, clock: Clock, bodies: BodyBudget
) -> APIRouter:
    """Routes for dead-letter queues."""
    router = APIRouter(tags=["dead letters"])

    def admitted(request: Request) -> None:
        caller = authenticated(request, keys, Scope.ADMIN, clock.monotonic())
        if not caller.sees_all:
            raise PermissionDenied(
                "This key is for some models only; dead letters are of all.", field="model"
            )

    @router.get("/v1/dlq", summary="Dead-letter queues, and how much waits in each")
    async def queues(request: Request) -> Response:
        admitted(request)
        found = await office.queues()
        return _json({"queues": [{"topic": queue.topic, "waiting": queue.waiting} for queue in found]})

    @router.get("/v1/dlq/{topic}", summary="Records that wait, oldest first")
    async def letters(request: Request, topic: str) -> Response:
        admitted(request)
        text = request.query_params.get("limit", str(_SHOWN))
        limit = int(text) if text.isascii() and text.isdigit() and len(text) < 9 else 0
        _check(limit, _MOST_SHOWN)
        return _json({"records": [letter_json(one) for one in await office.letters(topic, limit)]})

    @router.post("/v1/dlq/{topic}/replay", summary="Send records back to the topics they came from")
    async def replay(request: Request, topic: str) -> Response:
        admitted(request)
        raw = await bounded_body(request, _BODY_BYTES, bodies)
        try:
            wanted = _replay.decode(raw) if raw else ReplayBody()
        except msgspec.ValidationError as error:
            raise wrong_field(error) from None
        except PARSE_ERRORS as error:
            raise malformed(error) from None
        _check(wanted.limit, _MOST_REPLAYED)
        return _json({"replayed": await office.replay(topic, wanted.limit)})

    return router


def letter_json(letter: Letter) -> dict[str, Any]:
    """One record, without API keys. `value` is text where it is UTF-8 and `value_base64` otherwise, the first
    16 kB of it."""
    record = letter.record
    value = record.value or b""
    shown: dict[str, Any] = {
        "reason": letter.reason,
        "topic": letter.topic,
        "partition": letter.partition,
        "offset": letter.offset,
        "key": None if record.key is None else record.key.decode("utf-8", "backslashreplace"),
        "headers": {name: _header_text(name, content) for name, content in record.headers},
        "timestamp_ms": record.timestamp_ms,
        "value_bytes": len(value),
    }
    try:
        shown["value"] = value[:_VALUE_BYTES].decode()
    except UnicodeDecodeError:
        shown["value_base64"] = b64encode(value[:_VALUE_BYTES]).decode()
    return shown


def _header_text(name: str, content: bytes) -> str:
    return "***" if name.lower() in _SECRET else content.decode("utf-8", "backslashreplace")


def _check(limit: int, most: int) -> None:
    if not 1 <= limit <= most:
        raise InvalidArgument(f"limit must be 1 … {most}.", field="limit")


def _json(body: dict[str, Any]) -> Response:
    return Response(orjson.dumps(body), media_type="application/json")
