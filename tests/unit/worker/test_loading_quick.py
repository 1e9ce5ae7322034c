"""Versions that a guest leaves to others: those that are slow, or that nobody knows to be quick, and those
that ended a process; and one that is taken away and deployed again while it comes. Real artifacts and models,
in a host of one process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from headrace.v1.control_pb2 import LoadedVersion
from headrace.v1.tensor_pb2 import Signature
from structlog.testing import capture_logs

from services.common.clock import SystemClock
from services.common.objects import ArtifactStore
from services.common.telemetry import setup_tracing
from services.worker import loading, model_host
from services.worker.artifacts import ArtifactCache
from services.worker.backends.onnx import OnnxBackend
from services.worker.backends.port import BackendOptions, LoadFailed
from services.worker.batch_queue import BatchPolicy
from services.worker.desired import Defaults, Deployments
from services.worker.load_mark import LoadMark
from services.worker.loading import LoadOptions, VersionLoader
from services.worker.model_host import HostOptions, ModelHost
from services.worker.prediction_log import PayloadPolicy
from services.worker.serving import Serving
from services.worker.warm_up import warm_up
from tests.fixtures.deployments import config, put_artifact, served
from tests.fixtures.loaded_model import MemoryLog
from tests.fixtures.onnx_models import mlp, two_inputs
from tests.fixtures.waiting import eventually

READY, FAILED = LoadedVersion.STATE_READY, LoadedVersion.STATE_FAILED
#: No run takes as long as the one, or as short as the other.
HOURS, NOTHING = 3600.0, 1e-12


class Rig:
    def __init__(self, directory: Path, host: ModelHost) -> None:
        self.directory = directory
        self.host = host
        self.changes = 0

    @property
    def mark(self) -> Path:
        return self.directory / "loading"

    def deploy(self, built: tuple[bytes, Signature] | None, revision: int = 1) -> str:
        """Deploy the model as the only version, or none; gives the artifact's digest."""
        if built is None:
            self.host.apply(b"net", config("net", revision).SerializeToString())
            return ""
        digest, _ = put_artifact(self.directory / "store", {"model.onnx": built[0]})
        made = config("net", revision, served("1", digest, built[1]))
        self.host.apply(b"net", made.SerializeToString())
        return digest

    def state(self) -> tuple[LoadedVersion.State, str]:
        (version,) = self.host.states()
        return version.state, version.error

    async def until(self, state: LoadedVersion.State) -> str:
        """The error that comes with it."""
        await eventually(lambda: self.state()[0] == state, on=self)
        return self.state()[1]


@asynccontextmanager
async def hosting(
    directory: Path, slowest_row: float, on_change: Callable[[], None] = lambda: None
) -> AsyncIterator[Rig]:
    store = ArtifactStore(f"file://{directory / 'store'}")
    artifacts = ArtifactCache(store, directory / "artifacts")
    await artifacts.clear_partial()
    clock = SystemClock()
    with ThreadPoolExecutor(1) as pool:
        serving = Serving(clock, MemoryLog(), setup_tracing("worker", None), pool, 1.0)
        options = LoadOptions("guest", BackendOptions(), slowest_row=slowest_row)
        defaults = Defaults(BatchPolicy(max_rows=8), PayloadPolicy(), 30.0)
        loader = VersionLoader(artifacts, serving, options, LoadMark(directory / "loading"))
        host = ModelHost(
            Deployments("default", defaults), loader, artifacts, on_change, clock, HostOptions(linger=0.0)
        )
        try:
            yield Rig(directory, host)
        finally:
            await host.close()
            await store.close()


