"""The health check of the images, as a container engine runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.fixtures.waiting import PATIENCE_S

DOCKERFILE = Path(__file__).resolve().parents[3] / "deploy" / "Dockerfile"


@contextmanager
def service(status: int) -> Iterator[int]:
    """Answers every GET with `status`; gives its port."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health/ready" else 404)
            self.end_headers()

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def healthy(port: int, **environment: str) -> bool:
    """What the image's check says of a service at `port`."""
    said = DOCKERFILE.read_text().partition("HEALTHCHECK ")[2].partition("CMD ")[2].splitlines()[0]
    program, *arguments = json.loads(said)
    assert program == "python"
    done = subprocess.run(
        [sys.executable, *arguments],
        env={"PATH": os.environ["PATH"], "HEALTH_PORT": str(port), **environment},
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
    )
    return done.returncode == 0


@pytest.mark.parametrize("status", [200, 503])
def test_who_is_ready_is_healthy(status: int) -> None:
    with service(status) as port:
        assert healthy(port) == (status == 200)


def test_a_proxy_of_the_engine_is_not_asked() -> None:
    """Docker puts the proxies of its client's configuration into the environment of every container."""
    with service(200) as port, service(502) as proxy:
        address = f"http://127.0.0.1:{proxy}"
        assert healthy(port, HTTP_PROXY=address, http_proxy=address)
