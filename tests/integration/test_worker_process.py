"""The worker as a process: killed with its log unpublished, and stopped by SIGTERM."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from headrace.v1.control_pb2 import LoadedVersion, WorkerStatus
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest
from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import Code, DataType, Tensor

from deploy.embedded.server import Server
from deploy.embedded.tansu import TansuServer
from services.common.bus import KafkaBus, Record
from services.common.bus.admin import ensure_topics
from services.common.frames import FrameCalls, Limits
from services.common.ids import new_id
from services.common.topics import PREDICTIONS, WORKERS, all_topics
from tests.fixtures.deployments import config, put_artifact, record, served
from tests.fixtures.onnx_models import mlp
from tests.fixtures.waiting import PATIENCE_S, eventually, patience

REPOSITORY = Path(__file__).resolve().parents[2]
TOKEN = "a-token-for-tests-only"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Process:
    """`python -m services.worker` on a broker, with a state directory that outlives it."""

    def __init__(self, directory: Path, bootstrap: str) -> None:
        self.directory = directory
        self.frames_port = free_port()
        self._environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'proto'}",
            "KAFKA_BOOTSTRAP_SERVERS": bootstrap,
            "ARTIFACT_STORE_URL": f"file://{directory / 'store'}",
            "STATE_DIR": str(directory / "state"),
            "INTERNAL_TOKEN": TOKEN,
            "FRAMES_PORT": str(self.frames_port),
            "GRPC_PORT": "0",
            "OPS_PORT": "0",
            "DRAIN_S": "10",
        }
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        with (self.directory / "worker.log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "services.worker", env=self._environment, stdout=log, stderr=log
            )

    async def end(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        async with patience("the end of the worker"):
            return await self.process.wait()

    @property
    def log(self) -> str:
        return (self.directory / "worker.log").read_text()


@asynccontextmanager
async def worker_process(directory: Path, bootstrap: str) -> AsyncIterator[Process]:
    worker = Process(directory, bootstrap)
    await worker.start()
    try:
        yield worker
    finally:
        assert worker.process is not None
        if worker.process.returncode is None:
            await worker.end(signal.SIGKILL)


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[FrameCalls]:
    calls = FrameCalls(f"127.0.0.1:{port}", credential=TOKEN, role="router", instance="test", limits=Limits())
    calls.start()
    try:
        await calls.wait_connected(PATIENCE_S)
        yield calls
    finally:
        await calls.close()


async def predict(calls: FrameCalls) -> tuple[bytes, PredictReply]:
    """A prediction that waits until the version is loaded; its id and the answer."""
    identifier = new_id()
    x = Tensor(name="x", datatype=DataType.DATA_TYPE_FP32, shape=[1, 30], data=bytes(120))
    asked = PredictRequest(model="net", version="1", request_id=identifier, inputs=[x])
    return identifier, await calls.predict(asked, asyncio.get_running_loop().time() + 30)


async def until_loaded(calls: FrameCalls) -> bytes:
    async with patience("the version to be loaded"):
        while True:
            identifier, reply = await predict(calls)
            if reply.code == Code.CODE_OK:
                return identifier
            await asyncio.sleep(0.05)


async def deploy(directory: Path, bus: KafkaBus) -> None:
    data, signature = mlp()
    digest, _ = put_artifact(directory / "store", {"model.onnx": data})
    await bus.publish([record(config("net", 1, served("1", digest, signature)))])


async def restarted(server: Server) -> None:
    server.prepare()
    server.launch()
    await asyncio.to_thread(server.wait_ready, 60)
    await ensure_topics(server.url, all_topics())


async def test_a_killed_worker_publishes_its_log_when_it_is_back(
    tmp_path: Path, new_tansu: Callable[[], TansuServer]
) -> None:
    broker = new_tansu()
    await ensure_topics(broker.url, all_topics())
    answered: set[bytes] = set()
    async with KafkaBus(broker.url, "test") as bus, worker_process(tmp_path, broker.url) as worker:
        await deploy(tmp_path, bus)
        async with connected(worker.frames_port) as calls:
            await until_loaded(calls)
            broker.kill()
            # Serving goes on without a broker; nothing of this can be published.
            for identifier, reply in await asyncio.gather(*(predict(calls) for _ in range(200))):
                assert reply.code == Code.CODE_OK, reply
                answered.add(identifier)
            assert await worker.end(signal.SIGKILL) == -signal.SIGKILL
        await restarted(broker)
        await worker.start()
        published: set[bytes] = set()
        writers: set[int] = set()

        async def collect(records: Sequence[Record]) -> None:
            for one in records:
                batch = PredictionBatch.FromString(one.value or b"")
                writers.add(batch.writer)
                ids = batch.request_ids
                published.update(ids[i : i + 16] for i in range(0, len(ids), 16))

        async with bus.consume(PREDICTIONS, "test", collect):
            await eventually(lambda: answered <= published, PATIENCE_S)
        assert writers == {PredictionBatch.WRITER_WORKER}


async def test_sigterm_says_goodbye_and_exits_with_zero(
    tmp_path: Path, new_tansu: Callable[[], TansuServer]
) -> None:
    broker = new_tansu()
    await ensure_topics(broker.url, all_topics())
    states: list[WorkerStatus.State] = []
    ready: list[LoadedVersion.State] = []

    def on_status(_key: bytes, value: bytes | None) -> None:
        status = WorkerStatus.FromString(value or b"")
        states.append(status.state)
        ready.extend(version.state for version in status.versions)

    async with (
        KafkaBus(broker.url, "test") as bus,
        bus.table(WORKERS, on_status),
        worker_process(tmp_path, broker.url) as worker,
    ):
        await deploy(tmp_path, bus)
        async with connected(worker.frames_port) as calls:
            await until_loaded(calls)
            running = asyncio.create_task(worker.end(signal.SIGTERM))
            results = await asyncio.gather(*(predict(calls) for _ in range(50)))
            # Answered, or refused before anything ran: the router tries the next endpoint with those.
            assert {reply.code for _, reply in results} <= {Code.CODE_OK, Code.CODE_UNAVAILABLE}
            assert await running == 0, worker.log
        await eventually(lambda: states[-1:] == [WorkerStatus.STATE_GONE], PATIENCE_S)
    assert WorkerStatus.STATE_READY in states
    assert LoadedVersion.STATE_READY in ready
    assert "Traceback" not in worker.log


async def test_a_missing_setting_is_one_sentence(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.worker",
        env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'proto'}"},
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with patience("the end of the worker"):
        output, _ = await process.communicate()
    assert process.returncode == 2
    assert b"KAFKA_BOOTSTRAP_SERVERS" in output
    assert b"Traceback" not in output
