"""What makes .venv, with a stand-in for its Python: nothing is installed here."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from deploy.embedded.configuration import REPOSITORY

#: Has pip from `ensurepip` on, as one has whose making was interrupted.
PYTHON = """#!/bin/sh
case "$2" in
    ensurepip) touch "$0.pip" ;;
    pip) test -e "$0.pip" ;;
esac
"""


def test_an_environment_whose_making_was_interrupted_is_completed(tmp_path: Path) -> None:
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, text in (("python", PYTHON), ("uv", "#!/bin/sh\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / "deploy").mkdir()
    script = shutil.copy(REPOSITORY / "deploy" / "venv.sh", tmp_path / "deploy")
    done = subprocess.run(["sh", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (programs / "python.pip").exists()
