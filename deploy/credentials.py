"""Writes the secrets of an installation, once: what every service reads, and what only the registry or the
gateway may.

python credentials.py <folder of all services> <folder of the registry> <folder of the gateway>
"""

from __future__ import annotations

import base64
import secrets
import sys
from pathlib import Path


def admin_key() -> str:
    """`hr_<key id>_<secret>`: 60 random bits of name, 256 random bits of secret."""
    key_id = base64.b32encode(secrets.token_bytes(8)).decode().lower()[:12]
    return f"hr_{key_id}_{secrets.token_urlsafe(32)}"


def write(shared: Path, registry: Path, gateway: Path) -> None:
    """Make what is missing; what is there stays, so that a restart changes nothing.

    `registry` and `gateway` hold all that these two read. The admin key and the key that signs callbacks are
    nowhere else: a worker, which loads models that others wrote, need not know them. It has the token, which
    opens the registry's port, where keys are made, and it reaches Kafka: what runs in a worker is trusted.
    """
    for folder in (shared, registry, gateway):
        folder.mkdir(parents=True, exist_ok=True)
    token = _keep(shared / "internal_token", secrets.token_urlsafe(32))
    _keep(registry / "internal_token", token)
    _keep(gateway / "internal_token", token)
    _keep(gateway / "callback_secret", secrets.token_urlsafe(32))
    once_shared = shared / "bootstrap_admin_key"  # by an earlier version
    _keep(registry / "bootstrap_admin_key", once_shared.read_text() if once_shared.exists() else admin_key())
    once_shared.unlink(missing_ok=True)


def _keep(path: Path, fresh: str) -> str:
    if not path.exists() or not path.read_text():  # empty: the disk was full when it was to be written
        path.write_text(fresh)
    # The services run as one user of their own, inside containers that share a volume.
    path.chmod(0o444)
    return path.read_text()


if __name__ == "__main__":
    write(*map(Path, sys.argv[1:4]))
