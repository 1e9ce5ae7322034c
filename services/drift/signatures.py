"""Signatures of served versions, from the control topic: without them a tensor's columns have no names."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Set

from headrace.v1.control_pb2 import ServingConfig
from headrace.v1.tensor_pb2 import Signature

VersionKey = tuple[str, str]

_MAX_GIVEN_UP = 10_000


class Signatures:
    """Follows control.deployments.v1. A version that is no longer served stays known: records of it may
    still be on their way, after a restart too, which is why what is new here is kept in the database."""

    def __init__(self, on_served: Callable[[str, Set[str]], None] = lambda model, versions: None) -> None:
        """`on_served` is told a model and the versions of it that are served from now on."""
        self._on_served = on_served
        self._served: dict[str, frozenset[str]] = {}
        self._known: dict[VersionKey, Signature] = {}
        #: Learned from the topic and not stored yet.
        self.unsaved: dict[VersionKey, Signature] = {}
        self._given_up: set[VersionKey] = set()
        self._changed = asyncio.Event()

    def restore(self, stored: Iterable[tuple[str, str, bytes]]) -> None:
        """Take what an earlier process stored."""
        for model, version, signature in stored:
            self._known[model, version] = Signature.FromString(signature)

    def apply(self, model: bytes, value: bytes | None) -> None:
        """Take one record of the topic. A version's signature never changes."""
        if value is None:
            self._serve(model.decode(), frozenset())
            return
        config = ServingConfig.FromString(value)
        self._serve(config.model, frozenset(served.version for served in config.versions))
        for served in config.versions:
            key = (config.model, served.version)
            if key not in self._known:
                self._known[key] = self.unsaved[key] = served.signature
        self._changed.set()

    def find(self, model: str, version: str) -> Signature | None:
        """None for a version that was never served as far as is known here."""
        return self._known.get((model, version))

    def is_gone(self, model: str, version: str) -> bool:
        """Whether it is known to be served no more."""
        served = self._served.get(model)
        return served is not None and version not in served

    def served(self) -> set[VersionKey]:
        """Every version that is served as far as is known here."""
        return {(model, version) for model, versions in self._served.items() for version in versions}

    def _serve(self, model: str, versions: frozenset[str]) -> None:
        self._served[model] = versions
        self._on_served(model, versions)

    async def wait_for(self, model: str, version: str, until: float) -> Signature | None:
        """The signature, once it is known; None after `until` (event loop time).

        A prediction can overtake its deployment, since the two travel on different topics. A version that
        was waited for in vain is not waited for again: a backlog of it must not hold up everything else.
        """
        key = (model, version)
        try:
            async with asyncio.timeout_at(until):
                while (found := self._known.get(key)) is None:
                    if key in self._given_up:
                        return None
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            if len(self._given_up) >= _MAX_GIVEN_UP:
                self._given_up.clear()
            self._given_up.add(key)
            return None
        return found
