"""Writes the locks beside this file: `python requirements/lock.py`.

`dev.txt` is what a checkout needs; `<service>.txt` is what one image carries, in the same versions. Only
names and versions are kept: an index address in a lock would tie the project to somebody's mirror.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
SERVICES = ("gateway", "router", "worker", "registry", "analytics", "drift")
GROUPS = ("dev", "peers", "examples")
OWN = ("common", "proto", "client", "embedded", *SERVICES)
UV = shutil.which("uv") or str(Path(sys.executable).parent / "uv")


def compile_lock(name: str, *sources: str) -> None:
    """Resolve `sources` into `<name>.txt`, for every platform and Python from 3.11."""
    command = [UV, "pip", "compile", "-q", "--universal", "--python-version", "3.11", "--no-header"]
    command += ["--no-annotate", "--override", "requirements/overrides.txt", "-o", f"requirements/{name}.txt"]
    for own in OWN:
        command += ["--no-emit-package", f"headrace-{own}"]
    # What this machine's own configuration says of indexes stays out of the resolution's output.
    environment = {**os.environ, "UV_NO_CONFIG": "1"}
    subprocess.run([*command, *sources], cwd=ROOT, check=True, env=environment)  # noqa: S603  our own arguments
    locked = HERE / f"{name}.txt"
    kept = [
        line for line in locked.read_text().splitlines() if not line.startswith(("-e ", "./", "#", "file:"))
    ]
    locked.write_text("\n".join(kept) + "\n")


def main() -> None:
    """All locks; the services follow the versions of `dev.txt`."""
    members = [f"services/{name}/pyproject.toml" for name in ("common", *SERVICES)]
    members += ["client/pyproject.toml", "deploy/embedded/pyproject.toml"]
    groups = [f"--group=pyproject.toml:{group}" for group in GROUPS]
    compile_lock("dev", *members, "--all-extras", *groups)
    for service in SERVICES:
        compile_lock(service, f"services/{service}/pyproject.toml", "-c", "requirements/dev.txt")


if __name__ == "__main__":
    main()
