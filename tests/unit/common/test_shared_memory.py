"""Shared memory of a client, which may be anything by the time it is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from services.common import shared_memory
from services.common.errors import InvalidArgument
from services.common.shared_memory import inspect, object_name, read, write


@pytest.fixture
def path() -> Iterator[Path]:
    """A name that nobody has."""
    path = shared_memory.DIRECTORY / f"headrace-test-{uuid4().hex}"
    yield path
    path.unlink(missing_ok=True)


def test_what_lies_there_is_read(path: Path) -> None:
    path.write_bytes(bytes(range(100)))
    assert read(path.name, 10, 5, "f") == bytes(range(10, 15))


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 101), (100, 1), (99, 2), (2**64 - 1, 1), (0, 2**64 - 1)])
def test_what_lies_beyond_the_end_is_refused(path: Path, offset: int, nbytes: int) -> None:
    path.write_bytes(bytes(100))
    with pytest.raises(InvalidArgument, match="ends before") as error:
        read(path.name, offset, nbytes, "inputs.x")
    assert error.value.field == "inputs.x"


def test_one_that_is_shortened_while_it_is_read_kills_nobody(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_bytes(bytes(1 << 20))
    pread = os.pread

    def after_a_cut(file: int, nbytes: int, offset: int) -> bytes:
        os.truncate(path, 4096)
        return pread(file, nbytes, offset)

    monkeypatch.setattr(os, "pread", after_a_cut)
    with pytest.raises(InvalidArgument, match="ends before"):
        read(path.name, 0, 1 << 20, "f")


def test_what_is_written_lies_there(path: Path) -> None:
    path.write_bytes(bytes(10))
    size, identity = inspect(path.name, "f")
    assert size == 10
    write(path.name, 4, b"abc", "f", identity)
    assert path.read_bytes() == bytes(4) + b"abc" + bytes(3)


@pytest.mark.parametrize("offset", [8, 11, 2**63, 2**64])
def test_nothing_is_written_beyond_the_end(path: Path, offset: int) -> None:
    path.write_bytes(bytes(10))
    with pytest.raises(InvalidArgument, match="ends before") as error:
        write(path.name, offset, b"abc", "outputs.x")
    assert error.value.field == "outputs.x"
    assert path.read_bytes() == bytes(10)


def test_another_object_of_the_same_name_is_neither_read_nor_written(path: Path) -> None:
    path.write_bytes(bytes(10))
    _size, identity = inspect(path.name, "f")
    assert read(path.name, 0, 1, "f", identity) == b"\0"
    # Made before the other one is gone: its number would be given again.
    other = path.with_name(f"{path.name}-new")
    other.write_bytes(bytes(10))
    other.rename(path)
    with pytest.raises(InvalidArgument, match="another object"):
        read(path.name, 0, 1, "f", identity)
    with pytest.raises(InvalidArgument, match="another object"):
        write(path.name, 0, b"a", "f", identity)
    assert path.read_bytes() == bytes(10)


def test_one_that_is_gone_is_refused(path: Path) -> None:
    with pytest.raises(InvalidArgument, match="cannot be opened"):
        read(path.name, 0, 1, "f")


def test_links_and_pipes_are_neither_followed_nor_waited_for(path: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    path.symlink_to(secret)
    with pytest.raises(InvalidArgument, match="cannot be opened"):
        read(path.name, 0, 6, "f")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InvalidArgument, match="is no shared memory"):
        read(path.name, 0, 1, "f")


@pytest.mark.parametrize("key", ["/name", "name", "/a.b-c_1"])
def test_keys_are_those_of_shm_open(key: str) -> None:
    assert object_name(key, "key") == key.lstrip("/")


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        "//name",
        "/../etc/passwd",
        "..",
        ".",
        "a/b",
        "/PostgreSQL.17",
        "sem.x",
        "a\0b",
        "x" * 201,
        "/é",
        "n\n",
    ],
)
def test_other_keys_are_refused(key: str) -> None:
    with pytest.raises(InvalidArgument, match="names no shared memory") as error:
        object_name(key, "key")
    assert error.value.field == "key"
