"""Sweeping of expired files goes on, whatever one round meets; and no upload keeps its place for ever."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from services.common.clock import ManualClock
from services.common.errors import DeadlineExceeded, ResourceExhausted
from services.gateway.jobs import openai_files
from services.gateway.jobs.backend import Backend
from services.gateway.jobs.openai_files import Files


async def test_sweeping_outlives_what_nobody_foresaw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_files, "_SWEEP_S", 0.0)
    rounds, again = 0, asyncio.Event()

    def backend() -> Backend:
        nonlocal rounds
        rounds += 1
        if rounds == 3:
            again.set()
        raise RuntimeError("nobody foresaw this")

    sweeping = asyncio.create_task(Files(backend, ManualClock(), tmp_path, max_bytes=1).sweeping())
    try:
        await asyncio.wait(
            {sweeping, asyncio.create_task(again.wait())}, timeout=5, return_when="FIRST_COMPLETED"
        )
        assert again.is_set()
        assert not sweeping.done()
    finally:
        sweeping.cancel()
        await asyncio.gather(sweeping, return_exceptions=True)


async def test_a_sender_that_trickles_loses_its_place(tmp_path: Path) -> None:
    def backend() -> Backend:
        raise AssertionError("nothing was received")

    files = Files(backend, ManualClock(), tmp_path, max_bytes=1, at_once=1, within_s=0.05)

    async def trickle() -> None:
        async with files.receiving("a") as receiving:
            await receiving.begin("a.bin")
            with pytest.raises(ResourceExhausted):
                await files.receiving("b").__aenter__()
            await asyncio.Event().wait()

    async def fail() -> None:
        async with files.receiving("a"):
            raise TimeoutError  # of something else, and no deadline of the upload

    with pytest.raises(DeadlineExceeded):
        await trickle()
    assert not list(tmp_path.iterdir())
    with pytest.raises(TimeoutError):
        await fail()


async def test_one_key_does_not_take_all_places_of_uploads(tmp_path: Path) -> None:
    def backend() -> Backend:
        raise AssertionError("nothing was received")

    files = Files(backend, ManualClock(), tmp_path, max_bytes=1, at_once=4)
    async with files.receiving("greedy"), files.receiving("greedy"):
        with pytest.raises(ResourceExhausted, match="of this key") as refused:
            await files.receiving("greedy").__aenter__()
        assert refused.value.retry_after_ms
        async with files.receiving("other"):
            pass
