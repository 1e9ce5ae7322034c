"""The process that owns the stack: starts every part, keeps it running, stops it in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import psutil

from deploy.embedded import guard
from deploy.embedded.blueprint import Blueprint, draw, make_directories, read_turn, write_turn
from deploy.embedded.configuration import Configuration
from deploy.embedded.keeper import Keeper
from deploy.embedded.log_files import trim_logs
from deploy.embedded.postgres import PostgresServer
from deploy.embedded.process import EmbeddedError
from deploy.embedded.secret_files import Secrets, load_or_create
from deploy.embedded.server import Server
from deploy.embedded.status import RENEW_SIGNAL, PartStatus, Phase, StackStatus, State
from services.common.bus.admin import ensure_topics
from services.common.errors import HeadraceError
from services.common.topics import all_topics

Draw = Callable[[Configuration, Secrets], Blueprint]

log = logging.getLogger("headrace.supervisor")

#: Longer than a service gives itself to drain (DRAIN_S of platform.env).
DRAIN_S = 35.0
#: After a start that failed there is nothing to drain.
FAILED_GRACE_S = 3.0
#: All groups together: a stop that takes longer is ended by force (STOP_TIMEOUT_S of `Stack.stop`).
STOP_S = 75.0
#: Kept for each group that is still to be stopped: the last is the database, with a checkpoint to write.
LEAST_GRACE_S = 5.0
#: How long a killed supervisor's PostgreSQL may take to write its checkpoint; the others need none.
DATABASE_GRACE_S = 5.0
LOOK_EVERY_S = 30.0
TOPICS_DEADLINE_S = 20.0
#: Beyond this a broker that keeps everything in memory is warned of, bytes.
BROKER_MEMORY_LIMIT = 2 << 30
MEMORY_WARNING = "The embedded event broker uses"


class Supervisor:
    """One run from start to stop. `lock` is the descriptor that holds the home's lock."""

    def __init__(self, configuration: Configuration, lock: int, draw: Draw = draw) -> None:
        self._configuration = configuration
        self._draw = draw
        self._lock = lock
        self._status_file = configuration.home / "status.json"
        self._holds = configuration.home / "hold"
        self._guard: subprocess.Popen[str] | None = None
        self._keepers: dict[str, Keeper] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._status = StackStatus(os.getpid(), Phase.STARTING)
        self._asked = asyncio.Event()

    async def run(self, *, while_stdin: bool = False) -> int:
        """Until SIGTERM or SIGINT or, with `while_stdin`, until standard input ends. Returns the exit
        code: 0 stopped, 1 the start failed."""
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(RENEW_SIGNAL, self._asked.set)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        if while_stdin:
            loop.add_reader(sys.stdin.fileno(), _stop_at_end, stopping)
        try:
            blueprint = self._lay_out()
        except (EmbeddedError, OSError) as error:
            return self._fail(str(error))
        self._start_guard()
        failure = await self._keep(blueprint, stopping)
        await self._stop(blueprint, failed=failure is not None)
        if failure is not None:
            return self._fail(failure)
        self._status.phase = Phase.STOPPED
        self.changed()
        return 0

    def _lay_out(self) -> Blueprint:
        make_directories(self._configuration.home)
        self._holds.mkdir(exist_ok=True)
        for leftover in self._holds.iterdir():
            leftover.unlink()
        blueprint = self._draw(self._configuration, load_or_create(self._configuration.home))
        self._keepers = {
            server.name: Keeper(
                server,
                self,
                on_up=partial(_make_topics, server.url) if server is blueprint.broker else None,
            )
            for server in (*blueprint.servers, *blueprint.services)
        }
        external = [
            PartStatus(name, State.EXTERNAL, detail=detail) for name, detail in blueprint.external.items()
        ]
        self._status.parts = [*external, *(keeper.status for keeper in self._keepers.values())]
        self._status.warnings = blueprint.warnings
        self._status.addresses = {
            "REST": self._configuration.rest_url,
            "gRPC": self._configuration.grpc_address,
            "Kafka": blueprint.bootstrap_servers,
        }
        self.changed()
        return blueprint

    async def _keep(self, blueprint: Blueprint, stopping: asyncio.Event) -> str | None:
        """Run every keeper until told to stop; the sentence of what failed, or None."""
        failure: str | None = None
        try:
            async with asyncio.TaskGroup() as group:
                story = group.create_task(self._bring_up(blueprint, group))
                looking = group.create_task(self._look_after(blueprint.broker))
                renewing = group.create_task(self._renew_when_asked(blueprint))
                await stopping.wait()
                # Nothing may be started any more: end every keeper before anything is stopped.
                for task in (story, looking, renewing, *self._tasks):
                    task.cancel()
        except* EmbeddedError as errors:
            failure = _first_sentence(errors)
        except* Exception as errors:
            log.exception("the supervisor failed", exc_info=errors)
            failure = f"The supervisor failed ({errors.exceptions[0]!r}); see {self._configuration.logs}."
        return failure

    async def _bring_up(self, blueprint: Blueprint, group: asyncio.TaskGroup) -> None:
        self._tasks = [
            group.create_task(self._keepers[server.name].run(), name=server.name)
            for server in blueprint.servers
        ]
        await self._all_up(blueprint.servers)
        if blueprint.broker is None:
            await _make_topics(blueprint.bootstrap_servers)
        self._tasks += [
            group.create_task(self._keepers[server.name].run(), name=server.name)
            for server in blueprint.services
        ]
        await self._all_up(blueprint.services)
        log.info("all parts are ready")
        self._status.phase = Phase.READY
        self.changed()

    async def _renew_when_asked(self, blueprint: Blueprint) -> None:
        while True:
            await self._asked.wait()
            self._asked.clear()
            # What comes up for the first time is of the present already, or soon asked for again.
            await self._all_up(blueprint.services)
            try:
                await self._renew(blueprint)
            except (EmbeddedError, OSError) as error:
                log.warning("the data plane was not renewed: %s", error)

    async def _renew(self, blueprint: Blueprint) -> None:
        """Put new processes in the place of those that requests run through, without losing one: all of the
        new ones are up, each behind the address that its new caller knows, before an old one drains."""
        turn = read_turn(self._configuration.home)
        # What would be started after a crash of the supervisor, too: names of old ones are free again then.
        write_turn(self._configuration.home, turn + 1)
        groups = self._draw(self._configuration, load_or_create(self._configuration.home)).drain_order
        groups = groups[: blueprint.renewed]
        keepers = [self._keepers[server.name] for group in groups for server in group]
        try:
            for group in reversed(groups):
                async with asyncio.TaskGroup() as starting:
                    for server in group:
                        starting.create_task(self._keepers[server.name].begin_beside(server))
            for keeper in keepers:  # the first of them have waited for the last
                keeper.check_begun()
        except BaseException as error:
            write_turn(self._configuration.home, turn)
            for keeper in keepers:
                await keeper.give_up(FAILED_GRACE_S)
            if isinstance(error, BaseExceptionGroup):
                raise EmbeddedError(_first_sentence(error)) from error
            raise
        log.info("new processes take over: %s", ", ".join(keeper.server.name for keeper in keepers))
        for group in groups:
            async with asyncio.TaskGroup() as ending:
                for server in group:
                    ending.create_task(self._keepers[server.name].take_over(DRAIN_S))
        self._status.renewed += 1
        self.changed()

    async def _all_up(self, servers: Iterable[Server]) -> None:
        # Each keeper ends its own waiting: a part that never comes up raises there and cancels this.
        for server in servers:
            await self._keepers[server.name].came_up.wait()

    async def _stop(self, blueprint: Blueprint, *, failed: bool) -> None:
        self._status.phase = Phase.STOPPING
        self.changed()
        deadline = time.monotonic() + STOP_S
        groups = [*blueprint.drain_order, blueprint.servers]
        for position, servers in enumerate(groups, start=1):
            grace = grace_s(deadline - time.monotonic(), behind=len(groups) - position)
            if failed:
                grace = min(grace, FAILED_GRACE_S)
            async with asyncio.TaskGroup() as group:
                for server in servers:
                    group.create_task(self._keepers[server.name].stop(grace))
        if self._guard is not None and self._guard.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._guard.stdin.close()
            await asyncio.to_thread(self._guard.wait, 15)

    def _fail(self, sentence: str) -> int:
        log.error(sentence)
        self._status.phase, self._status.error = Phase.FAILED, sentence
        self.changed()
        return 1

    async def _look_after(self, broker: Server | None) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                await asyncio.to_thread(trim_logs, self._configuration.logs)
            except OSError as error:  # a full disk must not end what runs
                log.warning("the logs were not trimmed: %s", error)
            self._watch_memory(broker)

    def _watch_memory(self, broker: Server | None) -> None:
        if broker is None or broker.durable or broker.pid is None:
            return
        try:
            warning = memory_warning(psutil.Process(broker.pid).memory_info().rss)
        except psutil.Error:  # it ended just now; its keeper sees that too
            return
        others = [told for told in self._status.warnings if not told.startswith(MEMORY_WARNING)]
        if warning is not None and others == self._status.warnings:
            log.warning(warning)
        warnings = others if warning is None else [*others, warning]
        if warnings != self._status.warnings:
            self._status.warnings = warnings
            self.changed()

    # What keepers ask for (see keeper.Surroundings).

    def changed(self) -> None:
        with contextlib.suppress(OSError):  # a full disk must not end what runs
            self._status.write(self._status_file)

    def launched(self, server: Server) -> None:
        grace = DATABASE_GRACE_S if isinstance(server, PostgresServer) else 0.0
        if server.child is not None:  # whose `server.pid` is None where it has ended already
            self._tell_guard(f"+{server.child.pid} {grace}")

    def ended(self, pid: int) -> None:
        self._tell_guard(f"-{pid}")

    def is_held(self, name: str) -> bool:
        return (self._holds / name).exists()

    def note(self, message: str) -> None:
        log.warning(message)

    def _start_guard(self) -> None:
        script = str(Path(guard.__file__))
        self._guard = subprocess.Popen(  # noqa: S603 - our own script
            [sys.executable, "-I", "-S", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            bufsize=1,
            pass_fds=[self._lock],
            start_new_session=True,
        )

    def _tell_guard(self, line: str) -> None:
        if self._guard is not None and self._guard.stdin is not None:
            try:
                self._guard.stdin.write(line + "\n")
            except BrokenPipeError:  # killed by somebody; the kernel's own rope is still there
                log.warning("the guard process is gone")
                self._guard = None


def grace_s(left: float, *, behind: int) -> float:
    """Seconds that one group may take to stop, of `left` for it and the `behind` groups after it."""
    return max(LEAST_GRACE_S, min(DRAIN_S, left - LEAST_GRACE_S * behind))


def memory_warning(resident: int) -> str | None:
    """What to say of a memory-only broker that holds `resident` bytes, None while that is few."""
    if resident <= BROKER_MEMORY_LIMIT:
        return None
    return (
        f"{MEMORY_WARNING} {resident / (1 << 30):.1f} GB, since it keeps every event until it ends. "
        "Restart the stack to empty it, or set KAFKA_HOME for a broker that keeps events on disk."
    )


def _stop_at_end(stopping: asyncio.Event) -> None:
    if not os.read(sys.stdin.fileno(), 1024):
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        stopping.set()


async def _make_topics(bootstrap: str) -> None:
    """Raises EmbeddedError. Runs after every start of the broker: a memory-only one has forgotten them."""
    try:
        created = await ensure_topics(bootstrap, all_topics(), timeout=TOPICS_DEADLINE_S)
    except HeadraceError as error:
        raise EmbeddedError(f"The topics on {bootstrap} could not be made: {error.message}.") from error
    log.info("%d topics made on %s", len(created), bootstrap)


def _first_sentence(errors: BaseExceptionGroup[BaseException]) -> str:
    first = errors.exceptions[0]
    return _first_sentence(first) if isinstance(first, BaseExceptionGroup) else str(first)
