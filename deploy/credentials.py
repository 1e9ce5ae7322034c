"""Writes the secrets of an installation into a folder, once: the shared token and the first admin key."""

from __future__ import annotations

import base64
import secrets
import sys
from pathlib import Path


def admin_key() -> str:
    """`hr_<key id>_<secret>`: 60 random bits of name, 256 random bits of secret."""
    key_id = base64.b32encode(secrets.token_bytes(8)).decode().lower()[:12]
    return f"hr_{key_id}_{secrets.token_urlsafe(32)}"


def write(folder: Path) -> None:
    """Make what is missing; what is there stays, so that a restart changes nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in {
        "internal_token": secrets.token_urlsafe(32),
        "bootstrap_admin_key": admin_key(),
    }.items():
        path = folder / name
        if not path.exists():
            path.write_text(value)
        # The services run as one user of their own, inside containers that share this volume.
        path.chmod(0o444)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
