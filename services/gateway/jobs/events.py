"""Progress as server-sent events (WHATWG HTML, 9.2)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import orjson

from services.gateway.jobs.views import Job, job_json

#: Proxies cut connections that say nothing. That a reader has left shows with the second write behind it, and
#: its place is taken until then.
_HEARTBEAT_S = 5.0
_HEARTBEAT = b": still there\n\n"
_RETRY = b"retry: 2000\n\n"


async def as_events(
    changes: AsyncGenerator[Job, None], heartbeat_s: float = _HEARTBEAT_S
) -> AsyncGenerator[bytes, None]:
    """`progress` events with the job as data, the last one named `end` where the job has ended. A reader that
    comes back starts with the job as it is then, so Last-Event-ID needs no memory."""
    async with aclosing(changes):
        coming = asyncio.ensure_future(anext(changes, None))
        begin = _RETRY
        try:
            while True:
                done, _ = await asyncio.wait({coming}, timeout=heartbeat_s)
                job = coming.result() if done else None
                if done and job is None:
                    return
                yield begin + (_HEARTBEAT if job is None else event(job))
                begin = b""
                if done:
                    coming = asyncio.ensure_future(anext(changes, None))
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)


def event(job: Job) -> bytes:
    """One event; its id grows with every change."""
    kind = "end" if job.ended else "progress"
    data = orjson.dumps(job_json(job)).decode()
    return f"id: {job.revision}\nevent: {kind}\ndata: {data}\n\n".encode()
