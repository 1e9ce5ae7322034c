"""Regions of shared memory: whose they are, how long, and what is refused."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from services.common.errors import (
    AlreadyExists,
    HeadraceError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)
from services.common.shared_memory import DIRECTORY
from services.gateway import regions as module
from services.gateway.regions import Regions

MINE, ANOTHER = "key-1", "key-2"


@pytest.fixture
def memory() -> Iterator[Path]:
    path = DIRECTORY / f"headrace-test-{uuid4().hex}"
    path.write_bytes(bytes(64))
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def regions(tmp_path: Path) -> Regions:
    return Regions(tmp_path)


def renewed(memory: Path) -> None:
    """Another object of the same name."""
    other = memory.with_name(f"{memory.name}-new")
    other.write_bytes(bytes(64))
    other.rename(memory)


def test_a_region_is_what_was_registered(regions: Regions, memory: Path) -> None:
    regions.register(MINE, "in put", f"/{memory.name}", 8, 56)
    region = regions.find(MINE, "in put", "inputs.x")
    assert (region.key, region.object) == (f"/{memory.name}", memory.name)
    assert (region.offset, region.byte_size) == (8, 56)
    assert regions.listed(MINE) == regions.listed(MINE, "in put") == {"in put": region}


def test_nobody_else_has_it(regions: Regions, memory: Path) -> None:
    regions.register(MINE, "a", memory.name, 0, 64)
    with pytest.raises(InvalidArgument, match="registered no") as error:
        regions.find(ANOTHER, "a", "inputs.x")
    assert error.value.field == "inputs.x"
    with pytest.raises(NotFound):
        regions.listed(ANOTHER, "a")
    assert regions.listed(ANOTHER) == {}
    regions.unregister(ANOTHER, "a")
    regions.unregister(ANOTHER)
    assert regions.find(MINE, "a", "f").byte_size == 64


def test_others_of_the_machine_know_each_change_at_once(tmp_path: Path, memory: Path) -> None:
    one, other = Regions(tmp_path), Regions(tmp_path)
    for offset in range(32):  # files of the same size within one tick of the file system's clock
        one.register(MINE, "a", memory.name, 10 + offset, 10)
        assert other.find(MINE, "a", "f").offset == 10 + offset
        other.unregister(MINE, "a")
        with pytest.raises(InvalidArgument):
            one.find(MINE, "a", "f")


def test_it_outlives_the_gateway_but_not_the_machine(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Regions(tmp_path).register(MINE, "a", memory.name, 0, 64)
    assert Regions(tmp_path).find(MINE, "a", "f").byte_size == 64
    monkeypatch.setattr(module, "boot", lambda: "another")
    with pytest.raises(InvalidArgument):
        Regions(tmp_path).find(MINE, "a", "f")
    assert not list(tmp_path.glob("*.json"))


def test_the_same_once_more_changes_nothing(regions: Regions, memory: Path) -> None:
    regions.register(MINE, "a", memory.name, 0, 64)
    regions.register(MINE, "a", memory.name, 0, 64)
    with pytest.raises(AlreadyExists) as error:
        regions.register(MINE, "a", memory.name, 0, 32)
    assert error.value.field == "name"
    assert regions.find(MINE, "a", "f").byte_size == 64


def test_a_name_whose_object_is_gone_can_be_given_again(regions: Regions, memory: Path) -> None:
    regions.register(MINE, "a", memory.name, 0, 64)
    before = regions.find(MINE, "a", "f")
    renewed(memory)
    regions.register(MINE, "a", memory.name, 0, 32)
    after = regions.find(MINE, "a", "f")
    assert after.byte_size == 32
    assert after.identity != before.identity


@pytest.mark.parametrize(
    ("offset", "byte_size", "field"),
    [(0, 65, "byte_size"), (1, 64, "offset"), (64, 1, "offset"), (0, 0, "byte_size"), (-1, 2, "offset"),
     (0, -1, "byte_size"), (1 << 64, 1, "offset")],
)  # fmt: skip
def test_what_is_no_part_of_the_object_is_refused(
    regions: Regions, memory: Path, offset: int, byte_size: int, field: str
) -> None:
    with pytest.raises(InvalidArgument, match="no part of") as error:
        regions.register(MINE, "a", memory.name, offset, byte_size)
    assert error.value.field == field
    assert regions.listed(MINE) == {}


@pytest.mark.parametrize("key", ["../x", "a/b", "", "/", "sem.x", "PostgreSQL.1", "nothing-of-this-name"])
def test_keys_that_are_no_object_are_refused(regions: Regions, key: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        regions.register(MINE, "a", key, 0, 1)
    assert error.value.field == "key"


@pytest.mark.parametrize("name", ["", "a/b", "a\n", "x" * 129])
def test_names_that_no_path_takes_are_refused(regions: Regions, memory: Path, name: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        regions.register(MINE, name, memory.name, 0, 1)
    assert error.value.field == "name"


def test_links_lead_nowhere(regions: Regions, memory: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(64))
    memory.unlink()
    memory.symlink_to(secret)
    with pytest.raises(InvalidArgument, match="cannot be opened"):
        regions.register(MINE, "a", memory.name, 0, 64)


def test_names_of_objects_begin_as_the_operator_says(tmp_path: Path, memory: Path) -> None:
    Regions(tmp_path, "headrace-").register(MINE, "a", f"/{memory.name}", 0, 1)
    with pytest.raises(InvalidArgument, match="begin with 'served-'"):
        Regions(tmp_path, "served-").register(MINE, "b", memory.name, 0, 1)


def test_a_key_has_so_many_and_dead_ones_make_room(
    regions: Regions, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_REGIONS", 2)
    for name in ("a", "b"):
        regions.register(MINE, name, memory.name, 0, 1)
    with pytest.raises(ResourceExhausted):
        regions.register(MINE, "c", memory.name, 0, 1)
    regions.register(ANOTHER, "c", memory.name, 0, 1)
    renewed(memory)
    regions.register(MINE, "c", memory.name, 0, 1)
    assert list(regions.listed(MINE)) == ["c"]


def test_unregistering(regions: Regions, memory: Path) -> None:
    for name in ("a", "b", "c"):
        regions.register(MINE, name, memory.name, 0, 1)
    regions.unregister(MINE, "nothing")
    regions.unregister(MINE, "a")
    assert list(regions.listed(MINE)) == ["b", "c"]
    regions.unregister(MINE)
    assert regions.listed(MINE) == {}


def test_a_held_lock_is_not_waited_for_for_ever(
    regions: Regions, memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOCK_S", 0.01)
    held = os.open(tmp_path / ".lock", os.O_RDWR)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(Unavailable):
            regions.register(MINE, "a", memory.name, 0, 1)
    finally:
        os.close(held)
    regions.register(MINE, "a", memory.name, 0, 1)


def test_a_file_that_is_none_of_ours_is_as_none(regions: Regions, memory: Path, tmp_path: Path) -> None:
    regions.register(MINE, "a", memory.name, 0, 1)
    (path,) = tmp_path.glob("*.json")
    path.write_bytes(b"[1]")
    assert regions.listed(MINE) == {}
    regions.register(MINE, "a", memory.name, 0, 1)
    assert list(regions.listed(MINE)) == ["a"]


def test_without_a_folder_everything_is_refused() -> None:
    regions = Regions(None)
    assert not regions.served
    refused: list[HeadraceError] = []
    for call in (
        lambda: regions.register(MINE, "a", "b", 0, 1),
        lambda: regions.unregister(MINE),
        lambda: regions.listed(MINE),
        lambda: regions.find(MINE, "a", "f"),
    ):
        with pytest.raises(Unimplemented, match="SHARED_MEMORY") as error:
            call()
        refused.append(error.value)
    assert refused[-1].field == "f"
