"""Callbacks: told at least once that a job has ended, signed, for a day.

Signature, as a receiver checks it: `X-Headrace-Signature: t=<unix seconds>,v1=<hex>`, where hex is the
HMAC-SHA-256 of `<t>.<body>` with CALLBACK_SECRET. `X-Headrace-Delivery` is the same for every try of one
callback.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import random
from collections import Counter
from datetime import datetime, timedelta
from types import TracebackType
from typing import Self

import httpx
import structlog
from sqlalchemy import ColumnElement, delete, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncEngine

from services.common.clock import Clock
from services.common.db import transaction
from services.common.errors import HeadraceError
from services.gateway.jobs.addresses import CallbackRules
from services.gateway.jobs.metrics import JobMetrics
from services.gateway.jobs.pauses import Pauses
from services.gateway.jobs.tables import DeliveryRow

log = structlog.get_logger(__name__)

_POST_S = 10.0
_POLL_S = 2.0
_AT_ONCE = 32
#: So one receiver that hangs leaves room for the others.
_AT_ONCE_PER_HOST = 2
_LEASE = timedelta(seconds=60)
_GIVE_UP = timedelta(hours=24)
_FIRST_BACKOFF_S = 5.0
_MAX_BACKOFF_S = 3600.0
_CLOSE_S = 5.0
#: What clocks of several gateways may be apart, and a lease of what is being posted.
_LEEWAY_S = 120.0


def signature(secret: str, unix_s: int, body: bytes) -> str:
    """The value of X-Headrace-Signature."""
    signed = f"{unix_s}.".encode() + body
    return f"t={unix_s},v1={hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest()}"


def backoff_s(attempts: int) -> float:
    """Seconds to wait after so many tries, before jitter."""
    return min(_FIRST_BACKOFF_S * 2.0 ** min(attempts - 1, 16), _MAX_BACKOFF_S)


def _due(now: datetime) -> ColumnElement[bool]:
    """Whose time has come. One that would wait for far longer than it was put off was so before the clock was
    set back."""
    tries = func.least(DeliveryRow.attempts, 16)
    put_off_s = func.least(_FIRST_BACKOFF_S * func.power(2, tries), _MAX_BACKOFF_S * 1.2) + _LEEWAY_S
    return or_(
        DeliveryRow.due_at <= now,
        DeliveryRow.due_at > now + func.make_interval(0, 0, 0, 0, 0, 0, put_off_s),
    )


class CallbackSender:
    """Posts what is due. An answer of 2xx is a delivery; anything else, and 10 s without an end, is tried
    again after 5, 10, 20, … s, at most an hour apart, for a day."""

    def __init__(
        self, engine: AsyncEngine, rules: CallbackRules, secret: str, clock: Clock, metrics: JobMetrics
    ) -> None:
        self._engine = engine
        self._rules = rules
        self._secret = secret
        self._clock = clock
        self._metrics = metrics
        self._posting: dict[asyncio.Task[None], str] = {}
        self._wake = asyncio.Event()
        self._pauses = Pauses(clock, _POLL_S)
        self._task: asyncio.Task[None] | None = None
        self._client: httpx.AsyncClient | None = None

    async def __aenter__(self) -> Self:
        # No redirects, no proxies of the environment, no connections kept: every request is judged anew.
        limits = httpx.Limits(max_connections=2 * _AT_ONCE, max_keepalive_connections=0)
        self._client = httpx.AsyncClient(
            timeout=_POST_S, follow_redirects=False, trust_env=False, limits=limits
        )
        self._task = asyncio.create_task(self._run(), name="callbacks")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = {*self._posting, *([self._task] if self._task is not None else [])}
        if self._task is not None:
            self._task.cancel()
        if tasks:
            _done, late = await asyncio.wait(tasks, timeout=_CLOSE_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()

    def wake(self) -> None:
        """A job ended; do not wait for the next look."""
        self._pauses.worked()
        self._wake.set()

    async def start_due(self) -> int:
        """Begin to post what is due and for which there is room; how many were begun.

        What is taken is put off for a minute first, so no other gateway posts the same; a crash in between
        delays it.
        """
        room = _AT_ONCE - len(self._posting)
        if room <= 0:
            return 0
        busy = [host for host, count in Counter(self._posting.values()).items() if count >= _AT_ONCE_PER_HOST]
        now = self._clock.now()
        async with transaction(self._engine) as session:
            found = select(DeliveryRow).where(_due(now), DeliveryRow.host.not_in(busy))
            found = found.order_by(DeliveryRow.due_at).limit(room).with_for_update(skip_locked=True)
            taken: list[DeliveryRow] = []
            hosts = Counter(self._posting.values())
            for row in await session.scalars(found):
                if hosts[row.host] < _AT_ONCE_PER_HOST:
                    hosts[row.host] += 1
                    row.attempts += 1
                    row.due_at = now + _LEASE
                    taken.append(row)
        for row in taken:
            task = asyncio.create_task(self._deliver(row), name=f"callback:{row.delivery_id}")
            self._posting[task] = row.host
            task.add_done_callback(self._posted)
        return len(taken)

    async def _deliver(self, row: DeliveryRow) -> None:
        error = await self._post(row)
        now = self._clock.now()
        given_up = error is not None and now - row.created_at >= _GIVE_UP
        if error is not None:
            log.warning("callback_failed", job=row.job_id, host=row.host, reason=error, given_up=given_up)
        self._metrics.callbacks("delivered" if error is None else "given_up" if given_up else "failed")
        this = DeliveryRow.delivery_id == row.delivery_id
        try:
            async with transaction(self._engine) as session:
                if error is None or given_up:
                    await session.execute(delete(DeliveryRow).where(this))
                    return
                pause = timedelta(seconds=backoff_s(row.attempts) * random.uniform(0.8, 1.2))
                await session.execute(
                    update(DeliveryRow).where(this).values(due_at=now + pause, last_error=error)
                )
        except HeadraceError as lost:
            # Its lease ends, and it is posted once more.
            log.warning("callback_not_noted", job=row.job_id, reason=lost.message)

    async def _post(self, row: DeliveryRow) -> str | None:
        """None where the receiver took it, else what went wrong."""
        assert self._client is not None  # noqa: S101 - entered before anything is posted
        unix_s = self._clock.unix_us() // 1_000_000
        headers = {
            "content-type": "application/json",
            "user-agent": "headrace",
            "x-headrace-delivery": row.delivery_id,
            "x-headrace-signature": signature(self._secret, unix_s, row.body),
        }
        try:
            # The clients' own timeouts are per read; a receiver that drips must end as well.
            async with asyncio.timeout(_POST_S):
                target = self._rules.check(row.url)
                address = await self._rules.resolve(target)
                literal = f"[{address}]" if ":" in address else address
                request = self._client.build_request(
                    "POST",
                    f"{target.scheme}://{literal}:{target.port}{target.path}",
                    content=row.body,
                    headers=headers | {"host": target.authority},
                    extensions={"sni_hostname": target.host},
                )
                answer = await self._client.send(request, stream=True)
                await answer.aclose()  # what it says beside its status is nobody's business
        except HeadraceError as error:
            return error.message
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, OSError, ValueError) as error:
            return type(error).__name__
        return None if answer.is_success else f"answered {answer.status_code}"

    def _posted(self, task: asyncio.Task[None]) -> None:
        self._posting.pop(task, None)
        self.wake()
        if not task.cancelled() and task.exception() is not None:
            log.error("callback_crashed", exc_info=task.exception())

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                # Again while some were begun: hosts that have their share now leave the rest to others.
                while await self.start_due():
                    self._pauses.worked()
            except HeadraceError as error:
                log.warning("callbacks_wait", reason=error.message)
            except Exception:
                log.exception("callbacks_failed")
            try:
                async with asyncio.timeout(self._pauses.next_s()):
                    await self._wake.wait()
            except TimeoutError:
                continue
