"""What earlier releases left in the schemas of analytics and drift is read by this one."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import asyncpg
import numpy as np

from services import analytics, drift
from services.analytics import repository as analytics_repository
from services.analytics.chunks import unpack
from services.common.db import engine, migrate, transaction
from services.drift import repository as drift_repository
from services.drift.detectors.sketches import QuantileSketch
from tests.fixtures.older_schemas import migrated_to
from tests.fixtures.prediction_log import prediction_batch


async def test_streams_in_text_become_binary(database_url: str, tmp_path: Path) -> None:
    package = drift.__path__[0]
    await migrated_to(database_url, "drift", tmp_path, "0002")
    values = np.random.default_rng(1).normal(size=300)
    old = json.dumps(
        {
            "rows": 300,
            "first_us": 5,
            "last_us": 9,
            "numeric": {"a": base64.b64encode(QuantileSketch.of(values, 2048).to_bytes()).decode()},
            "categorical": {"prediction": {"yes": 200, "no": 100}},
        }
    ).encode()
    connection = await asyncpg.connect(database_url)
    try:
        await connection.execute(
            "INSERT INTO drift.streams (model, version, reference, reference_source, learning, pane, panes, "
            "updated_at) VALUES ('cancer', '1', $1, 'upload', $1, $1, $2, now())",
            old,
            json.dumps([base64.b64encode(old).decode()] * 2),
        )
    finally:
        await connection.close()
    await migrate(database_url, "drift", Path(package) / "migrations")
    database = engine(database_url, "drift")
    try:
        async with transaction(database) as session:
            stream = drift_repository.to_stream(await drift_repository.find_stream(session, "cancer", "1"))
    finally:
        await database.dispose()
    assert stream.reference is not None
    settled = [pane.settled for pane in (stream.pane, *stream.panes)]
    for sample in (stream.reference, stream.learning, *settled):
        assert (sample.rows, sample.first_us, sample.last_us) == (300, 5, 9)
        assert sample.categorical["prediction"] == {"yes": 200, "no": 100}
        assert np.allclose(sample.numeric["a"].quantiles([0.5]), np.quantile(values, 0.5), atol=0.02)
    assert len(stream.panes) == 2


async def test_records_of_the_inbox_become_chunks(database_url: str, tmp_path: Path) -> None:
    package = analytics.__path__[0]
    await migrated_to(database_url, "analytics", tmp_path, "0003")
    batches = [prediction_batch([1, 2]), prediction_batch([3], version="2")]
    connection = await asyncpg.connect(database_url)
    try:
        for batch in batches:
            value = batch.SerializeToString()
            await connection.execute(
                "INSERT INTO analytics.inbox (batch_id, model, version, rows, received_at, request_ids, "
                "value) VALUES ($1, 'cancer', $2, $3, now(), $4, $5)",
                batch.batch_id,
                batch.version,
                len(batch.request_ids) // 16,
                batch.request_ids,
                value,
            )
    finally:
        await connection.close()
    await migrate(database_url, "analytics", Path(package) / "migrations")
    database = engine(database_url, "analytics")
    try:
        async with transaction(database) as session:
            chunks = await analytics_repository.inbox(session, "cancer")
            waiting = await analytics_repository.waiting(session)
    finally:
        await database.dispose()
    found = sorted(value for chunk in chunks for value in unpack(chunk))
    assert found == sorted(batch.SerializeToString() for batch in batches)
    assert sorted((item.version, item.records, item.rows) for item in waiting) == [("1", 1, 2), ("2", 1, 1)]
