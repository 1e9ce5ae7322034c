"""A folder of images: one row each, by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b

from headrace.v1.batch_pb2 import InputFormat, InputRange

from services.common.errors import FailedPrecondition
from services.common.objects import SourceInfo
from services.gateway.jobs.sizing import ChunkLimits
from services.gateway.jobs.splitting.port import CHUNKS_AT_ONCE, FIELD, Chunk, Cursor, Cut, refused

#: Names travel in the chunk's record.
_MAX_NAMES_BYTES = 1 << 20
_ENDINGS = (".png", ".jpg", ".jpeg")


def cut_images(
    uri: str, files: Sequence[SourceInfo], limits: ChunkLimits, cursor: Cursor | None
) -> Iterator[Cut]:
    """Cut the images among `files`, in the order of their names; other files are none of ours. Raises
    FailedPrecondition where the folder is not what it was when the cutting began."""
    images = [one for one in files if one.name.lower().endswith(_ENDINGS)]
    if not images:
        raise refused("The folder holds no PNG or JPEG file.")
    listing = _digest(images)
    if cursor is not None and cursor["listing"] != listing:
        raise FailedPrecondition("The folder was changed while it was read.", field=FIELD)
    at: int = cursor["row"] if cursor is not None else 0
    chunks: list[Chunk] = []
    while at < len(images):
        stop, size, text = at, 0, 0
        while stop < len(images) and stop - at < limits.rows:
            size += images[stop].size
            text += len(images[stop].name.encode())
            if stop > at and (size > limits.bytes or text > _MAX_NAMES_BYTES):
                break
            stop += 1
        names = [one.name for one in images[at:stop]]
        of_folder = InputRange(uri=uri, format=InputFormat.INPUT_FORMAT_IMAGES, names=names)
        chunks.append(Chunk(at, stop - at, of_folder))
        at = stop
        if len(chunks) == CHUNKS_AT_ONCE:
            yield Cut(chunks, {"row": at, "listing": listing}, at, done=False)
            chunks = []
    yield Cut(chunks, {"row": at, "listing": listing}, at, done=True)


def _digest(images: Sequence[SourceInfo]) -> str:
    told = blake2b(digest_size=16)
    for one in images:
        told.update(f"{one.name}\0{one.size}\0{one.etag}\n".encode())
    return told.hexdigest()
