"""API keys, as `control.keys.v1` tells them: who calls, and what they may do.

Key texts carry 256 random bits, so SHA-256 finds and checks them at once. Texts that were good are remembered
with their key until any key changes; bad ones are not, so guessing fills no memory."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from headrace.v1.control_pb2 import ApiKey

from services.common.clock import Clock
from services.common.errors import PermissionDenied, Unauthenticated
from services.gateway.limiter import Bucket
from services.gateway.reading import Holder

_REMEMBERED = 10_000
#: Headers may be padded; longer ones are digested each time.
_MAX_REMEMBERED_BYTES = 200
#: Plans of one key. Models that are gone leave theirs behind.
_MOST_PLANS = 4096


class Scope(enum.StrEnum):
    """What a key may do. `admin` includes the others."""

    PREDICT = "predict"
    READ = "read"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Key:
    """One key. `models` empty: all; `expires_at_us` 0: never; `bucket` None: no rate limit."""

    key_id: str
    scopes: frozenset[str]
    models: frozenset[str]
    expires_at_us: int
    digest: bytes
    bucket: Bucket | None
    #: What was found out about calls of this key, by model (`plans.Plan`) or by how they name it
    #: (`infer_plans.InferPlan`); forgotten with the key.
    plans: dict[str | bytes, Any] = field(default_factory=dict, compare=False, repr=False)
    #: What the process holds of its bodies, in all of its life.
    holder: Holder = field(default_factory=Holder, compare=False, repr=False)

    @property
    def sees_all(self) -> bool:
        """Whether what belongs to other keys is its to see, whatever model it is about."""
        return Scope.ADMIN in self.scopes and not self.models

    def keep_plan(self, name: str | bytes, plan: Any) -> None:
        """Remember `plan` by `name`."""
        if len(self.plans) >= _MOST_PLANS and name not in self.plans:
            self.plans.clear()
        self.plans[name] = plan

    def require(self, scope: Scope) -> None:
        """Raise PermissionDenied without `scope`."""
        if scope not in self.scopes:
            raise PermissionDenied(f"This key lacks the scope {scope}.")

    def require_model(self, model: str) -> None:
        """Raise PermissionDenied where the key is for other models."""
        if self.models and model not in self.models:
            raise PermissionDenied(f"This key is not for the model {model[:64]!r}.", field="model")


class KeyRing:
    """Every key that opens the door."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._by_id: dict[str, Key] = {}
        self._by_digest: dict[bytes, Key] = {}
        self._revisions: dict[str, int] = {}
        self._by_authorization: dict[bytes, Key] = {}
        self._by_api_key: dict[bytes, Key] = {}
        #: Grows with every change: who remembers a key asks again when it has.
        self.generation = 0

    def apply(self, key: bytes, value: bytes | None) -> bool:
        """Take one record of the topic; older revisions are ignored, which the answer False says. Revoked and
        removed keys are shut out at once. Raises ValueError for a record that is no key."""
        key_id = key.decode()
        record = ApiKey.FromString(value) if value is not None else None
        if record is not None:
            if record.revision < self._revisions.get(key_id, 0):
                return False
            if not record.revoked and len(record.key_sha256) != 32:
                raise ValueError(f"key {key_id} has no SHA-256")
            self._revisions[key_id] = record.revision
        self._by_authorization.clear()
        self._by_api_key.clear()
        self.generation += 1
        known = self._by_id.pop(key_id, None)
        if known is not None:
            self._by_digest.pop(known.digest, None)
        if record is None or record.revoked:
            return True
        made = _key(key_id, record, known)
        self._by_id[key_id] = made
        self._by_digest[made.digest] = made
        return True

    def authenticate(self, authorization: bytes | None, api_key: bytes | None) -> Key:
        """The key of a request's `Authorization: Bearer …` or `X-API-Key` header. Raises Unauthenticated."""
        if authorization is not None:
            key = self._by_authorization.get(authorization)
            if key is None:
                key = self._found(_bearer(authorization), authorization, self._by_authorization)
        elif api_key is not None:
            key = self._by_api_key.get(api_key)
            if key is None:
                key = self._found(api_key.strip(), api_key, self._by_api_key)
        else:
            raise Unauthenticated("An API key is needed: `Authorization: Bearer <key>` or `X-API-Key`.")
        if key.expires_at_us and self._clock.unix_us() >= key.expires_at_us:
            raise Unauthenticated("This API key has expired.")
        return key

    def by_id(self, key_id: str) -> Key | None:
        """The key of that id, None where it was revoked or has expired: for work that goes on without its
        caller."""
        key = self._by_id.get(key_id)
        if key is None or (key.expires_at_us and self._clock.unix_us() >= key.expires_at_us):
            return None
        return key

    def buckets(self) -> list[Bucket]:
        """The buckets of all keys that have a limit."""
        return [key.bucket for key in self._by_id.values() if key.bucket is not None]

    def __len__(self) -> int:
        return len(self._by_id)

    def _found(self, text: bytes, header: bytes, remembered: dict[bytes, Key]) -> Key:
        found = self._by_digest.get(sha256(text).digest())
        if found is None:
            raise Unauthenticated("This API key is not known.")
        if len(header) <= _MAX_REMEMBERED_BYTES:
            if len(remembered) >= _REMEMBERED:
                remembered.clear()
            remembered[header] = found
        return found


def _bearer(authorization: bytes) -> bytes:
    scheme, _, text = authorization.partition(b" ")
    if scheme.lower() != b"bearer":
        raise Unauthenticated("Send the API key as `Authorization: Bearer <key>` or `X-API-Key`.")
    return text.strip()


def _key(key_id: str, record: ApiKey, known: Key | None) -> Key:
    scopes = set(record.scopes)
    if Scope.ADMIN in scopes:
        scopes |= {Scope.PREDICT, Scope.READ}
    rate, bucket = record.rate_per_second, known.bucket if known else None
    if rate <= 0:
        bucket = None
    elif bucket is None or not bucket.has_limit(rate, record.burst):
        bucket = Bucket(key_id, rate, record.burst)
    return Key(
        key_id=key_id,
        scopes=frozenset(scopes),
        models=frozenset(record.models),
        expires_at_us=record.expires_at_us,
        digest=record.key_sha256,
        bucket=bucket,
        holder=known.holder if known else Holder(),
    )
