"""Signatures of served versions, from the control topic: without them a tensor's columns have no names."""

from __future__ import annotations

import asyncio

from headrace.v1.control_pb2 import ServingConfig
from headrace.v1.tensor_pb2 import Signature


class Signatures:
    """Follows control.deployments.v1. A version that is no longer served stays known: records of it may
    still be on their way."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Signature] = {}
        self._changed = asyncio.Event()

    def apply(self, _key: bytes, value: bytes | None) -> None:
        """Take one record of the topic."""
        if value is None:
            return
        config = ServingConfig.FromString(value)
        for served in config.versions:
            self._known[config.model, served.version] = served.signature
        self._changed.set()

    def find(self, model: str, version: str) -> Signature | None:
        """None for a version that was never served as far as is known here."""
        return self._known.get((model, version))

    async def wait_for(self, model: str, version: str, within_s: float) -> Signature | None:
        """The signature, once it is known; None after `within_s`. A prediction can overtake its deployment,
        since the two travel on different topics."""
        try:
            async with asyncio.timeout(within_s):
                while (found := self.find(model, version)) is None:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return None
        return found
