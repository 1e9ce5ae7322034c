"""Where callbacks may go: public addresses, and what the operator named. A name is looked up once for each
request, and the address that was judged is the one connected to, so a name cannot change its mind in
between."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from services.common.errors import FailedPrecondition, InvalidArgument, PermissionDenied, Unavailable

FIELD = "callback_url"
#: Stands in a list of allowed hosts for every address that is reachable from everywhere.
PUBLIC = "public"

_PORTS = {"http": 80, "https": 443}
_LOOKUP_S = 5.0
_LOOKUPS_AT_ONCE = 4
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Target:
    """A callback's address in parts. `host` without brackets."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """What the Host header says: the port only where it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


class CallbackRules:
    """`allow`: hosts that may be called wherever they lie, and `public`; empty: public ones. Where callbacks
    cannot be signed, there are none."""

    def __init__(self, allow: Sequence[str], *, is_signed: bool = True) -> None:
        self._is_signed = is_signed
        self._hosts = {host.lower().strip("[]") for host in allow if host != PUBLIC}
        self._public = PUBLIC in allow or not allow
        # Of their own: a resolver that hangs holds its thread longer than anybody waits, and must not take
        # those that the rest of the process reads and writes with.
        self._threads = ThreadPoolExecutor(_LOOKUPS_AT_ONCE, thread_name_prefix="callback-names")

    def close(self) -> None:
        """No name is looked up any more; look-ups that hang are left alone."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def check(self, url: str) -> Target:
        """What `url` leads to. All errors have the field `callback_url`: InvalidArgument where it is no
        address, PermissionDenied where it may not be called as far as its text tells, FailedPrecondition
        where callbacks cannot be signed."""
        if not self._is_signed:
            raise FailedPrecondition(
                "This installation signs no callbacks: CALLBACK_SECRET is not set.", field=FIELD
            )
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise InvalidArgument("callback_url is no address.", field=FIELD) from None
        host = (parts.hostname or "").rstrip(".")
        if parts.scheme not in _PORTS or not host or any(ord(letter) <= 32 for letter in url):
            raise InvalidArgument("callback_url is http://host/… or https://host/….", field=FIELD)
        if parts.username is not None or parts.password is not None:
            raise InvalidArgument("callback_url holds a name or password.", field=FIELD)
        if not host.isascii() or "%" in host or "\\" in url or port == 0:
            raise InvalidArgument("The host of callback_url is not written plainly.", field=FIELD)
        if host not in self._hosts:
            written = _written_address(host)
            if not self._public or (written is not None and not is_public(written)):
                raise PermissionDenied("Callbacks to that host are not allowed here.", field=FIELD)
        path = parts.path or "/"
        path = f"{path}?{parts.query}" if parts.query else path
        return Target(parts.scheme, host, port or _PORTS[parts.scheme], path)

    async def resolve(self, target: Target) -> str:
        """The address to connect to. Raises PermissionDenied where any address of the name is not allowed
        (one of several is how a private one hides), Unavailable where the name is not found."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_LOOKUP_S):
                found = await loop.run_in_executor(self._threads, _looked_up, target)
        except (OSError, UnicodeError, TimeoutError):
            raise Unavailable(f"The name {target.host[:100]!r} is not found.") from None
        addresses = [str(one[4][0]) for one in found]
        if not addresses:
            raise Unavailable(f"The name {target.host[:100]!r} is not found.")
        if target.host not in self._hosts:
            for address in addresses:
                if not self._public or not is_public(ipaddress.ip_address(address.partition("%")[0])):
                    raise PermissionDenied("The name leads to an address that is not public.", field=FIELD)
        return addresses[0]


def _looked_up(target: Target) -> Sequence[tuple[Any, ...]]:
    return socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)


def is_public(address: Address) -> bool:
    """Whether `address` is reachable from everywhere, also what it carries inside: an IPv4 address in
    IPv6."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is None and address.teredo is not None:
            inner = address.teredo[1]
        if inner is None and int(address) >> 32 == 0:  # IPv4-compatible, deprecated
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address.is_site_local:  # deprecated, and global to `ipaddress`
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _written_address(host: str) -> Address | None:
    """The address that `host` is, in any of the forms that a resolver takes: 127.1, 0x7f000001,
    2130706433."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except OSError:
        return None
