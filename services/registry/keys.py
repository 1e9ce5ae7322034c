"""API keys: made once, shown once, kept as a hash, published to the gateways. Every function runs in the
caller's transaction."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import secrets
from dataclasses import dataclass
from datetime import datetime

import structlog
from headrace.v1.control_pb2 import ApiKey

from services.common.clock import Clock
from services.common.errors import InvalidArgument, NotFound
from services.common.topics import KEYS
from services.registry.repository import Repository
from services.registry.schemas import KeyIn, utc_us
from services.registry.tables import KeyRow

log = structlog.get_logger(__name__)

#: `hr_<key id>_<256 random bits, base64url>`; the id is not secret and leads to the record.
KEY_TEXT = re.compile(r"^hr_([a-z2-7]{12})_([A-Za-z0-9_-]{43})$")


@dataclass(frozen=True, slots=True)
class Key:
    """What may be known of a key after it was made."""

    key_id: str
    name: str
    scopes: list[str]
    rate_per_second: float
    burst: int
    models: list[str]
    expires_at: datetime | None
    revoked: bool
    created_at: datetime


async def create_key(tx: Repository, wanted: KeyIn, clock: Clock) -> tuple[Key, str]:
    """A new key and its text, which is kept nowhere. Raises InvalidArgument for an expiry that has passed."""
    if wanted.expires_at is not None and wanted.expires_at <= clock.now():
        raise InvalidArgument("expires_at has passed already", field="expires_at")
    key_id = base64.b32encode(secrets.token_bytes(8)).decode().lower()[:12]
    text = f"hr_{key_id}_{secrets.token_urlsafe(32)}"
    row = KeyRow(
        key_id=key_id,
        name=wanted.name,
        key_sha256=hashlib.sha256(text.encode()).digest(),
        scopes=sorted(set(wanted.scopes)),
        rate_per_second=wanted.rate_per_second,
        burst=wanted.burst or math.ceil(wanted.rate_per_second),
        models=sorted(set(wanted.models)),
        expires_at=wanted.expires_at,
        revoked_at=None,
        revision=1,
        created_at=clock.now(),
    )
    tx.add(row)
    publish_key(tx, row)
    return _key(row), text


async def list_keys(tx: Repository, after: str, limit: int) -> tuple[list[Key], str | None]:
    """A page by key id, revoked ones included, and where the next one starts."""
    rows = await tx.keys(after, limit + 1)
    page = rows[:limit]
    return [_key(row) for row in page], page[-1].key_id if len(rows) > limit else None


async def revoke_key(tx: Repository, key_id: str, clock: Clock) -> None:
    """Shut a key out for ever; again is fine. Raises NotFound."""
    row = await tx.key(key_id, lock=True)
    if row is None:
        raise NotFound(f"there is no key {key_id!r}", field="key_id")
    if row.revoked_at is None:
        row.revoked_at = clock.now()
        row.revision += 1
        publish_key(tx, row)


async def ensure_admin_key(tx: Repository, text: str, clock: Clock) -> None:
    """Let the key `text` of the environment in, with scope admin. One that was revoked stays out.

    Raises InvalidArgument where it is no key.
    """
    match = KEY_TEXT.fullmatch(text)  # a line break behind it would be part of what is digested
    if match is None:
        raise InvalidArgument("BOOTSTRAP_ADMIN_KEY is not of the form hr_<12 characters>_<43 characters>")
    digest = hashlib.sha256(text.encode()).digest()
    await tx.insert_key(
        {
            "key_id": match[1],
            "name": "bootstrap admin",
            "key_sha256": digest,
            "scopes": ["admin"],
            "rate_per_second": 0.0,
            "burst": 0,
            "models": [],
            "revision": 0,
            "created_at": clock.now(),
        }
    )
    row = await tx.key(match[1], lock=True)
    if row is None or row.revoked_at is not None:
        log.warning("bootstrap_key_stays_revoked", key_id=match[1])
        return
    if row.revision == 0 or row.key_sha256 != digest:
        row.key_sha256 = digest
        row.revision += 1
        publish_key(tx, row)


async def republish_key(tx: Repository, key_id: str, seen: int) -> None:
    """Put a key on the topic again, which holds revision `seen` (0: nothing). A higher one is overtaken."""
    row = await tx.key(key_id, lock=True)
    if row is None:
        return
    if row.revision < seen:
        row.revision = seen + 1
    publish_key(tx, row)


def publish_key(tx: Repository, row: KeyRow) -> None:
    """Put the state of a key on `control.keys.v1` when this transaction commits."""
    record = ApiKey(
        key_id=row.key_id,
        name=row.name,
        key_sha256=row.key_sha256,
        scopes=row.scopes,
        rate_per_second=row.rate_per_second,
        burst=row.burst,
        revoked=row.revoked_at is not None,
        expires_at_us=utc_us(row.expires_at) if row.expires_at else 0,
        revision=row.revision,
        models=row.models,
    )
    tx.publish(KEYS, row.key_id, record.SerializeToString(deterministic=True))


def _key(row: KeyRow) -> Key:
    return Key(
        key_id=row.key_id,
        name=row.name,
        scopes=list(row.scopes),
        rate_per_second=row.rate_per_second,
        burst=row.burst,
        models=list(row.models),
        expires_at=row.expires_at,
        revoked=row.revoked_at is not None,
        created_at=row.created_at,
    )
