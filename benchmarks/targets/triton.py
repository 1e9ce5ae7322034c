"""Triton: the server of the nvidia-pytriton wheel with its Python backend and dynamic batching."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

from benchmarks.environments import REPOSITORY, PeerEnvironment
from benchmarks.process_tree import Unavailable
from benchmarks.targets.peer import MODEL, Command, Peer, Ports
from benchmarks.targets.port import free_port
from benchmarks.workload import Dialect, Workload

WHEEL = "nvidia-pytriton==0.7.0"
PARTS = ("pytriton/tritonserver/", "nvidia_pytriton.libs/")
CONFIG = """name: "{model}"
backend: "python"
max_batch_size: 128
input [{{ name: "{input}" data_type: TYPE_FP32 dims: {dims} }}]
output [{{ name: "{output}" data_type: TYPE_FP32 dims: {output_dims} }}]
dynamic_batching {{ }}
instance_group [{{ count: 1 kind: KIND_CPU }}]
"""


class TritonPeer(Peer):
    """Triton's C++ server."""

    name = "triton"
    title = "Triton"
    setup = "C++ server, Python backend, one instance, dynamic batching (max 128, no delay)"
    package = "nvidia-pytriton"
    requirements = ("numpy==1.26.4",)
    health = "/v2/health/ready"
    fronts = (
        ("", f"/v2/models/{MODEL}/infer", Dialect.V2_JSON),
        (", binary tensors", f"/v2/models/{MODEL}/infer", Dialect.V2_BINARY),
    )
    grpc = True

    def __init__(self) -> None:
        super().__init__()
        self.environment = PeerEnvironment(self.name, self.requirements)

    @property
    def _server(self) -> Path:
        return self.environment.folder / "server" / "pytriton" / "tritonserver"

    def install(self) -> None:
        """The environment of the backend, and the server out of the wheel. Raises Unavailable."""
        super().install()
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = f"python_backend_stubs/{version}/triton_python_backend_stub"
        backend = self._server / "backends" / "python" / "triton_python_backend_stub"
        if backend.exists():
            return
        wheels = self.environment.folder / "wheel"
        if not list(wheels.glob("*.whl")):
            argv = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels), WHEEL]
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise Unavailable(f"{WHEEL} cannot be fetched here: {done.stderr.strip()[-300:]}")
        with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
            names = [name for name in wheel.namelist() if name.startswith(PARTS)]
            wheel.extractall(self.environment.folder / "server", names)
        if not (self._server / stub).exists():
            raise Unavailable(f"its wheel has no stub for Python {sys.version.split()[0]}")
        shutil.copy(self._server / stub, backend)
        for program in (self._server / "bin" / "tritonserver", backend):
            program.chmod(0o755)

    def versions(self) -> str:
        """Of the wheel; the server itself says its own at /v2."""
        return WHEEL.replace("==", " ")

    def command(self, workload: Workload, ports: Ports, folder: Path) -> Command:
        """A repository with one model, and the server on it."""
        model = folder / "models" / MODEL
        (model / "1").mkdir(parents=True, exist_ok=True)
        # The stub reads no PYTHONPATH.
        (model / "1" / "model.py").write_text(
            f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n"
            "from benchmarks.servers.triton_model import TritonPythonModel\n"
        )
        config = CONFIG.format(
            model=MODEL,
            input=workload.input,
            dims=list(workload.row_shape),
            output=workload.output,
            output_dims=list(workload.output_dims),
        )
        (model / "config.pbtxt").write_text(config)
        # The stub is linked against libpython, wherever this interpreter has it.
        more = {"LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR") or ""}
        argv = [
            str(self._server / "bin" / "tritonserver"),
            f"--model-repository={folder / 'models'}",
            f"--backend-directory={self._server / 'backends'}",
            "--http-address=127.0.0.1",
            f"--http-port={ports.http}",
            f"--grpc-port={ports.grpc}",
            f"--metrics-port={free_port()}",
            "--log-verbose=0",
        ]
        return argv, more, folder
