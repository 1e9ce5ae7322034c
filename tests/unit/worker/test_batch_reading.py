"""From the range that a chunk names to its rows."""

from __future__ import annotations

import asyncio

import pytest
from headrace.v1.batch_pb2 import BatchChunk, InputFormat, InputRange
from headrace.v1.tensor_pb2 import DataType

from services.common.errors import Unavailable
from services.common.objects import InputSources
from services.worker.batch.reading import ChunkReader
from services.worker.batch.rows import Inputs, InputSpec

IMAGES = Inputs((InputSpec("image", DataType.DATA_TYPE_BYTES, ()),), batched=True)


class Leaving(InputSources):
    """A store that goes away after its first answers: one read fails, and the others would take for ever."""

    def __init__(self) -> None:
        self.asked = 0

    async def read(self, uri: str, start: int, end: int, *, etag: str | None = None) -> bytes:
        self.asked += 1
        if uri.endswith("/5.png"):
            raise Unavailable("the store is away")
        await asyncio.Event().wait()
        raise AssertionError("nobody set it")


async def test_files_of_a_chunk_that_will_be_tried_again_are_not_fetched_on() -> None:
    names = [f"{number}.png" for number in range(100)]
    chunk = BatchChunk(
        rows=len(names),
        input=InputRange(format=InputFormat.INPUT_FORMAT_IMAGES, uri="s3://bucket/images", names=names),
    )
    sources = Leaving()
    reader = ChunkReader(sources)
    others = asyncio.all_tasks()
    for _ in range(3):
        with pytest.raises(Unavailable):
            await reader.read(chunk, IMAGES)
        assert asyncio.all_tasks() == others
    assert sources.asked < 30
    await reader.close()
