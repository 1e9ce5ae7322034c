"""Logs, status file, lock, guard, preflight, probe."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import os
import platform
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from deploy.embedded import guard, lock
from deploy.embedded import supervisor as supervisor_module
from deploy.embedded.blueprint import make_directories
from deploy.embedded.configuration import REPOSITORY, Configuration
from deploy.embedded.kafka_probe import answers_kafka
from deploy.embedded.log_files import choose, follow, tail, trim_logs
from deploy.embedded.preflight import LEAST_FREE_BYTES, check_disk, check_python
from deploy.embedded.process import Child, Command, EmbeddedError
from deploy.embedded.server import FREE_PORTS, free_port
from deploy.embedded.stack import STOP_TIMEOUT_S
from deploy.embedded.status import PartStatus, Phase, StackStatus, State, read_status
from deploy.embedded.supervisor import DATABASE_GRACE_S, DRAIN_S, STOP_S, Supervisor, grace_s, memory_warning
from deploy.embedded.view import duration
from services.common.tasks import running
from tests.fixtures.waiting import PATIENCE_S, eventually


def test_an_old_python_is_one_sentence() -> None:
    check_python((3, 11, 0))
    with pytest.raises(EmbeddedError, match=r"needs Python 3\.11 or later; .* is 3\.10\.4"):
        check_python((3, 10, 4))


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_disk(tmp_path / "not" / "there" / "yet")
    full = shutil.disk_usage(tmp_path)._replace(free=LEAST_FREE_BYTES // 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(EmbeddedError, match="Only 512 MB are free on the disk of"):
        check_disk(tmp_path)


def test_status_survives_its_file_and_a_torn_file_is_none(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    part = PartStatus("gateway", State.READY, 12, (8000, 8001), 1.5, 2, "fine")
    told = StackStatus(7, Phase.READY, warnings=["w"], addresses={"REST": "r"}, parts=[part])
    told.write(path)
    assert read_status(path) == told
    assert told.healthy
    path.write_text(path.read_text()[:-10])
    assert read_status(path) is None
    part.state = State.UNREADY
    assert not told.healthy


def test_the_lock_has_one_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not lock.held(path)
    descriptor = lock.acquire(path)
    assert descriptor is not None
    assert lock.acquire(path) is None
    assert lock.held(path)
    with open(descriptor, closefd=True):
        pass
    assert not lock.held(path)


def test_asking_for_the_lock_never_keeps_a_supervisor_from_starting(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    with path.open() as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)  # as `status` has it for an instant
        assert not lock.held(path)
        letting_go = threading.Timer(0.1, fcntl.flock, (asking, fcntl.LOCK_UN))
        letting_go.start()
        descriptor = lock.acquire(path)
        letting_go.join(5)
    assert descriptor is not None
    assert lock.held(path)
    with open(descriptor, closefd=True):
        pass


def test_groups_that_hang_share_one_deadline_and_leave_some_for_the_database() -> None:
    left, graces = STOP_S, []
    for behind in reversed(range(5)):
        graces.append(grace_s(left, behind=behind))
        left -= graces[-1]
    assert sum(graces) <= STOP_S < STOP_TIMEOUT_S
    assert graces[0] == DRAIN_S
    assert min(graces) >= DATABASE_GRACE_S
    assert grace_s(STOP_S - 1.0, behind=3) == DRAIN_S  # one that ended in time took nothing from the next


def test_a_broker_that_fills_the_memory_is_warned_of() -> None:
    assert memory_warning(2 << 30) is None
    assert "uses 3.5 GB" in (memory_warning(7 << 29) or "")


def test_what_holds_data_is_closed_to_other_users(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "logs").mkdir(parents=True)  # of an earlier version
    make_directories(home)
    modes = {folder.name: folder.stat().st_mode & 0o777 for folder in home.iterdir()}
    assert modes == dict.fromkeys(("logs", "state", "artifacts", "data", "run"), 0o700)


def test_logs_are_chosen_tailed_and_kept_bounded(tmp_path: Path) -> None:
    for name in ("gateway", "worker-0", "worker-1"):
        (tmp_path / f"{name}.log").write_text("".join(f"{name} {n}\n" for n in range(50)))
    assert [log.stem for log in choose(tmp_path, "worker")] == ["worker-0", "worker-1"]
    assert [log.stem for log in choose(tmp_path, "worker-1")] == ["worker-1"]
    assert list(tail(choose(tmp_path, "gateway"), 2)) == [
        ("gateway", "gateway 48"),
        ("gateway", "gateway 49"),
    ]
    with (tmp_path / "gateway.log").open("ab") as writer:
        trim_logs(tmp_path, max_bytes=100)
        writer.write(b"after\n")
    assert (tmp_path / "gateway.log").read_bytes() == b"after\n"
    assert (tmp_path / "gateway.log.1").read_text().endswith("gateway 49\n")


async def test_a_full_disk_ends_nothing_where_logs_are_trimmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = 0

    def trim(folder: Path) -> None:
        nonlocal tried
        tried += 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    monkeypatch.setattr(supervisor_module, "trim_logs", trim)
    monkeypatch.setattr(supervisor_module, "LOOK_EVERY_S", 0.001)
    supervisor = Supervisor(Configuration.read({"HEADRACE_HOME": str(tmp_path)}), lock=-1)
    async with asyncio.timeout(PATIENCE_S), running(supervisor._look_after(None), "looking") as looking:
        await eventually(lambda: tried > 1 or looking.done())
        assert not looking.done()


def test_following_yields_whole_new_lines_also_of_new_logs(tmp_path: Path) -> None:
    log = tmp_path / "gateway.log"
    log.write_text("old\n")
    lines = follow(tmp_path, None)
    with log.open("a") as writer:
        writer.write("half")
        writer.flush()
        (tmp_path / "router.log").write_text("new\n")
        assert next(lines) == ("router", "new")
        writer.write(" whole\n")
    assert next(lines) == ("gateway", "half whole")


def test_parts_share_our_session_so_that_their_priorities_count(tmp_path: Path) -> None:
    child = Child(Command(["sleep", "600"], env=dict(os.environ)), tmp_path / "part.log")
    try:
        assert os.getpgid(child.pid) == child.pid
        assert os.getsid(child.pid) == os.getsid(0)
    finally:
        child.kill()


def test_who_yields_comes_last_and_in_short_turns(tmp_path: Path) -> None:
    environment = dict(os.environ)
    nice, attributes = os.getpriority(os.PRIO_PROCESS, 0), struct.Struct("=IIQiIQQQ")
    sched_getattr = {"x86_64": 315, "aarch64": 275}.get(platform.machine())
    for yields in (False, True):
        child = Child(Command(["sleep", "600"], env=environment, yields=yields), tmp_path / "part.log")
        try:
            assert os.getpriority(os.PRIO_PROCESS, child.pid) == (19 if yields else nice)
            if sched_getattr is not None and sys.platform == "linux":
                said = ctypes.create_string_buffer(attributes.size)
                assert ctypes.CDLL(None).syscall(sched_getattr, child.pid, said, attributes.size, 0) == 0
                _, policy, _, its_nice, _, slice_ns, _, _ = attributes.unpack(said)
                assert (policy, its_nice) == (os.SCHED_OTHER, 19 if yields else nice)
                # Linux before 6.12 knows no turns and says 0.
                assert slice_ns in {0, 100_000} if yields else slice_ns != 100_000
        finally:
            child.kill()


def test_the_guard_ends_the_groups_it_was_told_of() -> None:
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    kept, ended = (
        subprocess.Popen([sys.executable, "-c", stubborn], start_new_session=True) for _ in range(2)
    )
    watching = subprocess.Popen([sys.executable, guard.__file__], stdin=subprocess.PIPE, text=True)
    watching.communicate(f"+{kept.pid} 0\n+{ended.pid} 0.1\n-{kept.pid}\n", timeout=10)
    assert ended.wait(timeout=PATIENCE_S) == -signal.SIGKILL
    assert kept.poll() is None
    kept.kill()
    kept.wait(timeout=5)


def test_free_ports_are_not_given_out_twice() -> None:
    ports = [free_port(3) for _ in range(20)]
    assert len({port + offset for port in ports for offset in range(3)}) == 60
    assert all(port in FREE_PORTS for port in ports)


@pytest.mark.parametrize(
    ("reply", "is_broker"), [("right", True), ("wrong id", False), ("an error", False), ("", False)]
)
def test_only_a_broker_answers_the_probe(reply: str, is_broker: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                correlation = struct.unpack_from(">ihhi", connection.recv(1024))[3]
                if reply:
                    number = correlation + (reply == "wrong id")
                    connection.sendall(struct.pack(">iihi", 10, number, 35 if reply == "an error" else 0, 0))

        answering = threading.Thread(target=answer)
        answering.start()
        assert answers_kafka("127.0.0.1", listener.getsockname()[1]) is is_broker
        answering.join(timeout=5)


def test_nobody_there_is_no_broker() -> None:
    assert not answers_kafka("127.0.0.1", free_port())


def test_durations_are_short() -> None:
    assert [duration(s) for s in (5, 119, 120, 7200, 200_000)] == ["5 s", "119 s", "2 min", "2 h", "2 d"]


def test_two_processes_are_given_different_ports() -> None:
    """Each starts to choose where the other did, among few, before either has bound one."""
    script = (
        "import random, subprocess, sys\n"
        "from deploy.embedded import server\n"
        "random.seed(1)\n"
        "server.FREE_PORTS = range(32_100, 32_500)\n"
        "print(*(server.free_port() for _ in range(20)), flush=True)\n"
        "if len(sys.argv) > 1:\n"
        "    subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, script], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    ports = done.stdout.split()
    assert len(ports) == len(set(ports)) == 40
