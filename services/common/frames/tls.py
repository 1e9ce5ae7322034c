"""TLS contexts for frame connections: TLS 1.2 or later, ALPN h2, client certificates where a CA is given."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Protocol

from services.common.errors import Fatal


class TlsFiles(Protocol):
    """The part of a service's settings that is about TLS between services; nothing set: none."""

    @property
    def frames_tls_cert(self) -> Path | None:
        """What a server shows, and a client where it must."""
        ...

    @property
    def frames_tls_key(self) -> Path | None:
        """Belongs to the certificate."""
        ...

    @property
    def frames_tls_ca(self) -> Path | None:
        """Who must have signed the other's certificate. A server that has it asks its clients for one."""
        ...


def server_tls_of(cfg: TlsFiles) -> ssl.SSLContext | None:
    """For a server with these settings; None: without TLS. Raises Fatal."""
    if cfg.frames_tls_cert is None or cfg.frames_tls_key is None:
        return None
    try:
        return server_tls(cfg.frames_tls_cert, cfg.frames_tls_key, cfg.frames_tls_ca)
    except (OSError, ssl.SSLError) as error:
        raise Fatal(f"The files of FRAMES_TLS_* cannot be used: {error}.") from error


def client_tls_of(cfg: TlsFiles) -> ssl.SSLContext | None:
    """For a client with these settings; None: without TLS. Raises Fatal."""
    if cfg.frames_tls_ca is None:
        return None
    try:
        return client_tls(cfg.frames_tls_ca, cfg.frames_tls_cert, cfg.frames_tls_key)
    except (OSError, ssl.SSLError) as error:
        raise Fatal(f"The files of FRAMES_TLS_* cannot be used: {error}.") from error


def server_tls(certificate: Path, key: Path, client_ca: Path | None = None) -> ssl.SSLContext:
    """A server's context. With `client_ca`, clients must show a certificate that it signed (mutual TLS)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols(["h2"])
    if client_ca is not None:
        context.load_verify_locations(client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_tls(ca: Path, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    """A client's context: the server must show a certificate for its name that `ca` signed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(ca)
    context.set_alpn_protocols(["h2"])
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    return context
