"""Posts alerts to webhooks: at least once, with backoff, for a day."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from services.common.clock import Clock
from services.common.db import transaction
from services.common.errors import HeadraceError
from services.drift import repository
from services.drift.metrics import Metrics
from services.drift.tables import DeliveryRow

log = structlog.get_logger(__name__)

_POST_S = 5.0
_POLL_S = 2.0
_LEASE = timedelta(seconds=30)
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
        """Post what is due, several at once; gives how many were tried.

        What is taken is put off for 30 s first, so that no transaction waits for a webhook and no other
        replica posts the same; a crash in between only delays it.
        """
        async with transaction(self._engine) as session:
            self._metrics.open_alerts.set(await repository.open_alert_count(session))
            due = await repository.due_deliveries(session, self._clock.now(), _AT_ONCE)
            urls = {hook.webhook_id: hook.url for hook in await repository.webhooks(session)} if due else {}
            for row in due:
                row.attempts += 1
                row.next_at = self._clock.now() + _LEASE
        errors = await asyncio.gather(*(self._post(urls[row.webhook_id], row.body) for row in due))
        if due:
            async with transaction(self._engine) as session:
                for row, error in zip(due, errors, strict=True):
                    # Gone where its webhook was removed meanwhile.
                    kept = await session.get(DeliveryRow, row.id)
                    if kept is not None:
                        self._settle(kept, urls[row.webhook_id], error)
        return len(due)

    async def _post(self, url: str, body: dict[str, Any]) -> str | None:
        """None where the webhook took it, else what went wrong."""
        assert self._client is not None  # noqa: S101 - entered before anything is sent
        try:
            # httpx's own timeouts are per read; a webhook that drips must not hold the others.
            async with asyncio.timeout(_POST_S), self._client.stream("POST", url, json=body) as answer:
                pass  # what it says beside its status is nobody's business, however long that is
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, OSError) as error:
            return type(error).__name__
        return None if answer.is_success else f"answered {answer.status_code}"

    def _settle(self, row: DeliveryRow, url: str, error: str | None) -> None:
        now = self._clock.now()
        row.error = error
        outcome = "delivered" if error is None else "failed"
        if error is None:
            row.delivered_at = now
        elif row.attempts >= _MAX_ATTEMPTS:
            row.delivered_at, row.error = now, f"given up: {error}"
            outcome = "given_up"
            # Of an address, the path is often the secret that lets one post there.
            log.error("webhook_given_up", host=urlsplit(url).hostname, reason=error)
        else:
            row.next_at = now + timedelta(seconds=min(2 ** (row.attempts - 1), 3600))
        self._metrics.deliveries.labels(outcome).inc()

    async def _run(self) -> None:
        while not self._stop.is_set():
            try:
                while await self.send_due() == _AT_ONCE:
                    pass
            except HeadraceError as error:
                log.warning("webhooks_wait", reason=error.message)
            except Exception:
                log.exception("webhooks_failed")
            try:
                async with asyncio.timeout(_POLL_S):
                    await self._stop.wait()
            except TimeoutError:
                continue
