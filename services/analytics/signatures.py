"""What the versions answer with: from the control topic, and kept in PostgreSQL for when it forgets them."""

from __future__ import annotations

import structlog
from google.protobuf.message import DecodeError
from headrace.v1.control_pb2 import ServingConfig
from headrace.v1.tensor_pb2 import Signature
from sqlalchemy.ext.asyncio import AsyncEngine

from services.analytics import repository
from services.common.db import transaction

log = structlog.get_logger(__name__)


class Signatures:
    """Follows control.deployments.v1. A version that is no longer served stays known, also after a restart:
    its records stay too."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, Signature]] = {}
        #: The models that are served now, as far as the topic has been read.
        self.served: set[str] = set()
        self._unsaved: dict[tuple[str, str], Signature] = {}

    def apply(self, key: bytes, value: bytes | None) -> None:
        """Take one record of the topic."""
        if value is None:
            self.served.discard(key.decode(errors="replace"))
            return
        try:
            config = ServingConfig.FromString(value)
        except DecodeError:
            log.exception("deployment_unreadable", size=len(value))
            return
        self.served.add(config.model)
        versions = self._known.setdefault(config.model, {})
        for served in config.versions:
            if versions.get(served.version) != served.signature:
                versions[served.version] = served.signature
                self._unsaved[config.model, served.version] = served.signature

    async def load(self, engine: AsyncEngine) -> None:
        """Take what was saved; what the topic has said meanwhile is newer."""
        async with transaction(engine) as session:
            rows = await repository.signatures(session)
        for row in rows:
            signature = Signature.FromString(row.signature)
            self._known.setdefault(row.model, {}).setdefault(row.version, signature)

    async def save(self, engine: AsyncEngine) -> None:
        """Keep what the topic has said since; where it fails, the next call does it."""
        unsaved = dict(self._unsaved)
        if not unsaved:
            return
        async with transaction(engine) as session:
            for (model, version), signature in unsaved.items():
                await repository.keep_signature(session, model, version, signature.SerializeToString())
        for place, signature in unsaved.items():
            if self._unsaved.get(place) is signature:
                del self._unsaved[place]

    def knows(self, model: str, version: str) -> bool:
        """Whether the version's signature has been seen. An answer for no version has none to wait for."""
        return not version or version in self._known.get(model, {})

    def prediction_output(self, model: str, version: str) -> str | None:
        """Name of the output that holds the answer; empty: the first one; None: not known."""
        signature = self._known.get(model, {}).get(version)
        return signature.prediction_output if signature is not None else None

    def classes(self, model: str) -> list[tuple[str, str, float]]:
        """Version, class name, and the number that this version's predictions use for it."""
        return [
            (version, name, float(number))
            for version, signature in self._known.get(model, {}).items()
            for number, name in enumerate(signature.classes)
        ]
