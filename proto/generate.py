"""Generates the Python code beside the .proto files, or with `--check` says whether it is current.

The check also holds the contracts to their evolution rules (proto/README.md): `buf lint` for style, and
`buf breaking` against `released.binpb`, the image of the contracts as last released. `--release` writes that
image anew; it is run when a release is cut and at no other time.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent
RELEASED = ROOT / "released.binpb"
SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("*/**/*.proto"))
BUF = Path(sys.executable).parent / "buf"


def generate(target: Path) -> None:
    """Write the modules, stubs and gRPC code of every .proto below `target`."""
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}"]
    command += [f"--{kind}_out={target}" for kind in ("python", "grpc_python", "pyi")]
    subprocess.run([*command, *SOURCES], cwd=ROOT, check=True)  # noqa: S603  our own arguments


def stale() -> list[str]:
    """Generated files that differ from what the contracts give now."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder)
        generate(target)
        fresh = {path.relative_to(target): path.read_bytes() for path in target.rglob("*_pb2*.py*")}
    kept = {
        path.relative_to(ROOT): path for path in ROOT.rglob("*_pb2*.py*") if "__pycache__" not in path.parts
    }
    names = [
        name for name, content in fresh.items() if name not in kept or kept[name].read_bytes() != content
    ]
    return sorted(str(name) for name in [*names, *(kept.keys() - fresh.keys())])


def buf(*arguments: str) -> bool:
    """Run one `buf` command on the contracts; what it finds goes to the terminal."""
    return subprocess.run([BUF, *arguments], cwd=ROOT, check=False).returncode == 0  # noqa: S603  our own


def main(arguments: list[str]) -> int:
    """0 where everything is current and allowed, else 1."""
    if find_spec("grpc_tools") is None:
        sys.stderr.write("grpcio-tools is not installed: run `make proto` instead.\n")
        return 1
    if arguments == ["--release"]:
        return 0 if buf("build", "-o", str(RELEASED)) else 1
    if arguments == ["--check"]:
        old = stale()
        for name in old:
            sys.stderr.write(f"proto/{name} is not what the contracts give: run `make proto`.\n")
        return 0 if not old and buf("lint") and buf("breaking", "--against", str(RELEASED)) else 1
    generate(ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
