"""What drift keeps of versions that nothing is heard of any more."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from headrace.v1.control_pb2 import ServedVersion, ServingConfig
from headrace.v1.events_pb2 import PredictionBatch
from prometheus_client import CollectorRegistry

from services.common.bus.port import Record
from services.common.clock import ManualClock
from services.common.db import engine, migrate
from services.common.topics import PREDICTIONS
from services.drift.alerting import Persistence
from services.drift.consumers import Limits, PredictionConsumer
from services.drift.evaluation import Thresholds
from services.drift.metrics import Metrics
from services.drift.signatures import Signatures
from services.drift.stream import Cadence
from tests.integration.test_drift_service import SIGNATURE, prediction


def of_version(version: str, rows: int) -> Record:
    batch = PredictionBatch.FromString(prediction(np.random.default_rng(1), rows).value or b"")
    batch.version = version
    return Record(PREDICTIONS.name, b"cancer", batch.SerializeToString())


async def test_a_stream_is_read_from_its_row_again_after_a_while(database_url: str) -> None:
    """Each takes megabytes, and versions come and go."""
    await migrate(database_url, "drift", Path("services/drift/migrations"))
    database, clock, signatures = engine(database_url, "drift"), ManualClock(), Signatures()
    served = [ServedVersion(version=version, signature=SIGNATURE) for version in ("1", "2")]
    signatures.apply(b"cancer", ServingConfig(model="cancer", versions=served).SerializeToString())
    nobody: Any = SimpleNamespace(wake=lambda: None, enabled=False)
    limits = Limits(Cadence(pane_rows=1000), Thresholds(), Persistence())
    consumer = PredictionConsumer(
        database, signatures, nobody, limits, clock, nobody, Metrics(CollectorRegistry())
    )

    def rows(version: str) -> int:
        return consumer._streams["cancer", version][1].learning.rows

    try:
        await consumer.on_predictions([of_version("1", 50)])
        clock.advance(9 * 60)
        await consumer.on_predictions([of_version("2", 10)])
        assert set(consumer._streams) == {("cancer", "1"), ("cancer", "2")}
        clock.advance(2 * 60)
        await consumer.on_predictions([of_version("2", 10)])
        assert set(consumer._streams) == {("cancer", "2")}
        await consumer.on_predictions([of_version("1", 7)])
        assert (rows("1"), rows("2")) == (57, 20)
    finally:
        await database.dispose()
