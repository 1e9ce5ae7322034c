"""Regions of shared memory, as clients of the Open Inference Protocol register them: of whom, and where.

A region is of the API key that registered it; others neither see nor use it. It is kept in a file of the
machine, since that is where it means anything: all gateways that share the folder know it at once, those too
that take over from others, with Redis away or not. It does not outlive the machine, as what it names does
not. Files are replaced as a whole, so that who reads one needs no lock.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Final

import msgspec

from services.common.errors import (
    AlreadyExists,
    HeadraceError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)
from services.common.shared_memory import boot, inspect, object_name

#: Of one key.
MOST_REGIONS: Final = 256
_NAME_CHARS: Final = 128
#: Keys whose regions are remembered as they were last read.
_KEYS: Final = 1000
_LOCK_S, _LOCK_RETRY_S = 2.0, 0.005
_OFF = "Shared memory is not served here: the gateway's SHARED_MEMORY is off."


class Region(msgspec.Struct, frozen=True):
    """`byte_size` bytes of an object, from `offset`. `key` is what the client calls the object, `object` its
    name and `identity` which one it was."""

    key: str
    object: str
    offset: int
    byte_size: int
    identity: int


class _Kept(msgspec.Struct):
    """The content of a file: regions by name, of this boot of the machine."""

    boot: str
    regions: dict[str, Region]


_Stamp = tuple[int, int, int]
_kept = msgspec.json.Decoder(_Kept)


class Regions:
    """Those of all keys. What changes or lists them reads and writes files, and may wait for a lock: it is
    for threads. `find` is for every request."""

    def __init__(self, folder: Path | None, prefix: str = "") -> None:
        """Without `folder` there are none, and everything raises Unimplemented. Names of objects begin with
        `prefix`."""
        self._folder = folder
        self._prefix = prefix
        self._known: dict[str, tuple[_Stamp, dict[str, Region]]] = {}
        if folder is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _forget_earlier(folder)

    @property
    def served(self) -> bool:
        """Whether there can be any."""
        return self._folder is not None

    def register(self, key_id: str, name: str, key: str, offset: int, byte_size: int) -> None:
        """Know the region `name` of the object that the client calls `key`; the same once more changes
        nothing, so that it can be tried again.

        Raises InvalidArgument for what is no such part of an object, AlreadyExists where the name stands for
        another that is still there, ResourceExhausted where the key has too many."""
        folder = self._on()
        if not 0 < len(name) <= _NAME_CHARS or not name.isprintable() or "/" in name:
            raise InvalidArgument(
                f"A region's name has 1 to {_NAME_CHARS} printable characters without a slash.", field="name"
            )
        found = object_name(key, "key")
        if not found.startswith(self._prefix):
            raise InvalidArgument(f"Keys begin with {self._prefix!r} here.", field="key")
        size, identity = inspect(found, "key")
        if byte_size <= 0 or offset < 0 or offset + byte_size > size:
            raise InvalidArgument(
                f"{byte_size} bytes from {offset} are no part of {key[:80]!r}, which has {size}.",
                field="offset" if 0 < byte_size <= size else "byte_size",
            )
        region = Region(key, found, offset, byte_size, identity)
        with _locked(folder):
            regions = dict(self._regions(key_id))
            had = regions.get(name)
            if had == region:
                return
            if had is not None and _is_there(had):
                raise AlreadyExists(f"The shared memory region {name!r} is registered already.", field="name")
            if had is None and len(regions) >= MOST_REGIONS:
                regions = {one: region for one, region in regions.items() if _is_there(region)}
                if len(regions) >= MOST_REGIONS:
                    raise ResourceExhausted(f"A key may register {MOST_REGIONS} regions.", field="name")
            regions[name] = region
            self._keep(folder, key_id, regions)

    def unregister(self, key_id: str, name: str = "") -> None:
        """Forget the region `name`, without one all of the key; what is not there is no error, as in other
        servers. Requests that run get no more bytes into it."""
        folder = self._on()
        with _locked(folder):
            regions = dict(self._regions(key_id))
            if not name:
                regions.clear()
            elif regions.pop(name, None) is None:
                return
            self._keep(folder, key_id, regions)

    def listed(self, key_id: str, name: str = "") -> dict[str, Region]:
        """The key's regions by name, or the one called `name`. Raises NotFound."""
        self._on()
        regions = self._regions(key_id)
        if not name:
            return dict(regions)
        region = regions.get(name)
        if region is None:
            raise NotFound(f"No shared memory region {name[:_NAME_CHARS]!r} is registered.", field="name")
        return {name: region}

    def find(self, key_id: str, name: str, field: str) -> Region:
        """The key's region `name`. Raises InvalidArgument naming `field`, Unimplemented.

        Called on the event loop: a look at a file's date, and where that is new, a page of the file."""
        if self._folder is None:
            raise Unimplemented(_OFF, field=field)
        region = self._regions(key_id).get(name)
        if region is None:
            raise InvalidArgument(
                f"{field}: this key registered no shared memory region {name[:_NAME_CHARS]!r}.",
                field=field,
            )
        return region

    def _on(self) -> Path:
        if self._folder is None:
            raise Unimplemented(_OFF)
        return self._folder

    def _regions(self, key_id: str) -> dict[str, Region]:
        path = _path(self._on(), key_id)
        try:
            status = path.stat()
            stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
            known = self._known.get(key_id)
            if known is not None and known[0] == stamp:
                return known[1]
            regions = _read(path)
        except OSError:
            return {}
        if len(self._known) >= _KEYS:
            self._known.clear()
        self._known[key_id] = stamp, regions
        return regions

    def _keep(self, folder: Path, key_id: str, regions: dict[str, Region]) -> None:
        """Replace the key's file, under the lock."""
        path = _path(folder, key_id)
        written = path.with_suffix(".new")
        written.write_bytes(msgspec.json.encode(_Kept(boot(), regions)))
        try:
            before = path.stat().st_mtime_ns
        except OSError:
            before = 0
        # Clocks of file systems may stand still between two changes, and the content is known by this date.
        now = max(time.time_ns(), before + 1)
        os.utime(written, ns=(now, now))
        written.replace(path)


def _path(folder: Path, key_id: str) -> Path:
    return folder / f"{sha256(key_id.encode()).hexdigest()[:32]}.json"


def _read(path: Path) -> dict[str, Region]:
    try:
        kept = _kept.decode(path.read_bytes())
    except (msgspec.DecodeError, msgspec.ValidationError):
        return {}  # of an earlier version, say: clients register again
    return kept.regions if kept.boot == boot() else {}


def _is_there(region: Region) -> bool:
    """Whether the object is still the one that was registered."""
    try:
        return inspect(region.object, "key")[1] == region.identity
    except HeadraceError:
        return False


def _forget_earlier(folder: Path) -> None:
    """Remove what nobody has: regions of an earlier boot of the machine, and none at all."""
    with _locked(folder):
        for path in folder.glob("*.json"):
            with suppress(OSError):
                if not _read(path):
                    path.unlink()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Raises Unavailable where others hold the lock for too long."""
    until = time.monotonic() + _LOCK_S
    with (folder / ".lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise Unavailable("Regions cannot be changed just now.", retry_after_ms=1000) from None
                time.sleep(_LOCK_RETRY_S)
        yield
