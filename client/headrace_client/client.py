"""The sync client."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from numpy.typing import ArrayLike

from headrace_client import operations
from headrace_client.batch_calls import Batches, DeadLetters, Files, PendingPredictions
from headrace_client.errors import Conflict, HeadraceError
from headrace_client.exchange import Exchange, error_of, pause_before_retry, transport_error, with_scheme
from headrace_client.experiment_calls import Experiments, Rollouts
from headrace_client.results import Embeddings, Inference, Json, NewKey, Outcome, Prediction
from headrace_client.uploads import Progress, Upload

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8000"
#: Between two pieces of an upload, or until its answer.
UPLOAD_TIMEOUT_S = 600.0


class Headrace:
    """A connection pool to one gateway. Thread-safe; close it, or use it as a context manager.

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
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._timeout = timeout
        self._retries = retries
        headers = {"authorization": f"Bearer {api_key.strip()}"} if api_key else {}
        self._http = httpx.Client(
            base_url=with_scheme(url), headers=headers, timeout=timeout, transport=transport
        )
        self.batches = Batches(self)
        self.experiments = Experiments(self)
        self.rollouts = Rollouts(self)
        self.files = Files(self)
        self.async_predictions = PendingPredictions(self)
        self.dead_letters = DeadLetters(self)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Inference.

    def predict(  # noqa: PLR0913 - what a prediction can be asked with
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
        return self.run(call, timeout)

    def embed(
        self, model: str, texts: Sequence[str], *, version: str | None = None, timeout: float | None = None
    ) -> Embeddings:
        """One vector per text."""
        return self.run(operations.embed(model, texts, version=version), timeout)

    def infer(
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
        return self.run(call, timeout)

    def outcomes(self, given: Iterable[Outcome], *, timeout: float | None = None) -> list[str]:
        """Report what became of predictions; returns an event id for each."""
        return self.run(operations.outcomes(given), timeout)

    # Models and their serving.

    def push_model(
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
            self.run(operations.create_model(name, description), None)
        except Conflict:
            is_new = False
        try:
            return self.run(operations.push_version(name, upload), timeout)
        except HeadraceError as error:
            if is_new and 400 <= error.status < 500:
                with contextlib.suppress(HeadraceError):  # the refusal says more
                    if not self.run(operations.versions(name), None)["versions"]:
                        self.delete_model(name)
            raise

    def models(self) -> Iterator[Json]:
        """All models, page by page."""
        after: str | None = ""
        while after is not None:
            page = self.run(operations.models(after), None)
            yield from page["models"]
            after = page["next"]

    def model(self, name: str) -> Json:
        """One model with its aliases."""
        return self.run(operations.model(name), None)

    def versions(self, model: str) -> list[Json]:
        """All versions of a model, oldest first, asked for page by page."""
        found: list[Json] = []
        after: str | None = ""
        while after is not None:
            page = self.run(operations.versions(model, after), None)
            found += page["versions"]
            after = page.get("next")
        return found

    def delete_model(self, name: str) -> None:
        """Delete a model that is not served, with all of its versions."""
        self.run(operations.delete_model(name), None)

    def delete_version(self, model: str, version: str) -> None:
        """Delete a version that nothing serves; its name stays taken."""
        self.run(operations.delete_version(model, version), None)

    def set_alias(self, model: str, alias: str, version: str) -> Json:
        """Let `alias` (champion, challenger, …) stand for `version`."""
        return self.run(operations.set_alias(model, alias, version), None)

    def deploy(
        self,
        model: str,
        weights: Mapping[str, float],
        *,
        variants: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Json:
        """Serve `model` by these versions, weights in percent. `options`: pool, batching, balancing, …"""
        return self.run(operations.deploy(model, weights, variants=variants, options=options), None)

    def deployment(self, model: str) -> Json:
        """How `model` is served."""
        return self.run(operations.deployment(model), None)

    def undeploy(self, model: str) -> None:
        """Serve it no longer."""
        self.run(operations.undeploy(model), None)

    # What is known about what was served.

    def compare(self, model: str, a: str, b: str, metric: str) -> Json:
        """Two versions by one metric, with tests and confidence intervals."""
        return self.run(operations.compare(model, a, b, metric), None)

    def alerts(self, model: str | None = None, state: str | None = None) -> list[Json]:
        """Drift alerts, newest first. `state`: open, acknowledged or resolved."""
        return self.run(operations.alerts(model, state), None)

    def create_key(
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
        return self.run(call, None)

    def keys(self) -> Iterator[Json]:
        """All API keys without their secrets, page by page."""
        after: str | None = ""
        while after is not None:
            page = self.run(operations.keys(after), None)
            yield from page["keys"]
            after = page["next"]

    def revoke_key(self, key_id: str) -> None:
        """Let the key open nothing any more."""
        self.run(operations.revoke_key(key_id), None)

    # For the calls of other modules.

    def run(self, call: Exchange[T], timeout: float | None) -> T:
        """Carry out `call` within `timeout` seconds, by default those of the client."""
        budget = self._timeout if timeout is None else timeout
        deadline = time.monotonic() + budget
        attempt = 0
        while True:
            attempt += 1
            failure: httpx.Response | httpx.TransportError
            try:
                failure = self._send(call, max(deadline - time.monotonic(), 0.001))
                if failure.is_success:
                    return call.read(failure)
            except httpx.TransportError as error:
                failure = error
            pause = pause_before_retry(failure, attempt, deadline - time.monotonic())
            if pause is None or attempt > self._retries:
                if isinstance(failure, httpx.Response):
                    raise error_of(failure)
                raise transport_error(failure, str(self._http.base_url)) from failure
            time.sleep(pause)

    @contextlib.contextmanager
    def stream(self, call: Exchange[Any], timeout: float) -> Iterator[httpx.Response]:
        """The answer of `call`, to be read piece by piece; `timeout` is the longest silence. Not retried."""
        try:
            with self._http.stream(
                call.method,
                call.path,
                params=dict(call.params) or None,
                headers=dict(call.headers),
                timeout=timeout,
            ) as answer:
                if not answer.is_success:
                    answer.read()
                    raise error_of(answer)
                yield answer
        except httpx.TransportError as error:
            raise transport_error(error, str(self._http.base_url)) from error

    def _send(self, call: Exchange[Any], timeout: float) -> httpx.Response:
        content = call.content() if callable(call.content) else call.content
        return self._http.request(
            call.method,
            call.path,
            params=dict(call.params) or None,
            headers=dict(call.headers),
            content=content,
            timeout=timeout,
        )
