"""Where frame streams are: ports, and paths of this machine."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import socket
import stat
import weakref
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from services.common.frames.address import MAX_PATH_BYTES, Address, PathListener
from services.common.frames.turn import turn_of
from tests.fixtures.frames import Echoes, calling, serving_at


@pytest.fixture
def path() -> Iterator[Path]:
    with TemporaryDirectory() as folder:  # tmp_path may be too long for a socket
        yield Path(folder) / "s"


@pytest.mark.parametrize(
    ("text", "expected", "authority"),
    [
        ("router:8010", Address("router", 8010), "router:8010"),
        ("[::1]:1", Address("::1", 1), "[::1]:1"),
        ("unix:/run/r.sock", Address("", 0, "/run/r.sock"), "localhost"),
        ("unix:///run/r.sock", Address("", 0, "/run/r.sock"), "localhost"),
        ("local:router-0", Address("", 0, name="router-0"), "localhost"),
        ("local:8010", Address("local", 8010), "local:8010"),
    ],
)
def test_is_read_as_grpc_writes_it(text: str, expected: Address, authority: str) -> None:
    assert Address.parse(text) == expected
    assert expected.authority == authority


@pytest.mark.parametrize(
    "text", ["", "host", "host:", ":1", "host:0", "host:65536", "host:x", "unix:", "unix:run/r", "unix:run"]
)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is n"):
        Address.parse(text)


def test_a_path_has_a_limit(path: Path) -> None:
    long = "/" + "x" * MAX_PATH_BYTES
    with pytest.raises(ValueError, match="at most"):
        Address.parse(f"unix:{long}")
    with pytest.raises(OSError, match="at most"):
        PathListener(Path(long))


def test_is_for_this_user_only_and_goes_with_its_process(path: Path) -> None:
    at = PathListener(path)
    mode = path.lstat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600
    at.remove()
    assert not path.exists()
    at.socket.close()


def test_what_a_dead_process_left_is_replaced_and_nothing_else(path: Path) -> None:
    dead = PathListener(path)
    dead.socket.close()
    at = PathListener(path)
    dead.remove()  # it is not its own any more
    assert path.exists()
    with pytest.raises(FileExistsError, match="in use"):
        PathListener(path)
    at.socket.close()
    path.unlink()
    path.write_text("somebody's file")
    with pytest.raises(FileExistsError, match="in use"):
        PathListener(path)


def test_two_that_begin_at_once_do_not_replace_each_other(path: Path) -> None:
    with path.with_name(f"{path.name}.lock").open("wb") as beside:
        fcntl.flock(beside, fcntl.LOCK_EX)
        with pytest.raises(FileExistsError, match="begins to listen"):
            PathListener(path)
    at = PathListener(path)
    at.socket.close()


def test_turns_do_not_keep_their_loops() -> None:
    loop = asyncio.new_event_loop()
    turn_of(loop)
    gone = weakref.ref(loop)
    loop.close()
    del loop
    gc.collect()
    assert gone() is None


async def test_a_server_takes_the_place_of_a_killed_one(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    async with serving_at(path, Echoes()) as (server, address), calling(address) as calls:
        assert calls.peer is not None
        assert calls.peer.instance == "server-1"
        assert server.connections == 1
    assert not path.exists()
