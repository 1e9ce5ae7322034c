"""The async client: the methods of `client.Headrace`, awaited."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from numpy.typing import ArrayLike

from headrace_client import operations
from headrace_client.async_batch_calls import (
    AsyncBatches,
    AsyncDeadLetters,
    AsyncFiles,
    AsyncPendingPredictions,
)
from headrace_client.async_experiment_calls import AsyncExperiments, AsyncRollouts
from headrace_client.client import DEFAULT_URL, UPLOAD_TIMEOUT_S
from headrace_client.errors import Conflict, HeadraceError
from headrace_client.exchange import Exchange, error_of, pause_before_retry, transport_error, with_scheme
from headrace_client.results import Embeddings, Inference, Json, NewKey, Outcome, Prediction
from headrace_client.uploads import Progress, Upload

T = TypeVar("T")


class AsyncHeadrace:
    """A connection pool to one gateway. Close it, or use it as an async context manager.

    `timeout` bounds a whole call in seconds, retries included; every method takes its own. `retries` bounds
    the further attempts of a call that was certainly not carried out (see `exchange.pause_before_retry`).
    Methods raise the errors of `headrace_client.errors`.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        timeout: float = 30.0,
        retries: int = 2,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._timeout = timeout
        self._retries = retries
        headers = {"authorization": f"Bearer {api_key.strip()}"} if api_key else {}
        self._http = httpx.AsyncClient(
            base_url=with_scheme(url), headers=headers, timeout=timeout, transport=transport
        )
        self.batches = AsyncBatches(self)
        self.experiments = AsyncExperiments(self)
        self.rollouts = AsyncRollouts(self)
        self.files = AsyncFiles(self)
        self.async_predictions = AsyncPendingPredictions(self)
        self.dead_letters = AsyncDeadLetters(self)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # Inference.

    async def predict(  # noqa: PLR0913 - what a prediction can be asked with
        self,
        model: str,
        inputs: Any,
        *,
        user_id: str | int | None = None,
        session_id: str | int | None = None,
        attributes: Mapping[str, Any] | None = None,
        version: str | None = None,
        outputs: Sequence[str] | None = None,
        single: bool = False,
        timeout: float | None = None,
    ) -> Prediction:
        """`inputs`: named columns, rows or a tensor, numpy or not; `user_id` keeps a user on one version.
        Experiments assign users or sessions, and may be about some `attributes` only."""
        call = operations.predict(
            model,
            inputs,
            user_id=user_id,
            session_id=session_id,
            attributes=attributes,
            version=version,
            outputs=outputs,
            single=single,
        )
        return await self.run(call, timeout)

    async def embed(
        self, model: str, texts: Sequence[str], *, version: str | None = None, timeout: float | None = None
    ) -> Embeddings:
        """One vector per text."""
        return await self.run(operations.embed(model, texts, version=version), timeout)

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, ArrayLike],
        *,
        version: str | None = None,
        outputs: Sequence[str] = (),
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> Inference:
        """The Open Inference Protocol with binary tensors: arrays in, arrays out."""
        call = operations.infer(model, inputs, version=version, outputs=outputs, request_id=request_id)
        return await self.run(call, timeout)

    async def outcomes(self, given: Iterable[Outcome], *, timeout: float | None = None) -> list[str]:
        """Report what became of predictions; returns an event id for each."""
        return await self.run(operations.outcomes(given), timeout)

    # Models and their serving.

    async def push_model(
        self,
        name: str,
        files: Sequence[Path] | Path,
        *,
        version: str | None = None,
        description: str = "",
        metadata: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        timeout: float = UPLOAD_TIMEOUT_S,
    ) -> Json:
        """Upload a new version, creating the model where it is new; returns the version. A model made for a
        version that is refused is removed again.

        `metadata` may hold backend, signature, metrics, lineage and tags. `progress(sent, total)`
        counts bytes.
        """
        paths = [files] if isinstance(files, Path) else files
        wanted = dict(metadata or {}) | ({"version": version} if version is not None else {})
        upload = Upload.of(wanted, paths, progress)
        is_new = True
        try:
            await self.run(operations.create_model(name, description), None)
        except Conflict:
            is_new = False
        try:
            return await self.run(operations.push_version(name, upload), timeout)
        except HeadraceError as error:
            if is_new and 400 <= error.status < 500:
                with contextlib.suppress(HeadraceError):  # the refusal says more
                    if not (await self.run(operations.versions(name), None))["versions"]:
                        await self.delete_model(name)
            raise

    async def models(self) -> AsyncIterator[Json]:
        """All models, page by page."""
        after: str | None = ""
        while after is not None:
            page = await self.run(operations.models(after), None)
            for found in page["models"]:
                yield found
            after = page["next"]

    async def model(self, name: str) -> Json:
        """One model with its aliases."""
        return await self.run(operations.model(name), None)

    async def versions(self, model: str) -> list[Json]:
        """All versions of a model, oldest first, asked for page by page."""
        found: list[Json] = []
        after: str | None = ""
        while after is not None:
            page = await self.run(operations.versions(model, after), None)
            found += page["versions"]
            after = page.get("next")
        return found

    async def delete_model(self, name: str) -> None:
        """Delete a model that is not served, with all of its versions."""
        await self.run(operations.delete_model(name), None)

    async def delete_version(self, model: str, version: str) -> None:
        """Delete a version that nothing serves; its name stays taken."""
        await self.run(operations.delete_version(model, version), None)

    async def set_alias(self, model: str, alias: str, version: str) -> Json:
        """Let `alias` (champion, challenger, …) stand for `version`."""
        return await self.run(operations.set_alias(model, alias, version), None)

    async def deploy(
        self,
        model: str,
        weights: Mapping[str, float],
        *,
        variants: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Json:
        """Serve `model` by these versions, weights in percent. `options`: pool, batching, balancing, …"""
        return await self.run(operations.deploy(model, weights, variants=variants, options=options), None)

    async def deployment(self, model: str) -> Json:
        """How `model` is served."""
        return await self.run(operations.deployment(model), None)

    async def undeploy(self, model: str) -> None:
        """Serve it no longer."""
        await self.run(operations.undeploy(model), None)

    # What is known about what was served.

    async def compare(self, model: str, a: str, b: str, metric: str) -> Json:
        """Two versions by one metric, with tests and confidence intervals."""
        return await self.run(operations.compare(model, a, b, metric), None)

    async def alerts(self, model: str | None = None, state: str | None = None) -> list[Json]:
        """Drift alerts, newest first. `state`: open, acknowledged or resolved."""
        return await self.run(operations.alerts(model, state), None)

    async def create_key(
        self,
        name: str,
        scopes: Sequence[str] = ("predict",),
        *,
        rate_per_second: float = 0.0,
        burst: int = 0,
        models: Sequence[str] = (),
        expires_at: datetime | None = None,
    ) -> NewKey:
        """A new API key (scopes predict, read, admin); no limit where 0, all models where none is named, no
        end without `expires_at`, which has a time zone."""
        call = operations.create_key(
            name,
            scopes,
            rate_per_second=rate_per_second,
            burst=burst,
            models=models,
            expires_at=expires_at,
        )
        return await self.run(call, None)

    async def keys(self) -> AsyncIterator[Json]:
        """All API keys without their secrets, page by page."""
        after: str | None = ""
        while after is not None:
            page = await self.run(operations.keys(after), None)
            for key in page["keys"]:
                yield key
            after = page["next"]

    async def revoke_key(self, key_id: str) -> None:
        """Let the key open nothing any more."""
        await self.run(operations.revoke_key(key_id), None)

    # For the calls of other modules.

    async def run(self, call: Exchange[T], timeout: float | None) -> T:
        """Carry out `call` within `timeout` seconds, by default those of the client."""
        budget = self._timeout if timeout is None else timeout
        deadline = time.monotonic() + budget
        attempt = 0
        while True:
            attempt += 1
            failure: httpx.Response | httpx.TransportError
            try:
                failure = await self._send(call, max(deadline - time.monotonic(), 0.001))
                if failure.is_success:
                    return call.read(failure)
            except httpx.TransportError as error:
                failure = error
            pause = pause_before_retry(failure, attempt, deadline - time.monotonic())
            if pause is None or attempt > self._retries:
                if isinstance(failure, httpx.Response):
                    raise error_of(failure)
                raise transport_error(failure, str(self._http.base_url)) from failure
            await asyncio.sleep(pause)

    @contextlib.asynccontextmanager
    async def stream(self, call: Exchange[Any], timeout: float) -> AsyncIterator[httpx.Response]:
        """The answer of `call`, to be read piece by piece; `timeout` is the longest silence. Not retried."""
        try:
            async with self._http.stream(
                call.method,
                call.path,
                params=dict(call.params) or None,
                headers=dict(call.headers),
                timeout=timeout,
            ) as answer:
                if not answer.is_success:
                    await answer.aread()
                    raise error_of(answer)
                yield answer
        except httpx.TransportError as error:
            raise transport_error(error, str(self._http.base_url)) from error

    async def _send(self, call: Exchange[Any], timeout: float) -> httpx.Response:
        content = _off_the_loop(call.content) if callable(call.content) else call.content
        return await self._http.request(
            call.method,
            call.path,
            params=dict(call.params) or None,
            headers=dict(call.headers),
            content=content,
            timeout=timeout,
        )


async def _off_the_loop(chunks: Callable[[], Iterator[bytes]]) -> AsyncIterator[bytes]:
    """The chunks, each read in a thread."""
    iterator = chunks()
    while (chunk := await asyncio.to_thread(next, iterator, None)) is not None:
        yield chunk
