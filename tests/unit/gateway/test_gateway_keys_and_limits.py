"""Keys, their buckets, and the control topics behind them."""

from __future__ import annotations

import asyncio
import stat
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest
from headrace.v1.control_pb2 import ApiKey, ServingConfig
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from services.common.bus import MemoryBus, Record, followed
from services.common.bus.snapshot import load_snapshot, save_snapshot
from services.common.clock import ManualClock
from services.common.errors import NotFound, PermissionDenied, ResourceExhausted, Unauthenticated
from services.common.topics import DEPLOYMENTS, KEYS
from services.gateway.catalogue import Catalogue
from services.gateway.keys import _MOST_PLANS, Key, KeyRing, Scope
from services.gateway.leases import Leases
from services.gateway.limiter import Bucket
from tests.fixtures.gateway import ADMIN, PREDICT_ONLY, api_key, configs
from tests.fixtures.spending import spent_in
from tests.fixtures.waiting import PATIENCE_S, eventually


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def ring(clock: ManualClock) -> KeyRing:
    return KeyRing(clock)


def put(ring: KeyRing, key: ApiKey) -> None:
    ring.apply(key.key_id.encode(), key.SerializeToString())


def caller(ring: KeyRing, text: str = PREDICT_ONLY) -> Key:
    return ring.authenticate(b"Bearer " + text.encode(), None)


def test_a_key_opens_by_either_header(ring: KeyRing) -> None:
    put(ring, api_key(PREDICT_ONLY, ["predict"]))
    for _ in range(2):
        assert caller(ring).key_id == "predictpredi"
        assert ring.authenticate(b"bEARER  " + PREDICT_ONLY.encode(), None).key_id == "predictpredi"
        assert ring.authenticate(None, PREDICT_ONLY.encode()).key_id == "predictpredi"
    # What was remembered as X-API-Key must not pass as a bare Authorization header.
    with pytest.raises(Unauthenticated):
        ring.authenticate(PREDICT_ONLY.encode(), None)


def test_padded_headers_are_not_remembered(ring: KeyRing) -> None:
    put(ring, api_key(PREDICT_ONLY, ["predict"]))
    for padding in (b"", b" " * 10_000):
        assert ring.authenticate(b"Bearer " + padding + PREDICT_ONLY.encode(), None)
        assert ring.authenticate(None, PREDICT_ONLY.encode() + padding)
    assert [len(remembered) for remembered in (ring._by_authorization, ring._by_api_key)] == [1, 1]


def test_revocation_removal_and_expiry_shut_out_at_once(ring: KeyRing, clock: ManualClock) -> None:
    put(ring, api_key(PREDICT_ONLY, ["predict"]))
    caller(ring)
    put(ring, api_key(PREDICT_ONLY, ["predict"], revoked=True, revision=2))
    with pytest.raises(Unauthenticated):
        caller(ring)
    put(ring, api_key(PREDICT_ONLY, ["predict"], revision=3, expires_at_us=clock.unix_us() + 1_000_000))
    caller(ring)
    clock.advance(1)
    with pytest.raises(Unauthenticated, match="expired"):
        caller(ring)
    put(ring, api_key(ADMIN, ["admin"]))
    caller(ring, ADMIN)
    ring.apply(b"adminadminad", None)
    with pytest.raises(Unauthenticated):
        caller(ring, ADMIN)


def test_a_revoked_key_is_not_revived_by_an_older_record(ring: KeyRing) -> None:
    put(ring, api_key(PREDICT_ONLY, ["predict"], revision=5))
    put(ring, api_key(PREDICT_ONLY, ["predict"], revision=6, revoked=True))
    put(ring, api_key(PREDICT_ONLY, ["predict"], revision=5))
    with pytest.raises(Unauthenticated):
        caller(ring)


def test_scopes_and_models(ring: KeyRing) -> None:
    put(ring, api_key(PREDICT_ONLY, ["predict"], models=["digits"]))
    put(ring, api_key(ADMIN, ["admin"]))
    key = caller(ring)
    key.require(Scope.PREDICT)
    with pytest.raises(PermissionDenied):
        key.require(Scope.READ)
    key.require_model("digits")
    with pytest.raises(PermissionDenied):
        key.require_model("cancer")
    for scope in Scope:
        caller(ring, ADMIN).require(scope)


