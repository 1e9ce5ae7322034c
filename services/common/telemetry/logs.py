"""One JSON object per line on standard output, for our own events and for every library's.

Lines are rendered by whoever logs and written by one thread, so that a slow reader of the pipe never stops
the event loop. The queue between them is bounded; what does not fit is counted and the count is logged.

Libraries that say the same at every try, tens of times a second while a server is away, are heard now and
then."""

from __future__ import annotations

import atexit
import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import structlog
from opentelemetry import trace
from structlog.typing import EventDict, Processor, WrappedLogger

from services.common.telemetry.seldom import Seldom

_QUEUE_LINES = 10_000
_FLUSH_S = 2.0

#: Libraries that say more at `info` than anyone reads.
_QUIET = (
    "aiokafka",
    "faststream",
    "uvicorn.access",
    "sqlalchemy",
    "httpx",
    "httpcore",
    "asyncio",
    "hpack",
    "grpc",
)

#: Libraries that say at every try what they said at the last one; how many seconds apart the same is told.
_REPEATING = ("aiokafka", "opentelemetry")
_TOLD_AGAIN_S = 10.0
_MOST_SAYINGS = 1000


def setup_logging(service: str, level: str = "info", json: bool = True) -> None:
    """Route structlog and the standard library's logging to standard output. `level` is a name such as
    `info`; `json=False` is for people at a terminal. May be called again; the last call counts."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.ExtraAdder(),
        _standing_facts(service),
        structlog.processors.StackInfoRenderer(),
    ]
    render: list[Processor] = (
        [structlog.processors.format_exc_info, _ordered, _render_json]
        if json
        else [
            structlog.dev.ConsoleRenderer(
                colors=sys.stdout.isatty(),
                timestamp_key="ts",
                # By itself it shows local variables where `rich` is installed: callers' keys among them.
                exception_formatter=structlog.dev.plain_traceback,
            )
        ]
    )
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[*(p for p in shared if not isinstance(p, structlog.stdlib.ExtraAdder)), *render],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=_LineLogger,
        cache_logger_on_first_use=False,
    )
    _lines.service = service
    handler = _LineHandler()
    handler.addFilter(_Repeated())
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(number)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(number, logging.WARNING))
    # uvicorn.error is its ordinary log; starting and stopping are said by the services themselves.
    logging.getLogger("uvicorn").setLevel(max(number, logging.WARNING))
    logging.captureWarnings(capture=True)


def flush_logs() -> None:
    """Wait, for 2 s at most, until every line so far is written."""
    _lines.flush()


class _Lines:
    """The bounded queue and the thread that empties it into standard output."""

    def __init__(self) -> None:
        self._queue: queue.Queue[str | threading.Event] = queue.Queue(_QUEUE_LINES)
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._dropped = 0
        #: Who is said to have dropped lines.
        self.service = ""
        os.register_at_fork(after_in_child=self._forget_thread)

    def put(self, line: str) -> None:
        if self._thread is None:
            self._start()
        try:
            self._queue.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def flush(self) -> None:
        if self._thread is None:
            return
        reached = threading.Event()
        try:
            self._queue.put(reached, timeout=_FLUSH_S)
        except queue.Full:
            return
        reached.wait(_FLUSH_S)

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._write, name="log-writer", daemon=True)
                self._thread.start()

    def _forget_thread(self) -> None:
        self._thread = None
        self._starting = threading.Lock()
        self._queue = queue.Queue(_QUEUE_LINES)

    def _write(self) -> None:
        while True:
            item = self._queue.get()
            if isinstance(item, threading.Event):
                item.set()
                continue
            if self._dropped:
                dropped, self._dropped = self._dropped, 0
                item += "\n" + json.dumps(self._said_of(dropped))
            try:
                sys.stdout.write(item + "\n")
                sys.stdout.flush()
            except (OSError, ValueError):
                self._dropped += 1  # nobody reads any more; the service goes on

    def _said_of(self, dropped: int) -> dict[str, Any]:
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        head = {"ts": now, "level": "warning", "service": self.service, "event": "log_lines_dropped"}
        return {**head, "count": dropped}


_lines = _Lines()
atexit.register(_lines.flush)


class _LineLogger:
    """What structlog calls at the end of its processors, whatever the level."""

    def __init__(self, name: str | None = None) -> None:
        self.name = name

    def msg(self, message: str) -> None:
        _lines.put(message)

    debug = info = warning = warn = error = critical = fatal = exception = failure = log = msg


class _LineHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            _lines.put(self.format(record))
        except Exception:
            self.handleError(record)


class _Repeated(logging.Filter):
    """Lets a library that repeats itself say the same once in a while; `untold` is how often it did since.
    The same is what one line of its source says of one thing, which it names first: a topic, a group, a node.
    What else changes from one time to the next, as the pause before another try, makes nothing new of it."""

    def __init__(self) -> None:
        super().__init__()
        self._sayings: dict[tuple[str, str, str], Seldom] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether `record` is told."""
        if record.name.partition(".")[0] not in _REPEATING:
            return True
        of = repr(record.args[0]) if isinstance(record.args, tuple) and record.args else ""
        said = (record.name, str(record.msg), of)
        if said not in self._sayings and len(self._sayings) >= _MOST_SAYINGS:
            self._sayings.clear()
        untold = self._sayings.setdefault(said, Seldom(_TOLD_AGAIN_S)).due(time.monotonic())
        if untold:
            record.__dict__["untold"] = untold  # as `extra` would
        return untold is not None


def _standing_facts(service: str) -> Processor:
    stamp: Callable[..., Any] = structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts")

    def add(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        event = stamp(logger, method, event)
        event["level"] = "error" if method == "exception" else "warning" if method == "warn" else method
        source = event.get("_record") or logger
        name = getattr(source, "name", None) or ""
        if name:
            event["logger"] = name
        # Two services may share a process; what they have in common speaks for whom its context says.
        event["service"] = _service_of(name) or event.get("service") or service
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            event.setdefault("trace_id", f"{context.trace_id:032x}")
            event.setdefault("span_id", f"{context.span_id:016x}")
        return event

    return add


def _service_of(logger: str) -> str:
    """Which service a logger belongs to by its module; empty where that is no service's."""
    package, _, rest = logger.partition(".")
    name = rest.partition(".")[0]
    return name if package == "services" and name != "common" else ""


_FIRST = ("ts", "level", "service", "event", "trace_id", "span_id", "logger")


def _ordered(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    head = {name: event[name] for name in _FIRST if name in event}
    return head | {name: value for name, value in event.items() if name not in head}


def _render_json(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    return json.dumps(event, default=str, ensure_ascii=False)
