"""Bodies that are too long are not read to their end."""

from __future__ import annotations

import pytest
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from services.common.bodies import BoundBodies
from services.registry.bodies import MAX_BODY_BYTES, is_upload

PIECE = 1 << 20


@pytest.mark.parametrize(("path", "bounded"), [("/v1/models", True), ("/v1/models/m/versions", False)])
async def test_a_body_without_end_is_refused_at_the_bound_unless_it_is_received_in_pieces(
    path: str, bounded: bool
) -> None:
    read, most = 0, 4 * MAX_BODY_BYTES

    async def receive() -> Message:
        nonlocal read
        read += PIECE
        return {"type": "http.request", "body": bytes(PIECE), "more_body": read < most}

    async def app(_scope: Scope, receive: Receive, _send: Send) -> None:
        while (await receive())["more_body"]:
            pass

    async def send(_message: Message) -> None:
        raise AssertionError("the application answers nothing here")

    scope = {"type": "http", "method": "POST", "path": path}
    if bounded:
        with pytest.raises(HTTPException) as refused:
            await BoundBodies(app, MAX_BODY_BYTES, is_upload)(scope, receive, send)
        assert refused.value.status_code == 413
        assert read == MAX_BODY_BYTES + PIECE
    else:
        await BoundBodies(app, MAX_BODY_BYTES, is_upload)(scope, receive, send)
        assert read == most