def test_plans_of_models_that_come_and_go_do_not_pile_up(ring: KeyRing) -> None:
    put(ring, api_key(PREDICT_ONLY, ["predict"]))
    key = caller(ring)
    for number in range(3 * _MOST_PLANS):
        key.keep_plan(f"m{number}", number)
        assert key.plans[f"m{number}"] == number
    assert len(key.plans) <= _MOST_PLANS
    kept = len(key.plans)
    key.keep_plan(f"m{number}", "another")
    assert len(key.plans) == kept


def test_a_new_limit_takes_effect_and_the_same_limit_keeps_its_count(ring: KeyRing) -> None:
    put(ring, api_key(PREDICT_ONLY, ["predict"], rate_per_second=1.0, burst=1))
    bucket = caller(ring).bucket
    put(ring, api_key(PREDICT_ONLY, ["predict"], rate_per_second=1.0, burst=1, revision=2))
    assert caller(ring).bucket is bucket
    put(ring, api_key(PREDICT_ONLY, ["predict"], rate_per_second=2.0, burst=1, revision=3))
    assert caller(ring).bucket is not bucket
    put(ring, api_key(PREDICT_ONLY, ["predict"], revision=4))
    assert caller(ring).bucket is None


def test_a_bucket_gives_its_burst_then_its_rate() -> None:
    bucket = Bucket("k", 10.0, 3)
    for _ in range(3):
        bucket.admit(100.0)
    with pytest.raises(ResourceExhausted) as raised:
        bucket.admit(100.0)
    assert raised.value.retry_after_ms == 100
    bucket.admit(100.11)
    assert bucket.report() == 4
    assert bucket.report() == 0


@given(rate=st.floats(0.5, 1000), burst=st.integers(0, 50), steps=st.lists(st.floats(0, 0.5), max_size=200))
def test_no_sequence_gets_more_than_burst_and_rate_allow(rate: float, burst: int, steps: list[float]) -> None:
    bucket, now, admitted = Bucket("k", rate, burst), 1000.0, 0
    began = now
    for step in steps:
        now += step
        with suppress(ResourceExhausted):
            bucket.admit(now)
            admitted += 1
    assert admitted <= bucket.burst + (now - began) * rate + 1e-6
    assert bucket.report() == admitted


def test_a_grant_counts_what_was_spent_meanwhile() -> None:
    bucket = Bucket("k", 100.0, 10)
    bucket.admit(1.0)
    assert bucket.report() == 1
    bucket.admit(1.0)  # after the report was sent
    bucket.granted(4.0, 2, 1.0)
    bucket.admit(1.0)
    with pytest.raises(ResourceExhausted):
        bucket.admit(1.0)
    bucket.admit(1.02)  # half of 100 a second: two sharers


def test_the_catalogue_follows_revisions() -> None:
    catalogue, cancer = Catalogue(), configs()[0]
    catalogue.apply(b"cancer", cancer.SerializeToString())
    model = catalogue.model("cancer")
    assert model.default.name == "1"
    assert model.version("challenger").name == "2"
    with pytest.raises(NotFound) as raised:
        model.version("9")
    assert raised.value.field == "version"
    older = ServingConfig(model="cancer", revision=2)
    catalogue.apply(b"cancer", older.SerializeToString())
    assert catalogue.model("cancer") is model
    with pytest.raises(ValueError, match="no version"):
        catalogue.apply(b"cancer", ServingConfig(model="cancer", revision=9).SerializeToString())
    assert catalogue.model("cancer") is model
    catalogue.apply(b"cancer", None)
    with pytest.raises(NotFound):
        catalogue.model("cancer")


@given(st.dictionaries(st.binary(max_size=20), st.binary(max_size=50)))
def test_a_snapshot_gives_back_what_was_saved(
    tmp_path_factory: pytest.TempPathFactory, records: dict[bytes, bytes]
) -> None:
    path = tmp_path_factory.mktemp("snapshot") / "a" / "t.table"
    save_snapshot(path, records)
    assert load_snapshot(path) == records
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    content = path.read_bytes()
    path.write_bytes(content[:-1] if records else content[:-2])
    assert load_snapshot(path) == {}


