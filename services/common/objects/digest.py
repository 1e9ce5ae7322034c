"""Content addresses: `sha256:<64 hex digits>`."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from services.common.errors import InvalidArgument

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def digest_of_bytes(data: bytes) -> str:
    """The digest of `data`."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def digest_of_file(path: Path) -> str:
    """The digest of a file, read piece by piece. Blocks; run it in a thread."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def blob_path(digest: str) -> str:
    """Where the store keeps the content of that digest: `blobs/sha256/<hh>/<hex>`. Raises InvalidArgument."""
    if not _DIGEST.fullmatch(digest):
        raise InvalidArgument("a digest is written sha256:<64 hex digits>", field="digest")
    name = digest.removeprefix("sha256:")
    return f"blobs/sha256/{name[:2]}/{name}"
