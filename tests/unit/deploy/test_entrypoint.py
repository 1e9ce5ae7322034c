"""The container's first program: ids of replicas, and what it becomes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ENTRYPOINT = Path(__file__).resolve().parents[3] / "deploy" / "entrypoint.py"

STAND_IN = """
import json, os, sys, time
print(json.dumps({name: os.environ.get(name) for name in ("WORKER_ID", "ADVERTISE_HOST")}), flush=True)
sys.stdin.read()
"""


@contextmanager
def container(
    tmp_path: Path, service: str = "worker", **given: str
) -> Iterator[tuple[dict[str, str], subprocess.Popen[str]]]:
    """The entry point with a stand-in for the service; gives what the service saw. Ends with SIGKILL."""
    package = tmp_path / "installed" / "services" / service
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN)
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(tmp_path / "installed"),
        "PYTHONSAFEPATH": "1",
        "SERVICE": service,
        "STATE_DIR": str(tmp_path / "state"),
        **given,
    }
    process = subprocess.Popen(
        [sys.executable, str(ENTRYPOINT)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline()), process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        process.stdin.close()
        process.stdout.close()


def test_replicas_on_one_volume_get_different_ids(tmp_path: Path) -> None:
    with container(tmp_path) as (first, _), container(tmp_path) as (second, _):
        assert [first["WORKER_ID"], second["WORKER_ID"]] == ["worker-0", "worker-1"]


def test_the_id_of_a_killed_replica_goes_to_the_next(tmp_path: Path) -> None:
    with container(tmp_path) as (first, process), container(tmp_path) as (second, _):
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        with container(tmp_path) as (third, _):
            assert (first["WORKER_ID"], second["WORKER_ID"]) == ("worker-0", "worker-1")
            assert third["WORKER_ID"] == "worker-0"


def test_a_replica_says_under_which_name_its_network_knows_it(tmp_path: Path) -> None:
    with container(tmp_path) as (seen, _):
        assert seen["ADVERTISE_HOST"] == socket.gethostname()


def test_what_was_given_stays(tmp_path: Path) -> None:
    with container(tmp_path, WORKER_ID="mine", ADVERTISE_HOST="10.0.0.9") as (seen, _):
        assert seen == {"WORKER_ID": "mine", "ADVERTISE_HOST": "10.0.0.9"}
    assert not (tmp_path / "state").exists()


def test_a_service_that_is_not_scaled_is_started_as_it_is(tmp_path: Path) -> None:
    with container(tmp_path, service="registry") as (seen, _):
        assert seen == {"WORKER_ID": None, "ADVERTISE_HOST": None}