async def test_what_was_followed_is_served_without_the_bus(tmp_path: Path) -> None:
    bus = MemoryBus()
    key = api_key(PREDICT_ONLY, ["predict"])
    await bus.publish(
        [
            Record(KEYS.name, key.key_id.encode(), key.SerializeToString()),
            Record(KEYS.name, b"broken", b"\xff"),
            Record(KEYS.name, b"gone", key.SerializeToString()),
            Record(KEYS.name, b"gone", None),
        ]
    )
    ring = KeyRing(ManualClock())
    async with followed(bus, KEYS, ring.apply, tmp_path / "keys.table") as table:
        await table.ready(PATIENCE_S)
        caller(ring)
    later = KeyRing(ManualClock())
    async with followed(MemoryBus(), KEYS, later.apply, tmp_path / "keys.table"):
        assert caller(later).key_id == "predictpredi"
        assert len(later) == 1


async def test_a_snapshot_of_nonsense_is_ignored(tmp_path: Path) -> None:
    save_snapshot(tmp_path / "d.table", {b"cancer": b"\xff\xff"})
    catalogue = Catalogue()
    async with followed(MemoryBus(), DEPLOYMENTS, catalogue.apply, tmp_path / "d.table"):
        await asyncio.sleep(0)
    assert len(catalogue) == 0


async def test_what_the_topic_no_longer_holds_is_forgotten(tmp_path: Path) -> None:
    kept, gone, path = api_key(ADMIN, ["admin"]), api_key(PREDICT_ONLY, ["predict"]), tmp_path / "keys.table"
    save_snapshot(path, {key.key_id.encode(): key.SerializeToString() for key in (kept, gone)})
    ring, bus = KeyRing(ManualClock()), MemoryBus()
    await bus.publish([Record(KEYS.name, kept.key_id.encode(), kept.SerializeToString())])
    async with followed(bus, KEYS, ring.apply, path) as table:
        assert len(ring) == 2
        await table.ready(PATIENCE_S)
        async with asyncio.timeout(PATIENCE_S):
            while len(ring) == 2:  # noqa: ASYNC110 - the ring tells nobody
                await asyncio.sleep(0)
        assert caller(ring, ADMIN).key_id == kept.key_id
        with pytest.raises(Unauthenticated):
            caller(ring, PREDICT_ONLY)
    assert list(load_snapshot(path)) == [kept.key_id.encode()]


async def test_an_empty_topic_forgets_nothing(tmp_path: Path) -> None:
    key, path = api_key(PREDICT_ONLY, ["predict"]), tmp_path / "keys.table"
    save_snapshot(path, {key.key_id.encode(): key.SerializeToString()})
    ring = KeyRing(ManualClock())
    async with followed(MemoryBus(), KEYS, ring.apply, path) as table:
        await table.ready(PATIENCE_S)
        for _ in range(10):
            await asyncio.sleep(0)
        assert caller(ring).key_id == key.key_id
    assert list(load_snapshot(path)) == [key.key_id.encode()]


async def test_an_older_record_brings_no_revoked_key_back(tmp_path: Path) -> None:
    path, bus = tmp_path / "keys.table", MemoryBus()
    revoked = api_key(PREDICT_ONLY, ["predict"], revoked=True, revision=5)
    older = api_key(PREDICT_ONLY, ["predict"], revision=4)
    save_snapshot(path, {revoked.key_id.encode(): revoked.SerializeToString()})
    ring = KeyRing(ManualClock())
    async with followed(bus, KEYS, ring.apply, path) as table:
        await table.ready(PATIENCE_S)
        await bus.publish([Record(KEYS.name, older.key_id.encode(), older.SerializeToString())])
        for _ in range(10):
            await asyncio.sleep(0)
    saved = load_snapshot(path)[revoked.key_id.encode()]
    assert ApiKey.FromString(saved) == revoked
    later = KeyRing(ManualClock())
    async with followed(MemoryBus(), KEYS, later.apply, path):
        with pytest.raises(Unauthenticated):
            caller(later)


def test_the_catalogue_says_whether_a_record_was_newer() -> None:
    catalogue, cancer = Catalogue(), configs()[0]
    assert catalogue.apply(b"cancer", cancer.SerializeToString())
    cancer.revision -= 1
    assert not catalogue.apply(b"cancer", cancer.SerializeToString())


