"""How a service process begins: what it is told, and in which form it speaks."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TypeVar

import structlog

from services.common.settings import ConfigurationError, ServiceSettings, load
from services.common.telemetry import flush_logs, setup_logging

S = TypeVar("S", bound=ServiceSettings)


def configured(service: str, kind: type[S], other: Mapping[str, str] | None = None) -> S:
    """The settings of `service`, read as `load` does; it logs as they say from here on. Where they are wrong,
    one line says which, and the process ends with exit code 2."""
    setup_logging(service)
    try:
        cfg = load(kind, other)
    except ConfigurationError as error:
        structlog.get_logger(__name__).critical("fatal", reason=str(error))
        flush_logs()
        sys.exit(error.exit_code)
    setup_logging(service, cfg.log_level, json=cfg.log_format == "json")
    return cfg
