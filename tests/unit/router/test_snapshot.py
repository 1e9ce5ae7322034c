"""The snapshot on disk: whole or not at all, and never in the way of a start."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from services.router.snapshot import Snapshot
from tests.fixtures.waiting import PATIENCE_S, eventually


async def written(path: Path, records: dict[str, bytes]) -> None:
    snapshot = Snapshot(path, {"deployments": lambda: records})
    task = asyncio.create_task(snapshot.run())
    snapshot.changed()
    await asyncio.sleep(0)
    task.cancel()  # the last change is written on the way out
    await asyncio.gather(task, return_exceptions=True)


async def restored(path: Path) -> tuple[bool, dict[bytes, bytes | None]]:
    held: dict[bytes, bytes | None] = {}
    found = await Snapshot(path, {}).restore({"deployments": held.__setitem__})
    return found, held


async def test_what_was_written_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "routing.json"
    await written(path, {"cancer": b"\x00\xff", "digits": b""})
    assert await restored(path) == (True, {b"cancer": b"\x00\xff", b"digits": b""})
    assert list(path.parent.iterdir()) == [path]


async def test_changes_are_written_while_it_runs(tmp_path: Path) -> None:
    path = tmp_path / "routing.json"
    records = {"a": b"1"}
    snapshot = Snapshot(path, {"deployments": lambda: records})
    task = asyncio.create_task(snapshot.run())
    snapshot.changed()
    await eventually(path.exists)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (await restored(path))[1] == {b"a": b"1"}


async def test_an_end_amid_writing_waits_for_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, begun, go_on = tmp_path / "routing.json", threading.Event(), threading.Event()

    def slow(to: Path, held: object) -> None:
        begun.set()
        assert go_on.wait(PATIENCE_S)
        to.write_text("written")

    monkeypatch.setattr("services.router.snapshot._write", slow)
    snapshot = Snapshot(path, {})
    task = asyncio.create_task(snapshot.run())
    snapshot.changed()
    await eventually(begun.is_set)
    task.cancel()
    asyncio.get_running_loop().call_later(0.1, go_on.set)
    await asyncio.gather(task, return_exceptions=True)
    assert path.read_text() == "written"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"format": 2, "parts": {}}', b'{"format": 1}', b"\xff"]
)
async def test_a_broken_file_is_no_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "routing.json"
    path.write_bytes(content)
    assert await restored(path) == (False, {})
    assert await restored(tmp_path / "absent") == (False, {})


async def test_one_bad_record_does_not_hide_the_others(tmp_path: Path) -> None:
    path = tmp_path / "routing.json"
    await written(path, {"bad": b"1", "good": b"2"})
    held: dict[bytes, bytes | None] = {}

    def take(key: bytes, value: bytes | None) -> None:
        if key == b"bad":
            raise ValueError("cannot be served")
        held[key] = value

    assert await Snapshot(path, {}).restore({"deployments": take})
    assert held == {b"good": b"2"}


async def test_a_disk_that_takes_nothing_stops_nothing(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    await written(blocked / "routing.json", {"a": b"1"})
    assert await restored(blocked / "routing.json") == (False, {})


async def test_others_have_their_turn_while_thousands_of_models_are_restored(tmp_path: Path) -> None:
    """Each takes the better part of a millisecond, and a router may be a guest of a process that serves."""
    path = tmp_path / "routing.json"
    await written(path, {f"model-{number}": b"" for number in range(1000)})
    turns: list[int] = []
    held: dict[bytes, bytes | None] = {}
    restoring = asyncio.create_task(Snapshot(path, {}).restore({"deployments": held.__setitem__}))
    while not restoring.done():
        turns.append(len(held))
        await asyncio.sleep(0)
    assert await restoring
    assert len(held) == 1000
    assert max(after - before for before, after in zip(turns, [*turns[1:], 1000], strict=True)) <= 20
