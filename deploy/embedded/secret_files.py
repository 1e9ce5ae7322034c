"""Secrets of this installation: made once, readable by their owner only."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from deploy.credentials import admin_key


@dataclass(frozen=True, slots=True)
class Secrets:
    """What the services share, the first key of the gateway, and what only the gateway knows."""

    internal_token: str
    admin_key: str
    #: The gateway signs callbacks with it.
    callback_secret: str = ""


def load_or_create(home: Path) -> Secrets:
    """Read `secrets` and `admin.key` in `home`; what is missing is made (0600) and stays as it is."""
    line = _keep(home / "secrets", f"INTERNAL_TOKEN={secrets.token_urlsafe(32)}")
    return Secrets(
        internal_token=line.partition("=")[2],
        admin_key=_keep(home / "admin.key", admin_key()),
        callback_secret=_keep(home / "callback.secret", secrets.token_urlsafe(32)),
    )


def _keep(path: Path, fresh: str) -> str:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        path.chmod(0o600)
        if text := path.read_text().strip():
            return text
        path.unlink()  # a crash between creating and writing left it empty
        return _keep(path, fresh)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(fresh + "\n")
    return fresh
