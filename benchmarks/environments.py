"""A Python environment of its own for every peer, made on first use and kept.

The interpreter that runs the benchmark makes it: builds of one version differ by a sixth in speed."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.process_tree import Unavailable

REPOSITORY = Path(__file__).resolve().parents[1]
CACHE = REPOSITORY / ".headrace" / "bench"
INSTALL_TIMEOUT_S = 900
#: The same runtime for everybody.
ONNXRUNTIME = "onnxruntime==1.31.1"


@dataclass(frozen=True, slots=True)
class PeerEnvironment:
    """`name` is the folder, `requirements` are pinned."""

    name: str
    requirements: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Everything of this peer."""
        return CACHE / self.name

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "venv" / "bin" / "python"

    def program(self, name: str) -> str:
        """A console script of the environment."""
        return str(self.python.with_name(name))

    def install(self) -> None:
        """Make the environment unless exactly these requirements are in it, for the Python that runs this.
        Raises Unavailable."""
        wanted = "\n".join((*self.requirements, ONNXRUNTIME))
        stamp = f"{wanted}\n{sys.base_prefix} {sys.version}"
        done = self.folder / "installed.txt"
        if done.exists() and done.read_text() == stamp:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        print(f"  installing {' '.join(self.requirements) or ONNXRUNTIME} ...", flush=True)
        self._run(sys.executable, "-m", "venv", "--clear", str(self.folder / "venv"))
        self._run(str(self.python), "-m", "pip", "install", "-q", "--only-binary=:all:", *wanted.splitlines())
        done.write_text(stamp)

    def version(self, package: str) -> str:
        """The installed version of `package`."""
        code = f"import importlib.metadata as m; print(m.version({package!r}))"
        return self._run(str(self.python), "-c", code).strip()

    def environ(self) -> dict[str, str]:
        """What its processes get: the caller's environment, the repository importable, one thread each."""
        chosen = {name: value for name, value in os.environ.items() if not name.startswith("VIRTUAL_ENV")}
        return chosen | {
            "PATH": f"{self.python.parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }

    @staticmethod
    def _run(*argv: str) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        try:
            done = subprocess.run(
                argv, env=environment, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise Unavailable(f"{argv[0]} took longer than {INSTALL_TIMEOUT_S} s") from None
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()
            raise Unavailable(f"cannot be installed here: {' | '.join(lines[-2:])[:400]}")
        return done.stdout