@pytest.fixture
def closings(monkeypatch: pytest.MonkeyPatch) -> list[OnnxBackend]:
    """Backends that were closed."""
    closed: list[OnnxBackend] = []
    close = OnnxBackend.close

    def closing(backend: OnnxBackend) -> None:
        closed.append(backend)
        close(backend)

    monkeypatch.setattr(OnnxBackend, "close", closing)
    return closed


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Artifacts that were asked for; what fails is tried again at once."""
    asked: list[str] = []
    fetch = ArtifactCache.fetch

    async def fetching(cache: ArtifactCache, digest: str) -> Path:
        asked.append(digest)
        return await fetch(cache, digest)

    monkeypatch.setattr(ArtifactCache, "fetch", fetching)
    monkeypatch.setattr(model_host, "_BACKOFF_FIRST_S", 0.001)
    return asked


async def test_a_quick_version_is_served(tmp_path: Path, closings: list[OnnxBackend]) -> None:
    async with hosting(tmp_path, HOURS) as rig:
        rig.deploy(mlp())
        assert await rig.until(READY) == ""
        assert rig.host.find("net", "1") is not None
        assert closings == []
        assert not rig.mark.exists()


async def test_who_is_nobodys_guest_asks_not_how_quick_it_is(tmp_path: Path) -> None:
    async with hosting(tmp_path, 0.0) as rig:
        rig.deploy(two_inputs())
        await rig.until(READY)


async def test_a_slow_version_is_left_for_good(
    tmp_path: Path, closings: list[OnnxBackend], fetches: list[str]
) -> None:
    with capture_logs() as lines:
        async with hosting(tmp_path, NOTHING) as rig:
            first = rig.deploy(mlp(seed=1))
            error = await rig.until(FAILED)
            assert error.startswith("a row takes ")
            assert len(closings) == 1
            assert rig.host.find("net", "1") is None
            assert not rig.mark.exists()
            # What fails otherwise is tried again and again meanwhile; the same deployment changes nothing.
            rig.deploy(mlp(seed=1), revision=2)
            second, _ = put_artifact(tmp_path / "store", {"model.onnx": b"nonsense"})
            rig.host.apply(b"bad", config("bad", 1, served("1", second, mlp()[1])).SerializeToString())
            await eventually(lambda: fetches.count(second) >= 5, on=fetches)
            assert fetches.count(first) == 1
            assert len(closings) == 1
    told = [line for line in lines if line.get("model") == "net"]
    assert [(line["event"], line["log_level"], line["reason"]) for line in told] == [
        ("left_to_others", "info", error)
    ]


async def test_a_version_that_was_left_goes_with_its_deployment(tmp_path: Path) -> None:
    async with hosting(tmp_path, NOTHING) as rig:
        digest = rig.deploy(mlp())
        await rig.until(FAILED)
        kept = tmp_path / "artifacts" / digest.replace(":", "-")
        assert kept.exists()
        rig.deploy(None, revision=2)
        await eventually(lambda: not rig.host.states())
        await eventually(lambda: not kept.exists())


async def test_rows_of_several_shapes_are_not_known_to_be_quick(
    tmp_path: Path, closings: list[OnnxBackend]
) -> None:
    async with hosting(tmp_path, HOURS) as rig:
        rig.deploy(two_inputs())
        assert "rows of one shape" in await rig.until(FAILED)
        assert len(closings) == 1


async def test_what_runs_elsewhere_is_not_known_to_be_quick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnnxBackend, "device", "cuda:0")
    async with hosting(tmp_path, HOURS) as rig:
        rig.deploy(mlp())
        assert "runs on a processor" in await rig.until(FAILED)


async def test_what_ended_a_process_is_not_even_fetched(tmp_path: Path, fetches: list[str]) -> None:
    data, signature = mlp()
    digest, _ = put_artifact(tmp_path / "store", {"model.onnx": data})
    (tmp_path / "loading").write_text(digest)
    async with hosting(tmp_path, HOURS) as rig:
        rig.deploy((data, signature))
        assert await rig.until(FAILED) == "a process ended while it was loaded"
        assert fetches == []
    # Once: the process after it has ended for another reason.
    async with hosting(tmp_path, HOURS) as rig:
        rig.deploy((data, signature))
        await rig.until(READY)


@pytest.mark.parametrize("part", ["_open", "warm_up"])
@pytest.mark.parametrize("fails", [False, True])
async def test_the_mark_stands_while_native_code_sees_the_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, fails: bool
) -> None:
    of: Any = VersionLoader if part == "_open" else loading
    real, seen = getattr(of, part), []

    def watched(*given: Any) -> Any:
        seen.append((tmp_path / "loading").read_text())
        if fails:
            raise LoadFailed("no")
        return real(*given)

    monkeypatch.setattr(of, part, watched)
    async with hosting(tmp_path, HOURS) as rig:
        digest = rig.deploy(mlp())
        await rig.until(FAILED if fails else READY)
        assert seen == [digest]
        assert not rig.mark.exists()


async def test_the_mark_is_gone_when_loading_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, entered, gate = warm_up, asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def held(*given: Any) -> Any:
        loop.call_soon_threadsafe(entered.set)
        asyncio.run_coroutine_threadsafe(gate.wait(), loop).result()
        return real(*given)

    monkeypatch.setattr(loading, "warm_up", held)
    async with hosting(tmp_path, HOURS) as rig:
        rig.deploy(mlp())
        await entered.wait()
        assert rig.mark.exists()
        await rig.host.drain()
        await eventually(lambda: not rig.mark.exists())
        gate.set()


async def test_who_is_overtaken_by_its_own_next_deployment_takes_nothing_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closings: list[OnnxBackend]
) -> None:
    fetch, gate, asked = ArtifactCache.fetch, asyncio.Event(), 0

    async def first_held(cache: ArtifactCache, digest: str) -> Path:
        nonlocal asked
        asked += 1
        if asked == 1:
            await gate.wait()
        return await fetch(cache, digest)

    monkeypatch.setattr(ArtifactCache, "fetch", first_held)
    async with hosting(tmp_path, 0.0) as rig:
        rig.deploy(mlp())
        await eventually(lambda: asked == 1)
        rig.deploy(None, revision=2)
        rig.deploy(mlp(), revision=3)
        await eventually(lambda: rig.host.find("net", "1") is not None)
        serving = rig.host.find("net", "1")
        gate.set()
        await eventually(lambda: len(closings) == 1)  # the first one came, and went
        assert rig.state()[0] == READY
        assert rig.host.find("net", "1") is serving
