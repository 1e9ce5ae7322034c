"""Whether the registry can do its work now. The broker is not asked: what is committed reaches it later."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from services.common.db import check_database
from services.common.lifecycle import Health, watched
from services.registry.edge import Edge


def edge_watched(edge: Edge, health: Health) -> AbstractAsyncContextManager[None]:
    """Keep the parts `database` and `artifact_store` of `health` true while the block runs."""
    return watched(
        health,
        {"database": lambda: check_database(edge.engine), "artifact_store": edge.store.check},
    )
