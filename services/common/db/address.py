"""What DATABASE_URL says, as the driver takes it."""

from __future__ import annotations

from typing import Final
from urllib.parse import urlencode

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from services.common.errors import Fatal

#: The driver's own names, and where SQLAlchemy looks for several hosts.
_ARGUMENTS: Final = frozenset(
    {
        "host",
        "port",
        "user",
        "password",
        "database",
        "passfile",
        "service",
        "servicefile",
        "ssl",
        "direct_tls",
        "command_timeout",
        "target_session_attrs",
        "krbsrvname",
        "gsslib",
        "prepared_statement_cache_size",
    }
)
#: libpq's names that the driver knows only within an address; options are for the server.
_WITHIN: Final = frozenset(
    {
        "dbname",
        "sslmode",
        "sslcert",
        "sslkey",
        "sslpassword",
        "sslrootcert",
        "sslcrl",
        "sslnegotiation",
        "ssl_min_protocol_version",
        "ssl_max_protocol_version",
        "options",
    }
)
#: Set by `engine.connect_args`.
_OURS: Final = frozenset({"application_name", "connect_timeout"})
#: What the driver never does may be said to be unwanted, and not to be needed.
_NEVER: Final = {"channel_binding": ("disable", "prefer"), "gssencmode": ("disable", "prefer")}


def address(database_url: str) -> tuple[URL, dict[str, str]]:
    """`postgresql://…` for SQLAlchemy, and those of its parameters that only libpq calls so. Raises Fatal
    where it is no address, or has a parameter that would not be heeded, by its name."""
    try:
        url = make_url(database_url).set(drivername="postgresql+asyncpg")
    except (ArgumentError, ValueError):  # ValueError: of the port
        raise Fatal(
            "DATABASE_URL is not of the form postgresql://user:password@host:port/database."
        ) from None
    given: dict[str, str] = {}
    for name, value in url.query.items():
        last = value if isinstance(value, str) else value[-1]
        if name in _WITHIN or name in _OURS:
            given[name] = last
        elif name not in _ARGUMENTS and last not in _NEVER.get(name, ()):
            raise Fatal(f"DATABASE_URL has a parameter that is not supported: {name}.")
    if given.get("sslrootcert") == "system":  # to the driver, the name of a file
        raise Fatal("DATABASE_URL has an sslrootcert that is not supported: name a file of certificates.")
    return url.difference_update_query([name for name in url.query if name not in _ARGUMENTS]), given


def connect_timeout(given: dict[str, str], usual_s: float) -> float:
    """Seconds, as in libpq: whole ones. There, 0 is no limit at all, here none of its own. Raises Fatal."""
    text = given.get("connect_timeout", "0")
    try:
        seconds = int(text)
    except ValueError:
        raise Fatal("DATABASE_URL has a connect_timeout that is no whole number.") from None
    return float(seconds) if seconds > 0 else usual_s


def within_address(given: dict[str, str]) -> str | None:
    """The parameters that the driver is told as an address, which says nothing else."""
    told = {name: value for name, value in given.items() if name in _WITHIN}
    return f"postgresql://?{urlencode(told)}" if told else None
