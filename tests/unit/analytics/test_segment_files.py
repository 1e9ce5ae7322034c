"""Objects as local files: none goes while somebody reads it."""

from pathlib import Path

import pytest

from services.analytics.segments import SegmentFiles
from services.common.errors import NotFound
from services.common.objects import ArtifactStore

NAMES = [f"predictions/m/1/day/{number}.parquet" for number in range(4)]


class Remote(ArtifactStore):
    """A store whose objects are nowhere on this machine: each download is counted, each is of 10 bytes."""

    def __init__(self) -> None:
        self.downloads: list[str] = []
        self.gone: set[str] = set()

    def local_path(self, path: str) -> Path | None:
        return None

    async def download(self, path: str, to: Path, *, digest: str | None = None) -> int:
        if path in self.gone:
            raise NotFound(f"There is no {path}.")
        self.downloads.append(path)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(bytes(10))
        return 10


async def test_files_in_use_are_not_evicted_and_others_are(tmp_path: Path) -> None:
    store = Remote()
    files = SegmentFiles(store, tmp_path, cache_bytes=15)
    async with files.held(NAMES[:3]) as first:
        async with files.held(NAMES[3:]) as second:
            assert Path(second[0]).exists()
        async with files.held(NAMES[:1]):
            pass
        assert all(Path(file).exists() for file in first)
        assert not Path(second[0]).exists()
    assert sum(Path(file).exists() for file in first) == 1
    assert sorted(store.downloads) == NAMES  # those of one question are fetched at the same time


async def test_an_object_that_is_gone_is_no_file(tmp_path: Path) -> None:
    store = Remote()
    store.gone.add(NAMES[1])
    files = SegmentFiles(store, tmp_path, cache_bytes=0)
    with pytest.raises(FileNotFoundError):
        async with files.held(NAMES[:2]):
            raise AssertionError
    store.gone.clear()
    async with files.held(NAMES[:2]) as found:
        assert all(Path(file).exists() for file in found)
