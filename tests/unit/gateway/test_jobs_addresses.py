"""Where callbacks may go."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import socket
import threading
from typing import Any

import pytest

from services.common.errors import FailedPrecondition, HeadraceError, InvalidArgument, PermissionDenied
from services.gateway.jobs.addresses import CallbackRules, is_public
from services.gateway.jobs.callbacks import backoff_s, signature
from tests.fixtures.waiting import PATIENCE_S

RULES = CallbackRules(())


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://127.1/",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0177.0.0.1/",
        "http://0/",
        "http://10.1.2.3/",
        "http://172.16.0.1/",
        "http://192.168.1.1:8080/x",
        "http://169.254.169.254/latest/meta-data/",
        "http://100.64.0.1/",
        "http://224.0.0.1/",
        "http://255.255.255.255/",
        "http://[::1]/",
        "http://[::]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:a9fe:a9fe]/",
        "http://[::127.0.0.1]/",
        "http://[64:ff9b::7f00:1]/",
        "http://[2002:7f00:1::]/",
        "http://[fe80::1]/",
        "http://[fd00::1]/",
        "http://[fec0::1]/",
        "http://[ff02::1]/",
        "https://127.0.0.1./",
    ],
)
def test_addresses_that_are_not_public_are_refused_as_they_are_written(url: str) -> None:
    with pytest.raises(PermissionDenied) as caught:
        RULES.check(url)
    assert caught.value.field == "callback_url"


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/",
        "file:///etc/passwd",
        "gopher://example.com/",
        "http:///x",
        "http://user:secret@example.com/",
        "http://user@127.0.0.1/",
        "http://example.com:0/",
        "http://example.com:99999/",
        "http://exa mple.com/",
        "http://example.com/\nx",
        "http://example.com\\@127.0.0.1/",
        "http://ex%61mple.com/",
        "http://ｅxample.com/",
        "http://[fe80::1%25eth0]/",
        "//example.com/",
        "example.com",
        "http://[::1",
    ],
)
def test_what_is_no_plain_address_is_refused(url: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        RULES.check(url)
    assert caught.value.field == "callback_url"


def test_public_addresses_and_named_hosts_pass() -> None:
    target = RULES.check("https://hooks.example.com/a/b?c=d")
    assert (target.scheme, target.host, target.port, target.path) == (
        "https",
        "hooks.example.com",
        443,
        "/a/b?c=d",
    )
    assert target.authority == "hooks.example.com"
    assert RULES.check("http://[2606:4700::1111]:8080").authority == "[2606:4700::1111]:8080"
    only = CallbackRules(("hooks.internal", "127.0.0.1"))
    only.check("http://hooks.internal/")
    only.check("http://127.0.0.1:9/")
    with pytest.raises(PermissionDenied):
        only.check("https://example.com/")
    both = CallbackRules(("127.0.0.1", "public"))
    both.check("http://127.0.0.1:9/")
    both.check("https://example.com/")
    with pytest.raises(PermissionDenied):
        both.check("http://127.0.0.2/")
    with pytest.raises(FailedPrecondition):
        CallbackRules((), is_signed=False).check("https://example.com/")


def resolving(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """Every look-up gives the next of `answers`; the last one again."""
    asked: list[str] = []

    def getaddrinfo(host: str, port: int, **_options: Any) -> list[Any]:
        asked.append(host)
        addresses = answers[min(len(asked), len(answers)) - 1]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["93.184.215.14", "10.0.0.1"],  # a private one among public ones
        ["::1"],
        ["::ffff:192.168.0.1"],
        ["fe80::1%eth0"],
        [],
    ],
)
async def test_a_name_that_leads_inside_is_refused(
    addresses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolving(monkeypatch, addresses)
    with pytest.raises(HeadraceError):
        await RULES.resolve(RULES.check("http://rebinding.example/"))


async def test_a_name_is_looked_up_once_and_that_address_is_connected_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = resolving(monkeypatch, ["93.184.215.14"], ["127.0.0.1"])
    assert await RULES.resolve(RULES.check("http://rebinding.example/")) == "93.184.215.14"
    assert asked == ["rebinding.example"]
    with pytest.raises(PermissionDenied):  # the next try asks again, and judges again
        await RULES.resolve(RULES.check("http://rebinding.example/"))


def test_public() -> None:
    for text in ("8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"):
        assert is_public(ipaddress.ip_address(text)), text
    for text in ("192.0.2.1", "198.18.0.1", "240.0.0.1", "2001:db8::1", "::ffff:10.0.0.1", "64:ff9b::a00:1"):
        assert not is_public(ipaddress.ip_address(text)), text


def test_signature_is_as_documented() -> None:
    value = signature("secret", 1_700_000_000, b'{"a":1}')
    told = hmac.new(b"secret", b'1700000000.{"a":1}', hashlib.sha256).hexdigest()
    assert value == f"t=1700000000,v1={told}"


def test_tries_are_further_and_further_apart() -> None:
    assert [backoff_s(number) for number in (1, 2, 3, 4)] == [5, 10, 20, 40]
    assert backoff_s(40) == 3600


async def test_a_resolver_that_hangs_takes_no_threads_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = threading.Event()

    def getaddrinfo(_host: str, _port: int, **_options: Any) -> list[Any]:
        hangs.wait(PATIENCE_S)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    rules = CallbackRules(())
    target = rules.check("https://slow.example/")
    before = set(threading.enumerate())
    looking = [asyncio.create_task(rules.resolve(target)) for _ in range(64)]
    try:
        assert await asyncio.to_thread(lambda: 7) == 7  # they have begun, or wait for their turn
        busy = [thread.name for thread in threading.enumerate() if thread not in before]
        assert len([name for name in busy if name.startswith("callback-names")]) == 4
        assert len([name for name in busy if not name.startswith("callback-names")]) <= 1
    finally:
        hangs.set()
        rules.close()
        await asyncio.gather(*looking, return_exceptions=True)
