"""The drift service on a real PostgreSQL and a real broker: records in, alerts out, each counted once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
from headrace.v1.control_pb2 import ServedVersion, ServingConfig
from headrace.v1.events_pb2 import DriftAlert, PredictionBatch
from headrace.v1.tensor_pb2 import Code, DataType, Signature, Task, Tensor, TensorSpec

from deploy.embedded.tansu import TansuServer
from services.common.bus.admin import ensure_topics
from services.common.bus.kafka import KafkaBus
from services.common.bus.port import Record
from services.common.clock import SystemClock
from services.common.ids import new_id
from services.common.topics import ALERTS, DEPLOYMENTS, PREDICTIONS, all_topics, dead_letters
from services.drift.app import drift_app
from services.drift.schemas import MAX_BODY_BYTES
from services.drift.settings import Settings
from tests.fixtures.asking import until
from tests.fixtures.waiting import PATIENCE_S, eventually, eventually_of

TOKEN = "a-token-for-tests-only"
HEADERS = {"authorization": f"Bearer {TOKEN}"}
SIGNATURE = Signature(
    inputs=[TensorSpec(name="x", datatype=DataType.DATA_TYPE_FP32, shape=[-1, 2], columns=["age", "dose"])],
    outputs=[TensorSpec(name="label", datatype=DataType.DATA_TYPE_INT64, shape=[-1])],
    batched=True,
    task=Task.TASK_CLASSIFICATION,
    prediction_output="label",
)


def config() -> Record:
    value = ServingConfig(
        model="cancer", revision=1, versions=[ServedVersion(version="1", signature=SIGNATURE, weight=10_000)]
    )
    return Record(DEPLOYMENTS.name, b"cancer", value.SerializeToString())


def prediction(rng: np.random.Generator, rows: int, shift: float = 0.0) -> Record:
    x = rng.normal([shift, 0.0], 1.0, size=(rows, 2)).astype("<f4")
    label = rng.integers(0, 2, rows).astype("<i8")
    batch = PredictionBatch(
        batch_id=new_id(),
        model="cancer",
        version="1",
        answered_at_us=SystemClock().unix_us(),
        codes=[Code.CODE_OK] * rows,
        rows=[1] * rows,
        inputs=[Tensor(name="x", datatype=DataType.DATA_TYPE_FP32, shape=x.shape, data=x.tobytes())],
        outputs=[Tensor(name="label", datatype=DataType.DATA_TYPE_INT64, shape=[rows], data=label.tobytes())],
    )
    return Record(PREDICTIONS.name, b"cancer/1", batch.SerializeToString())


@asynccontextmanager
async def running(database_url: str, bootstrap: str) -> AsyncIterator[httpx.AsyncClient]:
    cfg = Settings(
        kafka_bootstrap_servers=bootstrap,
        kafka_session_timeout_s=2.0,
        internal_token=TOKEN,
        database_url=database_url,
        http_port=0,
        drift_reference_rows=200,
        drift_pane_rows=100,
        drift_window_panes=1,
        drift_pane_s=0,
        drift_alert_after=2,
        drift_resolve_after=2,
    )
    async with drift_app(cfg, SystemClock()) as service:
        base = f"http://127.0.0.1:{service.port}"
        async with httpx.AsyncClient(base_url=base, headers=HEADERS, timeout=PATIENCE_S) as client:
            yield client


def seen_rows(body: dict[str, Any]) -> int:
    return int(body["versions"][0]["reference"]["rows"])


async def test_a_shift_becomes_an_alert_on_the_topic_at_the_webhook_and_in_the_list(
    database_url: str, new_tansu: Callable[[], TansuServer]
) -> None:
    broker = new_tansu()
    await ensure_topics(broker.url, all_topics())
    rng = np.random.default_rng(11)
    posted: list[dict[str, Any]] = []

    async def hook(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        posted.append(json.loads(await reader.readexactly(length)))
        # The first answer is a failure: the alert must come again.
        status = b"500 no" if len(posted) == 1 else b"204 ok"
        writer.write(b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(hook, "127.0.0.1", 0)
    address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/alerts"
    async with (
        KafkaBus(broker.url, "test", session_timeout=2.0) as bus,
        running(database_url, broker.url) as client,
    ):
        heard: list[DriftAlert] = []

        async def on_alerts(records: Sequence[Record]) -> None:
            heard.extend(DriftAlert.FromString(record.value or b"") for record in records)

        async with bus.consume(ALERTS, "registry", on_alerts):
            assert (await client.post("/v1/drift/webhooks", json={"url": address})).status_code == 201
            await bus.publish([config()])
            await bus.publish([prediction(rng, 50) for _ in range(4)])
            await until(client, "/v1/drift/models/cancer", lambda b: b["versions"][0]["reference"]["ready"])
            quiet = [prediction(rng, 100) for _ in range(2)]
            await bus.publish(quiet + quiet)  # redelivered: counted once
            path = "/v1/drift/models/cancer/versions/1/windows"
            calm = await until(client, path, lambda b: len(b["windows"]) >= 2)
            assert [w["severity"] for w in calm["windows"]] == ["none", "none"]
            assert (await client.get("/v1/drift/alerts")).json() == {"alerts": []}

            await bus.publish([prediction(rng, 100, shift=2.0) for _ in range(2)])
            listed = await until(client, "/v1/drift/alerts?model=cancer&state=open", lambda b: b["alerts"])
            psi = next(alert for alert in listed["alerts"] if alert["detector"] == "psi")
            assert psi["feature"] == "age"
            assert psi["severity"] == "critical"
            assert psi["value"] > psi["critical_value"] > 0
            assert {alert["feature"] for alert in listed["alerts"]} == {"age"}
            await eventually(lambda: len(posted) >= 3 and len(heard) >= 2)
            assert psi["alert_id"] in {body["alert_id"] for body in posted}
            assert {alert.feature for alert in heard} == {"age"}
            windows = (await client.get(path)).json()["windows"]
            assert len(windows) == 4  # the redelivered records made no window of their own
            # So few that every row was looked at, which each of the three says.
            assert all(window["sampled_rows"] == window["rows"] > 0 for window in windows)
            assert psi["window"]["sampled_rows"] == psi["window"]["rows"] > 0
            assert all(alert.window_sampled_rows == alert.window_rows > 0 for alert in heard)

            await bus.publish([prediction(rng, 100) for _ in range(2)])
            await until(client, "/v1/drift/alerts?state=resolved", lambda b: len(b["alerts"]) == 2)
            await eventually(lambda: sum(alert.resolved_at_us > 0 for alert in heard) >= 2)
            # Opened and resolved are told under the same id, in this order.
            ended = {alert.alert_id for alert in heard if alert.resolved_at_us}
            assert ended == {alert.alert_id for alert in heard if not alert.resolved_at_us}

            async def told() -> str:
                return (await client.get("/metrics")).text

            shown = 'headrace_drift_psi{model="cancer",version="1"}'
            assert shown in await told()
            await bus.publish([Record(DEPLOYMENTS.name, b"cancer", None)])
            await eventually_of(told, lambda text: shown not in text)
            await bus.publish([prediction(rng, 100)])  # it was on its way
            await until(client, path, lambda b: len(b["windows"]) == 7)
            assert shown not in await told()
    server.close()


async def test_an_uploaded_reference_replaces_the_learned_one(
    database_url: str, new_tansu: Callable[[], TansuServer]
) -> None:
    broker = new_tansu()
    await ensure_topics(broker.url, all_topics())
    rng = np.random.default_rng(12)
    async with (
        KafkaBus(broker.url, "test", session_timeout=2.0) as bus,
        running(database_url, broker.url) as client,
    ):
        path = "/v1/drift/models/cancer/versions/1/reference"
        features = {"age": rng.normal(size=300).tolist(), "prediction": ["0", "1"] * 150}
        assert (await client.put(path, json={"features": features})).json()["rows"] == 300
        await bus.publish([config(), prediction(rng, 100)])
        shown = await until(
            client, "/v1/drift/models/cancer/versions/1/windows", lambda b: len(b["windows"]) == 1
        )
        assert {f["feature"] for f in shown["windows"][0]["features"]} == {"age", "prediction"}
        assert (await client.get(path)).json()["source"] == "upload"
        assert (await client.delete(path)).status_code == 204
        assert (await client.get(path)).status_code == 409


async def test_bad_input_names_the_field(database_url: str, kafka_bootstrap: str) -> None:
    await ensure_topics(kafka_bootstrap, all_topics())
    async with running(database_url, kafka_bootstrap) as client:
        path = "/v1/drift/models/cancer/versions/1/reference"
        uneven = await client.put(path, json={"features": {"a": [1, 2], "b": [1, 2, 3]}})
        assert uneven.status_code == 422
        assert "differ in length" in uneven.json()["detail"]
        url = await client.post("/v1/drift/webhooks", json={"url": "file:///etc/passwd"})
        assert (url.status_code, url.json()["field"]) == (422, "url")
        inner = await client.post("/v1/drift/webhooks", json={"url": "http://169.254.169.254/latest"})
        assert (inner.status_code, inner.json()["field"]) == (422, "url")
        assert (await client.get("/v1/drift/models/none")).status_code == 404
        assert (await client.get("/v1/drift/alerts?limit=0")).status_code == 422
        for odd, field in (
            ("models/%00", "model"),
            ("models/a/versions/%00/windows", "version"),
            ("models/a/versions/%00/reference", "version"),
            ("alerts?model=%00", "model"),
        ):
            refused = await client.get(f"/v1/drift/{odd}")
            assert (refused.status_code, refused.json()["field"]) == (422, field), odd
        hook = await client.post("/v1/drift/webhooks", json={"url": "http://a/", "model": "\0"})
        assert (hook.status_code, hook.json()["field"]) == (422, "model")
        for features in (b'{"\\ud800": [1, 2]}', b'{"a": ["\\ud800", "b"]}', b'{"\\u0000": [1, 2]}'):
            body = b'{"features": %b}' % features
            unwritten = await client.put(path, content=body, headers={"content-type": "application/json"})
            assert unwritten.status_code == 422, features
        mistaken = await client.put(path, content=bytes(MAX_BODY_BYTES + 1))
        assert (mistaken.status_code, mistaken.json()["code"]) == (413, "INVALID_ARGUMENT")
        stranger = await client.get("/v1/drift/alerts", headers={"authorization": "Bearer wrong"})
        assert stranger.status_code == 401
        assert (await client.get("/metrics", headers={"authorization": ""})).status_code == 200


async def test_who_may_only_read_is_not_shown_the_secrets_of_webhooks(
    database_url: str, kafka_bootstrap: str
) -> None:
    await ensure_topics(kafka_bootstrap, all_topics())
    addresses = [
        "https://hooks.example.com/services/T0/secret",
        "https://hooks.example.com/services/T0/other",
        "http://me:secret@[::1]:8080/?token=secret",
    ]
    async with running(database_url, kafka_bootstrap) as client:

        async def listed(scopes: str | None) -> list[dict[str, Any]]:
            headers = {} if scopes is None else {"x-headrace-scopes": scopes}
            answer = await client.get("/v1/drift/webhooks", headers=headers)
            found = {hook["webhook_id"]: hook for hook in answer.json()["webhooks"]}
            return [found[hook["webhook_id"]] for hook in added]

        added = [
            (await client.post("/v1/drift/webhooks", json={"url": address})).json() for address in addresses
        ]
        assert [hook["url"] for hook in added] == addresses
        assert await listed("admin,predict,read") == added
        for scopes in ("predict,read", None):
            found = await listed(scopes)
            assert [hook["url"] for hook in found] == [
                "https://hooks.example.com",
                "https://hooks.example.com",
                "http://[::1]:8080",
            ]
            assert [hook["url_digest"] for hook in found] == [hook["url_digest"] for hook in added]
            assert len({hook["url_digest"] for hook in found}) == 3
            assert "secret" not in str(found)


async def test_a_version_that_is_no_longer_served_is_still_read_and_an_unknown_one_holds_nothing_up(
    database_url: str, new_tansu: Callable[[], TansuServer]
) -> None:
    broker = new_tansu()
    await ensure_topics(broker.url, all_topics())
    rng = np.random.default_rng(14)
    async with KafkaBus(broker.url, "test", session_timeout=2.0) as bus:
        async with running(database_url, broker.url) as client:
            await bus.publish([config()])
            await bus.publish([prediction(rng, 60)])
            await until(client, "/v1/drift/models/cancer", lambda b: seen_rows(b) == 60)
        await bus.publish([Record(DEPLOYMENTS.name, b"cancer", None)])
        strangers = [Record(PREDICTIONS.name, b"cancer/1", renamed(prediction(rng, 1))) for _ in range(20)]
        await bus.publish([*strangers, prediction(rng, 40)])
        async with running(database_url, broker.url) as client:
            # Twenty records of a version nobody knows cost one wait together, not one each.
            await until(client, "/v1/drift/models/cancer", lambda b: seen_rows(b) == 100)


def renamed(record: Record) -> bytes:
    batch = PredictionBatch.FromString(record.value or b"")
    batch.version = "77"
    return batch.SerializeToString()


async def test_a_record_that_cannot_be_read_goes_to_the_dead_letters(
    database_url: str, new_tansu: Callable[[], TansuServer]
) -> None:
    broker = new_tansu()
    await ensure_topics(broker.url, all_topics())
    rng = np.random.default_rng(13)
    async with (
        KafkaBus(broker.url, "test", session_timeout=2.0) as bus,
        running(database_url, broker.url) as client,
    ):
        buried: list[Record] = []

        async def on_dead(records: Sequence[Record]) -> None:
            buried.extend(records)

        async with bus.consume(dead_letters(PREDICTIONS, "drift"), "test", on_dead):
            await bus.publish([config()])
            named = PredictionBatch.FromString(prediction(rng, 1).value or b"")
            named.model = "can\0cer"
            bad = [b"\xff\xff", named.SerializeToString()]
            records = [Record(PREDICTIONS.name, b"cancer/1", value) for value in bad]
            await bus.publish([*records, prediction(rng, 60)])
            body = await until(client, "/v1/drift/models/cancer", lambda b: seen_rows(b) == 60)
            assert body["model"] == "cancer"
            await eventually(lambda: len(buried) >= 2)
    assert list(dict.fromkeys(record.value for record in buried)) == bad  # one may be buried again
