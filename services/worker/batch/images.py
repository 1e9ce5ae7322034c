"""Rows that are image files: decoded to the pixels that the model takes, or handed over as they are."""

from __future__ import annotations

import io
import struct
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from PIL import Image

from services.common.errors import HeadraceError, InvalidArgument
from services.worker.batch.rows import Group, Inputs, InputSpec, Rows
from services.worker.tensors import Array

# Decoding takes up to 16 bytes per pixel; a small file may claim any number of them.
_MAX_PIXELS = 32 << 20
#: What all images of a chunk may take once they are decoded.
MAX_BYTES = 1 << 30
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# What Pillow takes for damage itself while it opens a file, but not while it reads what follows the pixels.
_STUMBLED = (LookupError, TypeError, EOFError, struct.error)
_DAMAGED = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, *_STUMBLED)


def rows_of_images(
    names: Sequence[str], files: Sequence[bytes | HeadraceError], inputs: Inputs, first_row: int
) -> Rows:
    """One row per file; the file's name is the row's custom id. Raises InvalidArgument for a model that does
    not take one image.

    An input of BYTES gets the file itself. UINT8 [height, width, channels], [channels, height, width] or
    [height, width] gets its pixels, FP32 and FP16 the same divided by 255; a size that the model fixes must
    be the image's own, and 1, 3 or 4 channels make it grey, RGB or RGBA. An image that no longer fits into
    MAX_BYTES together with those before it fails."""
    spec = _checked(inputs)
    failures: dict[int, HeadraceError] = {}
    shapes: dict[tuple[int, ...], list[tuple[int, Array]]] = defaultdict(list)
    room = MAX_BYTES
    for place, content in enumerate(files):
        try:
            if isinstance(content, HeadraceError):
                raise content
            row = _bytes_row(spec, content) if spec.text else _pixels(spec, content, room)
            room -= row.nbytes
        except HeadraceError as error:
            where = f"inputs[{first_row + place}]"
            failures[place] = type(error)(f"{where} ({names[place]}): {error.message}", field=where)
        else:
            shapes[row.shape if inputs.batched else (place,)].append((place, row))
    groups = [
        Group(
            np.array([place for place, _ in rows], np.int64), {spec.name: np.stack([row for _, row in rows])}
        )
        for rows in shapes.values()
    ]
    return Rows(len(files), groups, failures, list(names))


def _checked(inputs: Inputs) -> InputSpec:
    spec = inputs.specs[0]
    fits = spec.shape in ((), (1,)) if spec.text else len(spec.shape) in (2, 3)
    known = spec.text or spec.dtype == np.uint8 or spec.dtype.kind == "f"
    if len(inputs.specs) > 1 or not fits or not known or (len(spec.shape) == 3 and not _channels(spec)):
        raise InvalidArgument(
            "The model does not take images: one input of BYTES, or of UINT8, FP16 or FP32 pixels.",
            field="input_format",
        )
    return spec


def _channels(spec: InputSpec) -> int:
    """How many channels the model takes, 0 where neither end of the shape says; negative where they come
    first."""
    if spec.shape[2] in _MODES:
        return spec.shape[2]
    return -spec.shape[0] if spec.shape[0] in _MODES else 0


def _bytes_row(spec: InputSpec, content: bytes) -> Array:
    row = np.empty(spec.shape, object)
    row[...] = content
    return row


def _pixels(spec: InputSpec, content: bytes, room: int) -> Array:
    channels = _channels(spec) if len(spec.shape) == 3 else 1
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise InvalidArgument(f"the image has more than {_MAX_PIXELS} pixels.")
            if image.width * image.height * abs(channels) * spec.dtype.itemsize > room:
                raise InvalidArgument(f"the images of its chunk take more than {MAX_BYTES} bytes.")
            pixels = np.asarray(image.convert(_MODES[abs(channels)]))
    except _DAMAGED:
        raise InvalidArgument("it is no PNG or JPEG image.") from None
    if len(spec.shape) == 3:
        pixels = pixels.reshape(*pixels.shape[:2], abs(channels))
        if channels < 0:
            pixels = pixels.transpose(2, 0, 1)
    if any(want not in (-1, have) for want, have in zip(spec.shape, pixels.shape, strict=True)):
        raise InvalidArgument(
            f"the image has shape {list(pixels.shape)} where {list(spec.shape)} is expected."
        )
    if spec.dtype.kind == "f":
        return (pixels.astype(np.float32) / np.float32(255)).astype(spec.dtype)
    return pixels