class _Pipeline:
    """Answers scripts as the server would: everything is left; keys in `broken` fail."""

    def __init__(self, broken: set[str]) -> None:
        self.settled: list[str] = []
        self.seen: list[str] = []
        self.broken = broken

    async def evalsha(self, _digest: str, keys: int, key: str, *args: Any) -> None:
        assert keys == 1
        assert args[2] > 0
        name = key.split("{")[1].rstrip("}")
        self.settled.append(name)
        self.seen.append(name)

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        assert not raise_on_error
        answers = [ResponseError("WRONGTYPE") if name in self.broken else (10.0, 1) for name in self.settled]
        self.settled = []
        return answers


class _Redis:
    def __init__(self, *broken: str) -> None:
        self.one = _Pipeline(set(broken))

    def pipeline(self, *, transaction: bool) -> _Pipeline:
        assert not transaction
        return self.one


def test_without_redis_the_processes_together_grant_a_keys_limit_once() -> None:
    parts = [Bucket("k", 40.0, 8) for _ in range(4)]
    for part in parts:
        part.alone(4)
        part.alone(4)  # it is said again with every attempt
    assert sum(spent_in(part, 10.0) for part in parts) == pytest.approx(8 + 40 * 10, abs=8)
    assert spent_in(parts[0], 0.01, began=2000.0) == 2  # its part of what was saved up
    small = Bucket("small", 1.0, 1)
    small.alone(64)
    small.admit(1000.0)


def test_what_redis_said_counts_more_than_a_guess() -> None:
    bucket = Bucket("k", 100.0, 10)
    bucket.alone(10)
    bucket.granted(10.0, 1, 1000.0)
    bucket.alone(10)
    assert spent_in(bucket, 1.0) == pytest.approx(110, abs=2)


async def test_limits_are_divided_where_redis_was_never_reached(
    clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.leases._RETRY_S", 0.0)

    class Nowhere(_Redis):
        def pipeline(self, *, transaction: bool) -> _Pipeline:
            raise RedisConnectionError("refused")

    leases, bucket = Leases(cast("Redis", Nowhere()), clock, "gateway", sharers=4), Bucket("k", 40.0, 8)
    bucket.admit(clock.monotonic())
    task = asyncio.create_task(leases.run(lambda: [bucket]))
    await eventually(lambda: bucket._shared)
    task.cancel()
    await asyncio.wait({task})
    assert not leases.available
    assert spent_in(bucket, 1.0, began=clock.monotonic() + 100) == pytest.approx(12, abs=2)


async def test_more_keys_than_a_trip_takes_are_settled_in_turn(clock: ManualClock) -> None:
    redis = _Redis()
    leases = Leases(cast("Redis", redis), clock, "gateway")
    buckets = [Bucket(str(index), 1e6, 10) for index in range(2500)]
    for _ in range(5):
        for bucket in buckets:
            bucket.admit(clock.monotonic())
        await leases.settle(buckets)
    counts = Counter(redis.one.seen)
    assert len(counts) == 2500
    assert set(counts.values()) == {2}


async def test_a_key_that_cannot_be_settled_keeps_no_other_from_it(clock: ManualClock) -> None:
    leases = Leases(cast("Redis", _Redis("bad")), clock, "gateway")
    bad, good = Bucket("bad", 1.0, 10), Bucket("good", 1.0, 10)
    for bucket in (bad, good):
        bucket.admit(clock.monotonic())
    with pytest.raises(ResponseError):
        await leases.settle([bad, good])
    assert (bad.spent, good.spent) == (1, 0)


async def test_nothing_ends_the_settling(clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.gateway.leases._RETRY_S", 0.0)
    leases, bucket, turns = Leases(cast("Redis", _Redis()), clock, "gateway"), Bucket("k", 1.0, 10), 0
    bucket.admit(clock.monotonic())

    def buckets() -> list[Bucket]:
        nonlocal turns
        turns += 1
        if turns < 3:
            raise ZeroDivisionError
        return [bucket]

    task = asyncio.create_task(leases.run(buckets))
    async with asyncio.timeout(PATIENCE_S):
        while bucket.spent and not task.done():  # noqa: ASYNC110 - settled in the background
            await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert (bucket.spent, leases.available) == (0, True)
