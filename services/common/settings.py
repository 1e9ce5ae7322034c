"""The environment variables that services share. A service's `Settings` subclasses `ServiceSettings` and adds
the parts it uses: `class Settings(ServiceSettings, DatabaseSettings): ...`. Only `__main__` calls `load`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from services.common.errors import Fatal

__all__ = [
    "ArtifactSettings",
    "CommaSeparated",
    "ConfigurationError",
    "DatabaseSettings",
    "FrameTlsSettings",
    "Port",
    "RedisSettings",
    "SecretStr",
    "ServiceSettings",
    "load",
]


class ConfigurationError(Fatal):
    """The environment is not what the service needs; the message names the variables."""

    exit_code = 2


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


#: A setting written `a,b,c` in the environment.
CommaSeparated = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]

#: A TCP port; 0 lets the system choose one.
Port = Annotated[int, Field(ge=0, le=65535)]


class _Environment(BaseSettings):
    # An empty variable is an absent one: `OTEL_EXPORTER_OTLP_ENDPOINT=` in a file switches tracing off. No
    # number is infinite: neither timers nor dates can be.
    model_config = SettingsConfigDict(env_ignore_empty=True, extra="ignore", frozen=True, allow_inf_nan=False)


class ServiceSettings(_Environment):
    """What every service reads."""

    #: Address that its servers listen on.
    host: str = "127.0.0.1"
    kafka_bootstrap_servers: str
    #: After how long a silence the partitions of a dead consumer go to the others of its group. Brokers take
    #: up to half of it to let one join, and a consumer that is stopped meanwhile waits for that.
    kafka_session_timeout_s: Annotated[float, Field(ge=1)] = 6.0
    #: Shared by the services of one installation; sent as `authorization: Bearer <token>`.
    internal_token: Annotated[str, Field(min_length=16, repr=False)]
    #: OTLP gRPC endpoint such as `http://127.0.0.1:4317`; empty: no tracing.
    otel_exporter_otlp_endpoint: str = ""
    otel_traces_sample_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    #: `text` is for people at a terminal.
    log_format: Literal["json", "text"] = "json"
    #: Spools and caches; everything in it belongs to this installation.
    state_dir: Path = Path(".headrace/state")
    #: How long the process may take to finish what it has after the first SIGTERM.
    drain_s: Annotated[float, Field(gt=0)] = 20.0


class FrameTlsSettings(_Environment):
    """For services that have frame streams: TLS between them, PEM files. None set: no TLS.

    A certificate and its key make servers speak TLS; an authority makes clients demand it. With both, servers
    ask their clients for a certificate too (mutual TLS). Streams over a path of the machine go without.
    """

    frames_tls_cert: Path | None = None
    frames_tls_key: Path | None = None
    frames_tls_ca: Path | None = None

    @model_validator(mode="after")
    def _certificate_and_key(self) -> FrameTlsSettings:
        if (self.frames_tls_cert is None) != (self.frames_tls_key is None):
            raise ValueError("set both FRAMES_TLS_CERT and FRAMES_TLS_KEY, or neither")
        return self


class DatabaseSettings(_Environment):
    """For services that own a schema in PostgreSQL."""

    #: `postgresql://user:password@host:port/database`
    database_url: Annotated[str, Field(repr=False, pattern=r"^postgres(ql)?://")]


class RedisSettings(_Environment):
    """For services that use Redis or Valkey."""

    #: `redis://[:password@]host:port/db`
    redis_url: Annotated[str, Field(repr=False, pattern=r"^(rediss?|unix)://")]


class ArtifactSettings(_Environment):
    """For services that read or write the artifact store. Credentials of S3 stay in the usual AWS_*
    variables."""

    #: `file:///directory` or `s3://bucket/prefix`
    artifact_store_url: Annotated[str, Field(pattern=r"^(file:///|s3://)")]
    #: Endpoint of an S3-compatible store; empty: AWS itself.
    aws_endpoint_url: str = ""
    aws_access_key_id: str = ""
    aws_secret_access_key: Annotated[str, Field(repr=False)] = ""
    aws_region: str = "us-east-1"

    def artifact_store_options(self) -> dict[str, str]:
        """What `ArtifactStore` needs besides the address; empty values are left to its own sources."""
        options = {
            "endpoint": self.aws_endpoint_url,
            "access_key_id": self.aws_access_key_id,
            "secret_access_key": self.aws_secret_access_key,
            "region": self.aws_region,
        }
        return {name: value for name, value in options.items() if value}


S = TypeVar("S", bound=BaseSettings)


def load(kind: type[S], other: Mapping[str, str] | None = None) -> S:
    """Read `kind` from the environment, and from SECRETS_DIR where that is set: a folder of files named like
    the variables, in lower case, as container platforms mount secrets. A variable wins over a file, and
    `other` over both: variables as they are for this service, where another one shares its process. Raises
    ConfigurationError, which names every variable that is missing or wrong and never shows a value."""
    # S3's client reads these itself, and takes an empty one for a value: an address, a token.
    for name in [name for name, value in os.environ.items() if name.startswith("AWS_") and not value]:
        del os.environ[name]
    given: dict[str, Any] = {name.lower(): value for name, value in (other or {}).items() if value}
    try:
        return kind(_secrets_dir=os.environ.get("SECRETS_DIR") or None, **given)
    except ValidationError as error:
        raise ConfigurationError(_sentence(error)) from None


def _sentence(error: ValidationError) -> str:
    missing, wrong = [], []
    for problem in error.errors(include_url=False, include_input=False):
        name = str(problem["loc"][0]).upper() if problem["loc"] else "settings"
        if problem["type"] == "missing":
            missing.append(name)
        else:
            wrong.append(f"{name} is wrong: {problem['msg']}")
    parts = [f"not set: {', '.join(sorted(missing))}"] if missing else []
    return "The environment does not fit: " + "; ".join(parts + wrong) + "."
