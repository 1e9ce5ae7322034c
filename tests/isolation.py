"""Proves that each service stands on its own dependencies: `python -m tests.isolation [service …]`.

For each service a new environment gets the service's locked requirements, the contracts, `services.common`
and the service itself, each installed as a wheel, plus a test runner. In it every module of the service is
imported and its unit tests run. Nothing of another service is there, so an import across a border fails here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SERVICES = ("gateway", "router", "worker", "registry", "analytics", "drift")
RUNNER = ("pytest", "pytest-asyncio", "pytest-timeout", "hypothesis")
#: What the unit tests of a service make their inputs with, beside what the service itself needs.
MAKES_INPUTS = {"worker": ("onnx",), "analytics": ("httpx",), "gateway": ("h2",)}

IMPORT_ALL = """
import importlib, pkgutil, sys
package = importlib.import_module("services." + sys.argv[1])
names = [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in names:
    if not name.endswith("__main__") and ".migrations" not in name:
        importlib.import_module(name)
own = ("common", sys.argv[1])
others = [m for m in sys.modules if m.startswith("services.") and m.split(".")[1] not in own]
sys.exit("imports " + ", ".join(others) if others else 0)
"""


def run(*command: str | Path, **environment: str) -> None:
    """Run `command` in the repository root; its failure is ours."""
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT, env={**os.environ, **environment})


def prove(service: str, folder: Path) -> None:
    """Make the environment of `service` below `folder`, import its modules, run its unit tests."""
    venv = folder / service
    python = venv / "bin" / "python"
    uv = shutil.which("uv") or str(Path(sys.executable).parent / "uv")
    run(uv, "venv", "-q", "--python", sys.executable, venv)
    install = (uv, "pip", "install", "-q", "--python", python)
    run(*install, "-r", f"requirements/{service}.txt", *RUNNER, *MAKES_INPUTS.get(service, ()))
    run(*install, "--no-deps", "./proto", "./services/common", f"./services/{service}")
    # Away from the checkout, so that only what was installed can be imported.
    subprocess.run([str(python), "-c", IMPORT_ALL, service], check=True, cwd=folder)
    tests = folder / f"{service}-tests"
    shutil.copytree(ROOT / "tests" / "unit" / service, tests / "tests" / "unit" / service)
    for shared in ("fixtures", "vectors"):
        if (ROOT / "tests" / shared).is_dir():
            shutil.copytree(ROOT / "tests" / shared, tests / "tests" / shared)
    options: tuple[str, ...] = (
        "-q",
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
        "-o",
        "asyncio_mode=auto",
    )
    options += ("-o", "asyncio_default_fixture_loop_scope=function")
    options += ("-p", "tests.fixtures.examples")
    command = [str(python), "-m", "pytest", *options, "-o", "pythonpath=.", "tests/unit"]
    subprocess.run(command, check=True, cwd=tests)


def main(services: list[str]) -> int:
    """Prove each of `services`, all where none is named; 1 where one fails."""
    failed = []
    with tempfile.TemporaryDirectory(prefix="headrace-isolation-") as folder:
        for service in services or SERVICES:
            try:
                prove(service, Path(folder))
            except subprocess.CalledProcessError as error:
                failed.append(service)
                sys.stderr.write(f"{service}: {error}\n")
            shutil.rmtree(Path(folder) / service, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
