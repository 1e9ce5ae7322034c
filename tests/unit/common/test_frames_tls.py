"""The frame channel over TLS: ALPN, verified names, client certificates."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from headrace.v1.dataplane_pb2 import PredictRequest
from headrace.v1.tensor_pb2 import Tensor

from services.common.errors import Unavailable
from services.common.frames import FrameCalls, FrameServer, client_tls, server_tls
from tests.fixtures.certificates import certify
from tests.fixtures.frames import QUICK, TOKEN, Echoes, Wire
from tests.fixtures.waiting import PATIENCE_S


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return certify(tmp_path_factory.mktemp("tls"))


@asynccontextmanager
async def pair(server_side: ssl.SSLContext, client_side: ssl.SSLContext | None) -> AsyncIterator[FrameCalls]:
    server = FrameServer(
        Echoes(), credential=TOKEN, instance="s", role="worker", limits=QUICK, ssl=server_side
    )
    port = await server.start("127.0.0.1", 0)
    calls = FrameCalls(
        f"127.0.0.1:{port}", credential=TOKEN, role="router", instance="c", limits=QUICK, ssl=client_side
    )
    calls.start()
    try:
        yield calls
    finally:
        await calls.close()
        await server.close()


async def test_mutual_tls(certificate: tuple[Path, Path]) -> None:
    server_side = server_tls(*certificate, client_ca=certificate[0])
    async with pair(server_side, client_tls(certificate[0], *certificate)) as calls:
        await calls.wait_connected(PATIENCE_S)
        data = b"x" * 3_000_000
        reply = await calls.predict(PredictRequest(inputs=[Tensor(data=data)]), None)
        assert reply.outputs[0].data == data


async def test_a_client_without_a_certificate_is_refused(certificate: tuple[Path, Path]) -> None:
    server_side = server_tls(*certificate, client_ca=certificate[0])
    async with pair(server_side, client_tls(certificate[0])) as calls:
        with pytest.raises(Unavailable):
            await calls.wait_connected(0.3)


async def test_an_unknown_server_is_not_trusted(certificate: tuple[Path, Path]) -> None:
    distrustful = ssl.create_default_context()
    async with pair(server_tls(*certificate), distrustful) as calls:
        with pytest.raises(Unavailable, match="certificate verify failed"):
            await calls.wait_connected(0.5)


async def test_a_peer_that_did_not_agree_on_h2_is_hung_up_on(certificate: tuple[Path, Path]) -> None:
    without_alpn = ssl.create_default_context(cafile=str(certificate[0]))
    server = FrameServer(
        Echoes(), credential=TOKEN, instance="s", role="worker", limits=QUICK, ssl=server_tls(*certificate)
    )
    port = await server.start("127.0.0.1", 0)
    raw = await Wire.connect(f"127.0.0.1:{port}", without_alpn)
    assert await raw.closed()
    raw.close()
    await server.close()
