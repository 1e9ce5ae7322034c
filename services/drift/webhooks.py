"""Posts alerts to webhooks: at least once, with backoff, for a day."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from types import TracebackType
from typing import Self

import httpx
import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from services.common.clock import Clock
from services.common.db import transaction
from services.common.errors import HeadraceError
from services.drift import repository
from services.drift.metrics import Metrics
from services.drift.tables import DeliveryRow, WebhookRow

log = structlog.get_logger(__name__)

_POST_S = 5.0
_POLL_S = 1.0
_AT_ONCE = 8
_MAX_ATTEMPTS = 24
_CLOSE_S = 6.0


class WebhookSender:
    """Sends what is due. Any answer of 2xx is a delivery; anything else is tried again after 1, 2, 4, … s, at
    most an hour apart, 24 times."""

    def __init__(self, engine: AsyncEngine, clock: Clock, metrics: Metrics) -> None:
        self._engine = engine
        self._clock = clock
        self._metrics = metrics
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._client: httpx.AsyncClient | None = None

    async def __aenter__(self) -> Self:
        # Redirects are not followed: an alert goes where an administrator said, nowhere else.
        self._client = httpx.AsyncClient(timeout=_POST_S, follow_redirects=False, trust_env=False)
        self._task = asyncio.create_task(self._run(), name="webhooks")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._task is not None:
            _done, late = await asyncio.wait({self._task}, timeout=_CLOSE_S)
            for task in late:
                task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()

    async def send_due(self) -> int:
        """Post what is due, several at once; gives how many were tried. Locks keep replicas apart."""
        async with transaction(self._engine) as session:
            now = self._clock.now()
            due = await repository.due_deliveries(session, now, _AT_ONCE)
            hooks = {hook.webhook_id: hook for hook in await repository.webhooks(session)} if due else {}
            await asyncio.gather(*(self._send(row, hooks[row.webhook_id]) for row in due))
            self._metrics.open_alerts.set(await repository.open_alert_count(session))
        return len(due)

    async def _send(self, row: DeliveryRow, hook: WebhookRow) -> None:
        assert self._client is not None  # noqa: S101 - entered before anything is sent
        row.attempts += 1
        try:
            # httpx's own timeouts are per read; a webhook that drips must not hold the others.
            async with asyncio.timeout(_POST_S):
                answer = await self._client.post(hook.url, json=row.body)
            row.error = None if answer.is_success else f"answered {answer.status_code}"
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, OSError) as error:
            row.error = type(error).__name__
        now = self._clock.now()
        if row.error is None:
            row.delivered_at = now
        elif row.attempts >= _MAX_ATTEMPTS:
            row.delivered_at, row.error = now, f"given up: {row.error}"
            log.error("webhook_given_up", url=hook.url, reason=row.error)
        else:
            row.next_at = now + timedelta(seconds=min(2 ** (row.attempts - 1), 3600))
        self._metrics.deliveries.labels("delivered" if row.error is None else "failed").inc()

    async def _run(self) -> None:
        while not self._stop.is_set():
            try:
                while await self.send_due() == _AT_ONCE:
                    pass
            except HeadraceError as error:
                log.warning("webhooks_wait", reason=error.message)
            try:
                async with asyncio.timeout(_POLL_S):
                    await self._stop.wait()
            except TimeoutError:
                continue
