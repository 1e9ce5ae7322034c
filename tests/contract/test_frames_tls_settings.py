"""FRAMES_TLS_*: one certificate and one authority make gateway → router → worker mutual TLS."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from headrace.v1.control_pb2 import LoadedVersion
from headrace.v1.tensor_pb2 import Code
from pydantic import ValidationError

from services.common.bus import MemoryBus
from services.common.errors import Fatal, Unavailable
from services.common.frames import FrameCalls, FrameServer, client_tls_of, server_tls_of
from services.common.settings import FrameTlsSettings
from tests.fixtures.certificates import certify
from tests.fixtures.router import (
    QUICK,
    TOKEN,
    FakeWorker,
    beat,
    config,
    deploy,
    request,
    routing,
    status,
)
from tests.fixtures.waiting import PATIENCE_S, eventually

LOADED = dict.fromkeys((("cancer", "1"), ("cancer", "2")), LoadedVersion.STATE_READY)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> FrameTlsSettings:
    certificate, key = certify(tmp_path_factory.mktemp("tls"))
    return FrameTlsSettings(frames_tls_cert=certificate, frames_tls_key=key, frames_tls_ca=certificate)


def calls_to(port: int, tls: FrameTlsSettings) -> FrameCalls:
    return FrameCalls(
        f"127.0.0.1:{port}",
        credential=TOKEN,
        role="gateway",
        instance="g",
        limits=QUICK,
        ssl=client_tls_of(tls),
    )


async def test_a_request_goes_through_both_hops(tmp_path: Path, tls: FrameTlsSettings) -> None:
    bus = MemoryBus()
    await deploy(bus, config())
    worker = FakeWorker("w1")
    worker.server = FrameServer(
        worker._connected,
        credential=TOKEN,
        instance="w1",
        role="worker",
        limits=QUICK,
        ssl=server_tls_of(tls),
    )
    await worker.start()
    await beat(bus, status("w1", worker.address, LOADED))
    async with routing(tmp_path, bus, **tls.model_dump()) as router:
        calls, plain = calls_to(router.frames_port, tls), calls_to(router.frames_port, FrameTlsSettings())
        try:
            calls.start()
            await calls.wait_connected(PATIENCE_S)
            await eventually(lambda: any(e.reachable for e in router.dispatcher.endpoints.all()))
            reply = await calls.predict(request(7), asyncio.get_running_loop().time() + 30)
            assert reply.code == Code.CODE_OK
            assert reply.outputs[0].data == (7).to_bytes(4, "little") * 30
            plain.start()
            with pytest.raises(Unavailable):
                await plain.wait_connected(0.3)
        finally:
            await calls.close()
            await plain.close()
    await worker.server.close()


def test_nothing_set_is_no_tls() -> None:
    assert server_tls_of(FrameTlsSettings()) is None
    assert client_tls_of(FrameTlsSettings()) is None


def test_a_certificate_needs_its_key(tls: FrameTlsSettings) -> None:
    with pytest.raises(ValidationError, match="FRAMES_TLS_KEY"):
        FrameTlsSettings(frames_tls_cert=tls.frames_tls_cert)


def test_unusable_files_are_told_at_the_start(tmp_path: Path) -> None:
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("no certificate")
    settings = FrameTlsSettings(frames_tls_cert=nonsense, frames_tls_key=nonsense, frames_tls_ca=nonsense)
    for make in (server_tls_of, client_tls_of):
        with pytest.raises(Fatal, match="FRAMES_TLS"):
            make(settings)
