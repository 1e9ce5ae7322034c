"""MLServer, LitServe, BentoML, Ray Serve and KServe: how each is started, and why so."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.environments import REPOSITORY
from benchmarks.targets.peer import MODEL, Command, Peer, Ports
from benchmarks.targets.port import Running, free_port
from benchmarks.workload import Dialect, Workload

V2_PATH = f"/v2/models/{MODEL}/infer"


class MLServerPeer(Peer):
    """MLServer with a custom runtime."""

    name = "mlserver"
    title = "MLServer"
    setup = "custom runtime, parallel workers off (one process, no hop), adaptive batching off"
    package = "mlserver"
    requirements = ("mlserver==1.7.1",)
    health = "/v2/health/ready"
    fronts = (("", V2_PATH, Dialect.V2_JSON),)
    grpc = True
    batching: dict[str, float] = {}  # noqa: RUF012 - never changed

    def command(self, workload: Workload, ports: Ports, folder: Path) -> Command:
        """`mlserver start` on a folder with both settings files."""
        settings = {
            "host": "127.0.0.1",
            "http_port": ports.http,
            "grpc_port": ports.grpc,
            "metrics_port": free_port(),
            "debug": False,
            "parallel_workers": 0,
        }
        model = {
            "name": MODEL,
            "implementation": "benchmarks.servers.mlserver_runtime.OnnxRuntime",
            **self.batching,
        }
        (folder / "settings.json").write_text(json.dumps(settings))
        (folder / "model-settings.json").write_text(json.dumps(model))
        return [self.environment.program("mlserver"), "start", str(folder)], {}, folder


class MLServerBatchingPeer(MLServerPeer):
    """The same with adaptive batching."""

    name = "mlserver"
    title = "MLServer, adaptive batching"
    setup = "as above with max_batch_size 32, max_batch_time 1 ms"
    batching = {"max_batch_size": 32, "max_batch_time": 0.001}  # noqa: RUF012 - never changed


class LitServePeer(Peer):
    """LitServe."""

    name = "litserve"
    title = "LitServe"
    setup = "one worker, one API server, fast_queue, max_batch_size 64, batch_timeout 0.5 ms, access log off"
    package = "litserve"
    requirements = ("litserve==0.2.19",)
    health = "/health"

    def command(self, workload: Workload, ports: Ports, folder: Path) -> Command:
        """The module as a script."""
        return [str(self.environment.python), "-m", "benchmarks.servers.litserve_app"], {}, REPOSITORY


class BentoMLPeer(Peer):
    """BentoML."""

    name = "bentoml"
    title = "BentoML"
    setup = (
        "one worker, batchable endpoint (adaptive batching, max_batch_size 128), access log and tracking off"
    )
    package = "bentoml"
    requirements = ("bentoml==1.4.39",)
    health = "/readyz"

    def command(self, workload: Workload, ports: Ports, folder: Path) -> Command:
        """`bentoml serve`."""
        argv = [self.environment.program("bentoml"), "serve", "benchmarks.servers.bentoml_app:Bench"]
        more = {"BENTOML_HOME": str(folder / "home"), "BENTOML_DO_NOT_TRACK": "True"}
        return (
            [*argv, "--host", "127.0.0.1", "--port", str(ports.http), "--working-dir", str(REPOSITORY)],
            more,
            REPOSITORY,
        )


class RayServePeer(Peer):
    """Ray Serve."""

    name = "ray"
    title = "Ray Serve"
    setup = (
        "one replica, @serve.batch (128, 0.5 ms), RAY_SERVE_THROUGHPUT_OPTIMIZED=1 and HAProxy ingress as "
        "its guide advises, access log off"
    )
    package = "ray"
    requirements = ("ray[serve]==2.60.0", "orjson==3.13.0")
    health = "/-/healthz"
    _sockets = ""

    @contextmanager
    def running(self, workload: Workload) -> Iterator[Running]:
        """As every peer, with a folder for Ray's files under a path short enough for its sockets."""
        with (
            tempfile.TemporaryDirectory(prefix="bench-ray-", ignore_cleanup_errors=True) as self._sockets,
            super().running(workload) as running,
        ):
            yield running

    def command(self, workload: Workload, ports: Ports, folder: Path) -> Command:
        """The module as a script."""
        more = {
            "BENCH_RAY_DIR": self._sockets,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_DEDUP_LOGS": "0",
        }
        return [str(self.environment.python), "-m", "benchmarks.servers.ray_serve_app"], more, REPOSITORY


class KServePeer(Peer):
    """KServe's Python model server."""

    name = "kserve"
    title = "KServe (Python)"
    setup = "one process, V2 protocol, latency logging and access log off; it has no batcher in the process"
    package = "kserve"
    requirements = ("kserve==0.21.0",)
    health = f"/v2/models/{MODEL}/ready"
    fronts = (("", V2_PATH, Dialect.V2_JSON),)
    grpc = True

    def command(self, workload: Workload, ports: Ports, folder: Path) -> Command:
        """The module as a script."""
        return [str(self.environment.python), "-m", "benchmarks.servers.kserve_app"], {}, REPOSITORY
